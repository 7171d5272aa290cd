"""Our losses beside those of the code bases that they are named after, value and gradient on random tensors.

    python benchmarks/against_others.py --fastgen a-clone-of-FastGen --dmd2 a-clone-of-DMD2

Their files are read and run as they stand, with stand-ins for the modules that these import and the losses do not need.
Prints a table of the largest differences, and fails where one exceeds 1e-6.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import torch

from fewstep.distill.losses import (
    batch_level_means,
    denoising_loss,
    density_ratio,
    discriminator_loss,
    divergence_weight,
    dmd_gradient,
    generator_loss,
    surrogate,
)

LIMIT = 1e-6
# Theirs leave out h's constant factor, which the mean takes out again, all but in the 1e-6 added to it.
FACTOR = {"sh": 0.5, "neyman": 2.0}
NAMES = {
    "kl": "kl",
    "js": "js",
    "sf": "softened_rkl",
    "neyman": "neyman",
    "sh": "hellinger",
    "jf": "jeffreys",
}


def module_from(path: Path, name: str, stand_ins: dict[str, object]):
    """Their file as a module of its own; imports that it does not need here get a mock."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stand_ins):
        spec.loader.exec_module(module)
    return module


def value_and_gradient(loss_of, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    point = x.clone().requires_grad_()
    loss = loss_of(point)
    return loss.detach(), torch.autograd.grad(loss, point)[0]


def compared(name: str, ours, theirs, x: torch.Tensor) -> tuple[str, float, float]:
    (a, da), (b, db) = value_and_gradient(ours, x), value_and_gradient(theirs, x)
    return (
        name,
        float((a - b).abs() / max(1.0, float(b.abs()))),
        float((da - db).abs().max() / db.abs().max()),
    )


def expand_like(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What their helper of this name says that it does: trailing axes of length one."""
    return x.reshape(x.shape + (1,) * (target.ndim - x.ndim))


def fastgen_rows(source: Path) -> list[tuple[str, float, float]]:
    utils = types.SimpleNamespace(expand_like=expand_like)
    stand_ins = {"fastgen": mock.MagicMock(), "fastgen.networks": mock.MagicMock(), "fastgen.utils": utils,
                 "fastgen.networks.noise_schedule": mock.MagicMock()}  # fmt: skip
    losses = module_from(source / "fastgen/methods/common_loss.py", "their_common_loss", stand_ins)
    base = types.SimpleNamespace(DMD2Model=object)
    distributed = types.SimpleNamespace(world_size=lambda: 1)
    stand_ins |= {"fastgen.methods": base, "fastgen.methods.common_loss": losses}
    stand_ins |= {"fastgen.utils.logging_utils": mock.MagicMock(), "fastgen.utils.distributed": distributed}
    with mock.patch.dict(sys.modules, stand_ins):
        f_distill = module_from(
            source / "fastgen/methods/distribution_matching/f_distill.py", "their_f", stand_ins
        )

    random = torch.Generator().manual_seed(0)
    x, real, fake = torch.randn(3, 8, 3, 4, 4, generator=random).unbind()
    logits, t = torch.randn(8, 3, generator=random), 80 * torch.rand(8, generator=random)
    vsd = losses.variational_score_distillation_loss

    def ours(x, scale=None):
        return surrogate(x, dmd_gradient(x, real, fake, weight="fastgen", scale=scale), "mse")

    rows = [compared("fastgen: VSD", ours, lambda x: vsd(x, real, fake), x)]
    rows.append(compared("fastgen: GAN, student", generator_loss, losses.gan_loss_generator, logits))
    rows.append(compared("fastgen: GAN, critic", lambda v: discriminator_loss(v, 2 * v),
                         lambda v: losses.gan_loss_discriminator(v, 2 * v), logits))  # fmt: skip
    dsm = losses.denoising_score_matching_loss
    rows.append(compared("fastgen: critic, x0", lambda v: denoising_loss(v, real, 1.0, 2.0, "x0"),
                         lambda v: dsm("x0", v, x0=real), x))  # fmt: skip
    for theirs, name in NAMES.items():
        config = types.SimpleNamespace(f_distill=types.SimpleNamespace(
            ratio_lower=0.1, ratio_upper=20.0, ratio_normalization=True, ratio_ema_rate=0.5))  # fmt: skip
        schedule = types.SimpleNamespace(min_t=0.002, max_t=80.0)
        weights = f_distill.all_f_div_weighting_function
        net = types.SimpleNamespace(noise_scheduler=schedule, bins=torch.ones(10))
        them = types.SimpleNamespace(
            config=config, bin_num=10, f_div_weighting_function=weights[theirs], net=net
        )
        h = f_distill.FdistillModel._get_f_div_weighting_h(them, logits, t)
        index = ((t.double() - 0.002) / ((80.0 - 0.002) / 10)).floor().long().clamp(0, 9)
        ratio = density_ratio(logits)
        _, mean = batch_level_means(torch.ones(10), ratio, index, ema=0.5)
        weight = divergence_weight(ratio / mean, name, margin=1e-6 * FACTOR.get(theirs, 1.0))
        rows.append(compared(f"fastgen: f-distill, {theirs}", lambda x, weight=weight: ours(x, weight),
                             lambda x, h=h: vsd(x, real, fake, additional_scale=h), x))  # fmt: skip
    return rows


def dmd2_rows(source: Path) -> list[tuple[str, float, float]]:
    class AnyModule(types.ModuleType):
        def __getattr__(self, name: str):
            return mock.MagicMock()

    path = source / "main/edm/edm_guidance.py"
    wanted = [
        line.split()[1] for line in path.read_text().splitlines() if line.startswith(("from ", "import "))
    ]
    parts = {".".join(name.split(".")[: k + 1]) for name in wanted for k in range(name.count(".") + 1)}
    stand_ins = {
        name: AnyModule(name) for name in parts if name.split(".")[0] not in ("torch", "copy", "numpy")
    }
    guidance = module_from(path, "their_guidance", stand_ins)
    kind = next(v for v in vars(guidance).values() if isinstance(v, type) and "Guidance" in v.__name__)
    random = torch.Generator().manual_seed(1)
    x, real, fake = torch.randn(3, 8, 3, 4, 4, generator=random).unbind()
    sigma = torch.linspace(0.1, 20, 100)
    them = types.SimpleNamespace(
        min_step=2, max_step=98, num_train_timesteps=100, karras_sigmas=sigma, sigma_data=0.5,
        real_unet=lambda *a, **k: real, fake_unet=lambda *a, **k: fake,
    )  # fmt: skip

    def theirs(x):
        return kind.compute_distribution_matching_loss(them, x, None)[0]["loss_dm"]

    rows = [compared("dmd2: distribution matching",
                     lambda x: surrogate(x, dmd_gradient(x, real, fake, weight="dmd2"), "mse"), theirs, x)]  # fmt: skip

    def critic(v):
        them.fake_unet = lambda *a, **k: v
        torch.manual_seed(5)
        return kind.compute_loss_fake(them, real, None)[0]["loss_fake_mean"]

    torch.manual_seed(5)
    torch.randn_like(real)
    levels = sigma[torch.randint(0, 100, [8, 1, 1, 1])].reshape(-1)
    rows.append(compared("dmd2: critic, Karras weight",
                         lambda v: denoising_loss(v, real, torch.ones(8), levels, "edm", 0.5), critic, x))  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fastgen", type=Path, help="a clone of NVlabs/FastGen")
    parser.add_argument("--dmd2", type=Path, help="a clone of tianweiy/DMD2")
    arguments = parser.parse_args()
    if not (arguments.fastgen or arguments.dmd2):
        parser.error("give --fastgen, --dmd2 or both: paths of clones")
    rows = fastgen_rows(arguments.fastgen) if arguments.fastgen else []
    rows += dmd2_rows(arguments.dmd2) if arguments.dmd2 else []
    print(f"{'loss':32s} {'value':>9s} {'gradient':>9s}   (relative differences)")
    for name, value, gradient in rows:
        print(f"{name:32s} {value:9.1e} {gradient:9.1e}")
    worst = max(max(value, gradient) for _, value, gradient in rows)
    print(f"largest {worst:.1e}, allowed {LIMIT:.0e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
