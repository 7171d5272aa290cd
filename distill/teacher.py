"""Training of small teachers: a Denoiser on the digits, by the regression of its network's own target.

The network F_theta is asked for F* = g_x x0 + g_e eps at x = alpha(t) x0 + sigma(t) eps, and

    loss = E | F_theta(x, t, label) - F* |^2,          t drawn as the recipe's ``times`` says,

which for EDM preconditioning is the weighting of 2206.00364, for ``eps`` that of 2006.11239, for ``flow`` that of
2210.02747. Ten per cent of the labels are replaced by the null label, so that guidance has its unconditional half.

    fewstep teacher digits-flow                      # the shipped recipe
    fewstep teacher digits-edm steps=500 out=/tmp    # changed on the command line
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import paths
from ..models.checkpoint import write_atomically
from ..models.denoiser import Denoiser
from ..models.digits import CLASSES, SHAPE, SIGMA_DATA, digits
from ..models.load import build, save_checkpoint
from ..models.unet import UNet, time_frequencies
from . import recipe as recipes
from .levels import Times, draw_times
from .progress import track


@dataclass
class TeacherRecipe:
    """What ``recipes/digits-*.yaml`` may say. ``net`` is a ``UNetConfig`` by its keys.

    ``time_cutoff``: the time embedding's frequencies above so many radians per unit of t are held at 0 (see
    ``without_fast_frequencies``).
    """

    kind: str = "denoiser"
    name: str = "digits-edm"
    path: dict[str, Any] = field(default_factory=lambda: {"path": "edm"})
    predicts: str = "x0"
    precond: str | None = "edm"
    sigma_data: float = SIGMA_DATA
    time_scale: float = 1.0
    net: dict[str, Any] = field(default_factory=dict)
    time_cutoff: float | None = None
    times: Times = field(default_factory=Times)
    label_dropout: float = 0.1
    steps: int = 3000
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 100
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.0
    ema_share: float = 0.05
    seed: int = 0
    threads: int = 1
    out: str = "."


def target(
    d: Denoiser, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, F*): the network's input before any scaling, and what it should answer: solves  x0 = P x + Q F*  for F*."""
    wide = t.reshape(-1, *[1] * (x0.ndim - 1))
    x = d.path.alpha(wide) * x0 + d.path.sigma(wide) * eps
    # x0's equation loses its Q where sigma = 0 is near, eps' where alpha = 0 is; take the better of the two
    answers = []
    for form, value in (("x0", x0), ("eps", eps)):
        p, (q,) = d.affine(wide, form)
        answers.append((torch.as_tensor(q, dtype=torch.float64).expand_as(wide), (value - p * x) / q))
    (q_x, f_x), (q_e, f_e) = answers
    return x.float(), torch.where(q_x.abs() > q_e.abs(), f_x, f_e).float()


def denoising_loss(
    d: Denoiser, x0: torch.Tensor, label: torch.Tensor, eps: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """| F_theta - F* |^2, one number a sample; x0 and eps (B, ...), t (B,) in float64."""
    x, wanted = target(d, x0.double(), eps.double(), t)
    (output,) = d.raw(x, t, label=label)
    return (output - wanted).square().flatten(1).mean(dim=1)


def null_some(label: torch.Tensor, share: float, null: int, random: torch.Generator) -> torch.Tensor:
    """Labels with a share of them replaced by the null label."""
    return torch.where(torch.rand(len(label), generator=random) < share, null, label)


def train(recipe: TeacherRecipe) -> tuple[Denoiser, dict[str, Any]]:
    """The averaged teacher, and the record of its training."""
    torch.manual_seed(recipe.seed)
    random = torch.Generator().manual_seed(recipe.seed)
    config = {
        "path": paths.from_config(recipe.path).to_config(),
        "predicts": recipe.predicts,
        "precond": recipe.precond,
        "sigma_data": recipe.sigma_data,
        "time_scale": recipe.time_scale,
        "net": {"type": "unet", "sample_size": SHAPE[-1], "num_class_embeds": CLASSES + 1, **recipe.net},
        "shape": list(SHAPE),
    }
    d = build(config)
    net = d.net.train()
    if recipe.time_cutoff is not None:
        without_fast_frequencies(net, recipe.time_cutoff / recipe.time_scale)
    averaged = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=recipe.lr, betas=tuple(recipe.betas), weight_decay=recipe.weight_decay
    )
    images, labels = (torch.from_numpy(a) for a in digits("train"))
    cpu, wall, running = time.process_time(), time.monotonic(), float("nan")
    for step, say in track(recipe.steps, recipe.name):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * learning_rate(step, recipe.steps, recipe.warmup)
        rows = torch.randint(len(images), (recipe.batch,), generator=random)
        label = null_some(labels[rows], recipe.label_dropout, CLASSES, random)
        eps = torch.randn(len(rows), *SHAPE, generator=random)
        t = draw_times(recipe.times, d.path, len(rows), random)
        loss = denoising_loss(d, images[rows], label, eps, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average(averaged, net, step, recipe.ema_share)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of {recipe.name} became {value} at step {step}; try a smaller lr than {recipe.lr}"
            )
        running = value if math.isnan(running) else 0.98 * running + 0.02 * value
        say(loss=running)
    net.load_state_dict(averaged.state_dict())
    net.eval().requires_grad_(False)
    record = {
        "recipe": {k: v for k, v in asdict(recipe).items() if k != "out"},
        "core_seconds": round(time.process_time() - cpu, 1),
        "minutes": round((time.monotonic() - wall) / 60, 2),
        "parameters": sum(p.numel() for p in net.parameters()),
        "torch": torch.__version__,
    }
    return d, {**record, "config": config}


def without_fast_frequencies(net: UNet, cutoff: float) -> None:
    """Set to 0, and keep there, what the time embedding reads at frequencies above ``cutoff`` radians per unit of tau.

    With tau = 1000 t the fastest wave turns 160 times between t = 0 and 1. Nothing in the data does; the network
    averages it away, but not to nothing, and what is left makes the ODE rough: solvers stop converging at 1e-3.
    """
    config, linear = net.config, net.time_embedding.linear_1
    frequencies = time_frequencies(config.block_out_channels[0], config.freq_shift)
    keep = (frequencies <= cutoff).repeat(2).to(linear.weight)  # sines and cosines
    with torch.no_grad():
        linear.weight.mul_(keep)
    linear.weight.register_hook(lambda gradient: gradient * keep)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Linear up, then half a cosine down to 0."""
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def average(averaged: nn.Module, net: nn.Module, step: int, share: float) -> None:
    """An average whose memory grows with the run (2312.02696): it looks back over ``share`` of the steps so far.

    >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> average(a, b, step=0, share=0.1); bool(a.weight == b.weight)
    True
    """
    weight = max(1 / (step + 1), 1 - (1 - 1 / (step + 1)) ** (1 / share))
    for kept, new in zip(averaged.parameters(), net.parameters(), strict=True):
        kept.lerp_(new, min(1.0, weight))


def run(name_or_path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Train by a recipe, write ``<out>/<name>.safetensors`` and its model card, and return the file's path."""
    kind = recipes.raw(name_or_path).get("kind", "denoiser")
    if kind == "classifier":
        from . import classifier

        small = recipes.read(name_or_path, classifier.ClassifierRecipe, overrides)
        return _on_threads(small.threads, lambda: classifier.save(classifier.train(small), Path(small.out)))
    if kind != "denoiser":
        raise ValueError(f"kind must be denoiser or classifier, got {kind!r}")
    recipe = recipes.read(name_or_path, TeacherRecipe, overrides)
    return _on_threads(recipe.threads, lambda: _run(recipe))


def _run(recipe: TeacherRecipe) -> Path:
    from .teacher_card import card, measure

    d, record = train(recipe)
    config = record.pop("config")
    record["metrics"] = measure(d)
    path = Path(recipe.out) / f"{recipe.name}.safetensors"
    save_checkpoint(path, d, config, training=record)
    write_atomically(path.with_suffix(".md"), card(config, record))
    return path


def _on_threads(n: int, work):
    before = torch.get_num_threads()
    torch.set_num_threads(n)  # the sums of convolutions, and so the weights, depend on it
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> int:
    """``fewstep teacher RECIPE [key=value ...]``."""
    parser = argparse.ArgumentParser(
        prog="fewstep teacher", description="Train a small teacher, or the digit classifier, by a recipe."
    )
    parser.add_argument(
        "recipe", help=f"{', '.join(recipes.names('denoiser', 'classifier'))}, or a YAML file"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. steps=500 net.dropout=0.1 out=runs")
    arguments = parser.parse_args(argv)
    try:
        print(run(arguments.recipe, arguments.overrides))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
