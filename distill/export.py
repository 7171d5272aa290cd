"""``fewstep export RUN OUT``: a student as a folder that diffusers alone runs, or the reason why none can.

    fewstep export runs/dmd2-digits student/
    DiffusionPipeline.from_pretrained("student/")(num_inference_steps=1, ...)        # the call stands in its README.md

A scheduler of diffusers has a grid of its own, so a student fits where its times can be put on that grid:

    EDM                      ConsistencyModelPipeline + CMStochasticIterativeScheduler with sigma_min = 0
    VP with classes          ConsistencyModelPipeline + LCMScheduler, betas made to hit the student's alphas
    VP without               DDPMPipeline + LCMScheduler
    flow without classes     DDPMPipeline + FlowMatchEulerDiscreteScheduler, stochastic or not
    flow with classes        one call: ConsistencyModelPipeline, the change of scale in the first and the last weights
    of a whole pipeline      that pipeline, see ``stock_pipelines``

The network sees as many times as there are calls. What they are to it, with the gap of an average velocity, is written
into the weights of its time embedding (``bake_times``), so its clock need not be diffusers'. Everything else stays what
it is, a checkpoint of ours with a table: ``fewstep sample`` runs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..eval.files import written_aside
from ..models.denoiser import Denoiser
from ..models.jumps import Jumps
from ..models.unet import UNet, time_features
from .card import model_card
from .opening import DTYPES
from .stock import NoStockPipeline, Stock
from .stock_pipelines import stock_pipeline
from .student import Student

TRAIN_STEPS = 1000
FINE_STEPS = 1_000_000  # of a grid on which any time lies to 1e-5 of itself


def stock(student: Student) -> Stock:
    """The diffusers pipeline that runs a student; ``NoStockPipeline`` where there is none."""
    if getattr(student.d.codec, "pipe", None) is not None:
        return stock_pipeline(student)
    d, times = student.d, [float(t) for t in student.table.times[:-1]]
    if not isinstance(d.net, UNet):
        raise NoStockPipeline(
            f"its network is a {type(d.net).__name__}, and only a U-Net is diffusers' as it stands"
        )
    if student.table.solver != "consistency":
        raise NoStockPipeline(
            f"it is its teacher tuned, sampled by {student.table.solver} and not in few steps of its own"
        )
    fresh = student.table.options.get("gamma", 1.0) == 1.0 or len(times) == 1
    if d.path.name == "flow":
        return _flow(d, times, fresh)
    if not fresh:
        raise NoStockPipeline(
            "it keeps its noise between steps (sampler: ode); stock few-step schedulers draw fresh"
        )
    return _edm(d, times) if d.path.name == "edm" else _vp(d, times)


def _edm(d: Denoiser, times: list[float]) -> Stock:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    if d.precond != "edm":
        raise NoStockPipeline(f"it predicts {d.predicts} on the EDM path without EDM's preconditioning")
    total = 40 if len(times) == 1 else FINE_STEPS
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=total,
        sigma_min=0.0,
        sigma_max=times[0],
        sigma_data=d.sigma_data,
        clip_denoised=False,
    )
    if len(times) == 1:
        arguments: dict[str, Any] = {"num_inference_steps": 1}
    else:  # sigma = sigma_max (1 - place / (total - 1))^rho
        shares = 1 - (np.asarray(times) / times[0]) ** (1 / scheduler.config.rho)
        places = np.rint(shares * (total - 1)).astype(int).tolist()
        arguments = {"num_inference_steps": None, "timesteps": places[::-1]}
    scheduler.set_timesteps(**arguments)
    unet = bake_times(d, times, scheduler.timesteps.tolist())
    return Stock(ConsistencyModelPipeline(unet=unet, scheduler=scheduler), arguments)


def _vp(d: Denoiser, times: list[float]) -> Stock:
    from diffusers import ConsistencyModelPipeline, DDPMPipeline, LCMScheduler

    kinds = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    if d.predicts not in kinds or d.precond is not None:
        raise NoStockPipeline(f"it predicts {d.predicts}, which LCMScheduler does not know")
    calls = len(times)
    asked = (np.arange(calls, 0, -1) * (TRAIN_STEPS // calls) - 1).tolist()  # 999, 749, 499, 249
    scheduler = LCMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        trained_betas=betas_through(asked, [d.path.alpha(t) ** 2 for t in times]),
        original_inference_steps=calls,
        prediction_type=kinds[d.predicts],
        clip_sample=False,
    )
    unet = _on_clock(d, times, asked)
    arguments = {"num_inference_steps": calls}
    if d.net.null_label is None:
        return Stock(DDPMPipeline(unet=unet, scheduler=scheduler), arguments)
    return Stock(ConsistencyModelPipeline(unet=unet, scheduler=scheduler), arguments)


def _flow(d: Denoiser, times: list[float], fresh: bool) -> Stock:
    from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler

    if d.predicts != "flow":
        raise NoStockPipeline(
            f"it predicts {d.predicts} on a flow path, and FlowMatchEuler knows velocities only"
        )
    calls = len(times)
    if d.net.null_label is not None:
        if times == [1.0]:
            return _flow_at_once(d)
        raise NoStockPipeline(
            f"it is a class-conditional flow over pixels of {calls} calls, which no pipeline of diffusers is"
        )
    own = [1 - k / calls for k in range(calls)]
    if not np.allclose(times, own, atol=1e-6):
        raise NoStockPipeline(f"its times {times} are not FlowMatchEuler's {own}")
    options = {} if calls == 1 else {"shift_terminal": 1 / calls}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=fresh, **options)
    unet = _on_clock(d, times, [TRAIN_STEPS * t for t in times])
    return Stock(DDPMPipeline(unet=unet, scheduler=scheduler), {"num_inference_steps": calls})


def _flow_at_once(d: Denoiser) -> Stock:
    """x0 = x - u as the consistency step c_skip (sigma x) + c_out F(c_in sigma x): with sigma = sigma_data = 2, c_skip
    sigma is 1, and c_in sigma and c_out are powers of sqrt(2), which the first and the last layer take up."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=0.0, sigma_max=2.0, sigma_data=2.0, clip_denoised=False
    )
    unet = bake_times(d, [1.0], [0.0])
    with torch.no_grad():
        unet.conv_in.weight.mul_(2**0.5)
        for p in unet.conv_out.parameters():
            p.mul_(-(0.5**0.5))
    return Stock(ConsistencyModelPipeline(unet=unet, scheduler=scheduler), {"num_inference_steps": 1})


def _on_clock(d: Denoiser, times: list[float], asked: Sequence[float]):
    if isinstance(d, Jumps) or not np.allclose([clock(d, t) for t in times], asked, atol=1e-3):
        return bake_times(d, times, asked)
    return d.net.to_diffusers().eval()


def clock(d: Denoiser, t: float) -> float:
    """The number that the network is given at time t."""
    return float(d._network_time(torch.zeros(1, *d.shape), t)[0])


@torch.no_grad()
def bake_times(d: Denoiser, times: Sequence[float], asked: Sequence[float]):
    """d's network as a ``UNet2DModel`` that answers as at ``times`` when it is told ``asked``, whatever its own clock.

    The last layer of the time's MLP is replaced by the affine map that takes what the first makes of ``asked`` to the
    embeddings of ``times``: a constant for one time, and exact for fewer than the layer is wide.
    """
    net, config = d.net, d.net.config
    single = UNet({**config.to_dict(), "second_time": False}).to(next(net.parameters()).device)
    single.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("gap_embedding.")})
    twin = single.to_diffusers().eval()

    def features(tau: Sequence[float]) -> torch.Tensor:
        values = torch.tensor(tau, device=net.conv_in.weight.device)
        return time_features(values, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)

    wanted = net.time_embedding(features([clock(d, t) for t in times]))
    if isinstance(d, Jumps):
        wanted = wanted + net.gap_embedding(d.gap(wanted, torch.tensor(times)))
    first, last = twin.time_embedding.linear_1, twin.time_embedding.linear_2
    hidden = torch.nn.functional.silu(first(features(asked))).double()
    wanted = wanted.double()
    weight = (
        torch.linalg.lstsq(hidden[1:] - hidden[:1], wanted[1:] - wanted[:1], driver="gelsd").solution.T
        if len(times) > 1
        else torch.zeros_like(last.weight)
    )
    last.weight.copy_(weight)
    last.bias.copy_(wanted[0] - last.weight.double() @ hidden[0])
    off = float((last(hidden.float()) - wanted).abs().max() / wanted.abs().max())
    if off > 1e-4:
        raise NoStockPipeline(
            f"its {len(times)} times cannot be told apart by diffusers' clock {list(asked)}"
        )
    return twin


def betas_through(
    steps: Sequence[int], alphas_squared: Sequence[float], total: int = TRAIN_STEPS
) -> list[float]:
    """Betas whose cumulative products of 1 - beta are ``alphas_squared`` at ``steps`` (falling), log-linear between.

    >>> betas = betas_through([9, 4], [0.01, 0.25], total=10)
    >>> products = np.cumprod(1 - np.asarray(betas))
    >>> products[[9, 4]].round(12).tolist()
    [0.01, 0.25]
    """
    places = [-1, *reversed(list(steps))]
    logs = [0.0, *np.log(np.asarray(list(reversed(list(alphas_squared)))))]
    log_products = np.interp(np.arange(total), places, logs)
    return (-np.expm1(np.diff(log_products, prepend=0.0))).tolist()


def save(student: Student, out: Path, name: str, record: dict[str, str], dtype: str = "fp32") -> Stock:
    """Write the stock pipeline and its card as a folder that appears whole; ``dtype``: what weights are stored in."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    found = stock(student)
    if DTYPES[dtype] is not None:
        found.pipeline.to(DTYPES[dtype])
    with written_aside(out) as aside:
        found.pipeline.save_pretrained(aside, safe_serialization=True)
        (aside / "README.md").write_text(card(student, found, name, record))
    return found


def card(student: Student, found: Stock, name: str, record: dict[str, str]) -> str:
    """The model card: what it is, how it is called, what it was measured to be."""
    arguments = dict(found.call)
    classes = getattr(student.d.net, "null_label", None)
    if classes is not None:
        arguments |= {"class_labels": list(range(classes)), "batch_size": classes}
    elif student.d.codec is not None and student.d.codec.null is not None:
        arguments["class_labels"] = [0]
    spoken = ", ".join(f"{k}={v}" for k, v in arguments.items())
    if getattr(student.d.codec, "takes_text", False):
        spoken = f'"a fox", {spoken}'
    head = f"---\nlibrary_name: diffusers\nbase_model_relation: finetune\ntags: [few-step, distillation]\n---\n\n"  # noqa: F541
    call = f'```python\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("PATH")\nimages = pipe({spoken}).images\n```'  # noqa: E501
    rows = {
        "calls": str(student.calls),
        "times": ", ".join(f"{t:.4g}" for t in student.table.times[:-1]),
        **record,
    }
    return head + model_card(name, f"A student of {student.calls} network calls a sample.\n\n{call}", rows)


def main(argv: Sequence[str] | None = None) -> int:
    """``fewstep export RUN OUT``."""
    from .saved import open_student

    parser = argparse.ArgumentParser(
        prog="fewstep export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, runs/NAME")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--dtype", default="fp32", help="what weights are stored in: fp32, bf16 or fp16")
    arguments = parser.parse_args(argv)
    student, recipe, numbers = open_student(arguments.run)
    if arguments.out.exists():
        raise FileExistsError(f"{arguments.out} is there already; name a new folder")
    record = {
        "teacher": recipe.teacher.path,
        "method": recipe.method["name"],
        "iterations": str(recipe.train.iters),
    }
    record |= {k: f"{v:.4g}" for k, v in numbers.items() if k.startswith(("teacher_", "data_"))}
    try:
        found = save(student, arguments.out, recipe.name, record, arguments.dtype)
    except NoStockPipeline as reason:
        files = f"{arguments.run / 'student.safetensors'} --table {arguments.run / 'table.json'}"
        print(f"no pipeline of diffusers runs {arguments.run}: {reason}.")
        if student.d.config is None:
            files = f"its weights are {arguments.run / 'student.safetensors'}, distill.saved.open_student reads them"
        else:
            files = f"fewstep sample {files}"
        print(f"It stays a fewstep checkpoint: {files}")
        return 1
    kind = type(found.pipeline).__name__
    print(
        f"{arguments.out}: a {kind} of {student.calls} call{'s' if student.calls > 1 else ''}, for diffusers alone"
    )
    return 0
