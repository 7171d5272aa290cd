"""Students of whole pipelines (Stable Diffusion, SDXL, SD3, Flux, DiT) as such pipelines, with a stock scheduler.

    VP, fresh noise      LCMScheduler, its grid of the student's calls or its times said at the call
    VP, own noise        DDIMScheduler, trailing
    flow                 FlowMatchEulerDiscreteScheduler, stochastic or not: shifted as the pipeline's own call makes it
                         (Flux), stretched so that it does (SD3), or its times said at the call as sigmas

Schedulers are tried in this order, and none is believed: the pipeline is asked what it would pass to ``set_timesteps``,
and the times and the steps that come out are held against the student's table. So what is saved draws the student's own
samples, in as many network calls.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.pipeline import ask
from ..models.pipeline import network as network_of
from .stock import NoStockPipeline, Stock
from .student import Student

PATH_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"
)  # fmt: skip
GUIDANCE_OFF = {"true_cfg_scale": 1.0, "guidance_scale": 1.0}


def stock_pipeline(student: Student) -> Stock:
    """The teacher's pipeline with the student's network and a scheduler that steps as the student does."""
    d = student.d
    if "gamma" not in student.table.options or d.net is None or isinstance(d.net, torch.nn.ModuleList):
        raise NoStockPipeline("its experts take turns, and a pipeline has one network")
    pipe = copy.copy(d.codec.pipe)
    name = next(key for key in ("transformer", "unet") if getattr(pipe, key, None) is network_of(pipe))
    pipe.register_modules(**{name: d.net})
    if d.precond is not None:
        raise NoStockPipeline(
            f"its network is in {d.precond}'s preconditioning, which few-step schedulers lack"
        )
    call = {**d.codec.size, **_guidance(d, pipe)}
    refusals = []
    for scheduler, words in _candidates(student, pipe):
        twin = copy.copy(pipe)
        twin.register_modules(scheduler=scheduler)
        found = Stock(twin, {**call, **words})
        wrong = trouble(student, found)
        if wrong is None:
            return found
        refusals.append(f"{type(scheduler).__name__} {wrong}")
    raise NoStockPipeline(
        f"{'; '.join(refusals)}; its times are {np.round(student.table.times[:-1], 4).tolist()}"
    )


def trouble(student: Student, found: Stock) -> str | None:
    """Why the pipeline called so does not make what the student makes, or None."""
    d, pipe, scheduler = student.d, found.pipeline, found.pipeline.scheduler
    takes = _parameters(pipe)
    subject = (
        {"prompt": ""} if "prompt" in takes else {"class_labels": [0]} if "class_labels" in takes else {}
    )
    if getattr(pipe, "text_encoder", ...) is None and "prompt" in takes:
        raise ValueError("the student's pipeline has no text encoders any more: load its teacher anew")
    try:
        asked = ask(pipe, **subject, **found.call)
        scheduler.set_timesteps(**asked.schedule)
    except (TypeError, ValueError, AttributeError) as error:
        return f"is refused by the pipeline ({error})"
    if asked.null is not None:
        return "would be guided"
    total = 1 if d.path.name != "flow" else scheduler.config.num_train_timesteps
    times = scheduler.timesteps.double().cpu().numpy() / total
    wanted = student.table.times[:-1]
    if len(times) != len(wanted) or not np.allclose(times, wanted, rtol=0, atol=2e-6 * max(wanted)):
        return f"calls the network at {np.round(times, 4).tolist()}"
    opening = float(student.table.a[0, 0, 1].sum())
    if not math.isclose(float(getattr(scheduler, "init_noise_sigma", 1.0)), opening, rel_tol=1e-5):
        return f"starts from noise of {float(scheduler.init_noise_sigma):.6g}, the student from {opening:.6g}"
    return _steps_apart(student, scheduler)


def _steps_apart(student: Student, scheduler: Any) -> str | None:
    """The scheduler's steps on random numbers, beside the table's."""
    d, times = student.d, student.table.times
    fresh = student.table.options["gamma"] == 1.0
    random = torch.Generator().manual_seed(0)
    for k, t in enumerate(scheduler.timesteps):
        x, output = torch.randn(2, 1, 4, 4, 4, generator=random, dtype=torch.float64)
        seed = random.initial_seed() + k + 1
        p, (q,) = d.affine(float(times[k]), "x0")
        x0, sigma = p * x + q * output, d.path.sigma(float(times[k + 1]))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        if not fresh:
            noise = (x - d.path.alpha(float(times[k])) * x0) / d.path.sigma(float(times[k]))
        wanted = d.path.alpha(float(times[k + 1])) * x0 + sigma * noise
        options = {"generator": torch.Generator().manual_seed(seed)}
        made = scheduler.step(output.float(), t, x.float(), **options, return_dict=False)[0]
        apart = float((made - wanted).abs().max() / wanted.abs().max())
        if apart > 1e-4:
            return f"steps elsewhere: by {apart:.1g} of the sample at {float(t):g}"
    return None


def _parameters(pipe: Any) -> list[str]:
    return list(inspect.signature(type(pipe).__call__).parameters)


def _guidance(d: Denoiser, pipe: Any) -> dict[str, float]:
    """The words that switch guidance off, or say the scale that the network is told."""
    takes = _parameters(pipe)
    if d.codec.distilled:
        return {"guidance_scale": float(d.codec.guidance)}
    return {key: value for key, value in GUIDANCE_OFF.items() if key in takes}


# --- schedulers to try --------------------------------------------------------------------------------------------


def _candidates(student: Student, pipe: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(scheduler, words of the call), the plainest first."""
    path, times = student.d.path, [float(t) for t in student.table.times[:-1]]
    if path.name == "flow":
        yield from _flow(student, pipe, times)
    elif path.name == "vp_discrete":
        yield from _vp(student, pipe, times)
    else:
        raise NoStockPipeline(f"its path is {path.name}")


def _vp(student: Student, pipe: Any, times: list[float]) -> Iterator[tuple[Any, dict[str, Any]]]:
    from diffusers import DDIMScheduler, LCMScheduler

    before, calls = pipe.scheduler.config, len(times)
    config = {key: before[key] for key in PATH_KEYS if key in before}
    config |= {"prediction_type": before.get("prediction_type", "epsilon"), "clip_sample": False}
    steps = {"num_inference_steps": calls}
    if student.table.options["gamma"] != 1.0 or calls == 1:
        yield (
            DDIMScheduler(**config, timestep_spacing="trailing", set_alpha_to_one=True, steps_offset=1),
            steps,
        )
    if student.table.options["gamma"] == 1.0 or calls == 1:
        total = int(config.get("num_train_timesteps", 1000))
        for original in (calls, total):
            yield LCMScheduler(**config, original_inference_steps=original), steps
        if all(t == int(t) for t in times) and "timesteps" in _parameters(pipe):
            yield (
                LCMScheduler(**config, original_inference_steps=total),
                {"timesteps": [int(t) for t in times]},
            )


def _flow(student: Student, pipe: Any, times: list[float]) -> Iterator[tuple[Any, dict[str, Any]]]:
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    calls, shift = len(times), float(getattr(student.d.path, "shift", 1.0))
    total = int(pipe.scheduler.config.get("num_train_timesteps", 1000))
    fresh = {"stochastic_sampling": student.table.options["gamma"] == 1.0, "num_train_timesteps": total}
    steps = {"num_inference_steps": calls}
    yield Euler(shift=shift, **fresh), steps
    if calls > 1:
        own, end = stretched(shift, calls, total)
        yield Euler(shift=own, shift_terminal=end, **fresh), steps
    if "sigmas" in _parameters(pipe):
        yield Euler(shift=1.0, **fresh), {**steps, "sigmas": times}


def stretched(shift: float, calls: int, total: int = 1000) -> tuple[float, float]:
    """(shift, shift_terminal) by which FlowMatchEuler's own n steps are  t_i = S u / (1 + (S - 1) u),  u = 1 - i / n.

    It spreads n times evenly from 1 down to its last, m = s d / (1 + (s - 1) d) with d = 1 / total, shifts these by s
    and stretches 1 - t so that the last is shift_terminal. With r = (S - 1)(n - 1) / (n S), equal grids are roots of

        r d s^2 - (1 - r) (1 - d) s + (1 - d) = 0,        shift_terminal = S / (S + n - 1)

    >>> [round(v, 3) for v in stretched(3.0, 4)], stretched(1.0, 4)
    ([2.004, 0.5], (1.0, 0.25))
    """
    r, d = (shift - 1) * (calls - 1) / (calls * shift), 1 / total
    half, rest = (1 - r) * (1 - d), 1 - d
    # the smaller root, written so that r = 0 divides by nothing
    own = 2 * rest / (half + math.sqrt(half * half - 4 * r * d * rest))
    return own, shift / (shift + calls - 1)
