"""Running diffusers' schedulers on a Denoiser, so that they stand beside our solvers on equal terms.

    >>> from fewstep.models import GaussianMixture, paths
    >>> d = GaussianMixture([1.0], [[2.0]], 0.25).denoiser(paths.edm())
    >>> run(make("DPMSolverMultistepScheduler"), d, torch.ones(1, 1, dtype=torch.float64), 10).calls
    10

They get the benefit of every doubt. The network is asked at the noise level that the scheduler computes with,
not at the rounded timestep that it would hand to a pipeline. A run opens with that level's share of the noise,
exactly. Where the class allows it the arithmetic is float64. And as the ODE is the same on every path, a class
that knows only one path runs on any.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.paths import vp_linear
from ..samplers.theirs import INDEXED, grid_of, kind_of, prepare

__all__ = ["betas_between", "grid_of", "level", "make", "prepare", "run", "steps_for"]

VE = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "EDMEuler")


class Run(NamedTuple):
    """What a scheduler made, how often it asked the network, and at which noise levels (alpha, sigma) of its state."""

    x: torch.Tensor
    calls: int
    levels: list[tuple[float, float]]


def make(name: str, **options: Any) -> Any:
    """diffusers' scheduler class of this name, with these options; no clipping unless they say so."""
    from diffusers import schedulers

    kind = getattr(schedulers, name)
    known = inspect.signature(kind.__init__).parameters
    plain = {"clip_sample": False, "thresholding": False}
    return kind(**{key: value for key, value in plain.items() if key in known} | options)


def betas_between(rho_min: float, rho_max: float, count: int = 1000) -> np.ndarray:
    """Betas of a DDPM whose sigma / alpha runs from ``rho_min`` to ``rho_max``, uniform on the linear VP path.

    >>> betas = betas_between(0.002, 80.0); abar = np.cumprod(1 - betas)
    >>> [float(np.sqrt((1 - a) / a).round(6)) for a in (abar[0], abar[-1])]
    [0.002, 80.0]
    """
    path = vp_linear()
    t = np.linspace(path.time_of_rho(rho_min), path.time_of_rho(rho_max), count)
    abar = path.alpha(t) ** 2
    return 1.0 - abar / np.append(1.0, abar[:-1])


def steps_for(scheduler: Any, calls: int) -> int | None:
    """The most steps with which the scheduler asks the network ``calls`` times at most; None: there is none."""
    for steps in range(calls, 0, -1):
        try:
            scheduler.set_timesteps(steps)
        except (IndexError, ValueError, ZeroDivisionError):
            continue
        if len(scheduler.timesteps) <= calls:
            return steps
    return None


def level(scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    """(alpha, sigma) of the state that the scheduler now holds, as it believes them to be."""
    kind = kind_of(scheduler)
    if kind in INDEXED:
        abar = float(scheduler.alphas_cumprod[int(timestep)])
        return abar**0.5, (1 - abar) ** 0.5
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    sigmas = scheduler.sigmas
    if kind.startswith("KDPM2") and not scheduler.state_in_first_order:
        sigmas = scheduler.sigmas_interpol
    sigma = sigmas[scheduler.step_index]
    if kind.startswith("FlowMatch"):
        return 1.0 - float(sigma), float(sigma)
    if kind in VE:
        return 1.0, float(sigma)
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
    return float(alpha), float(sigma)


def _estimate(
    d: Denoiser, x: torch.Tensor, alpha: float, sigma: float, cond: Mapping[str, Any]
) -> torch.Tensor:
    """The denoiser's x0 for a state of another path: both are the same noise, scaled."""
    path = d.path
    t = (
        path.t_max
        if alpha == 0
        else float(np.clip(path.time_of_rho(sigma / alpha), path.t_clean, path.t_max))
    )
    scale = path.sigma(t) / sigma if sigma > alpha else path.alpha(t) / alpha
    return d(scale * x, t, **cond)


def _output(scheduler: Any, x: torch.Tensor, x0: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """What a network with this estimate of x0 would have answered, as the scheduler wants it."""
    kind = kind_of(scheduler)
    if kind.startswith("EDM"):
        s = scheduler.config.sigma_data
        total = sigma**2 + s**2
        return (x0 - s**2 / total * x) * (total**0.5 / (sigma * s))
    predicts = "flow_prediction" if kind.startswith("FlowMatch") else scheduler.config.prediction_type
    if predicts == "sample":
        return x0
    if predicts == "flow_prediction":
        return (x - x0) / sigma
    if predicts == "epsilon":
        return (x - alpha * x0) / sigma
    raise ValueError(f"prediction_type must be epsilon, sample or flow_prediction here, got {predicts!r}")


def run(
    scheduler: Any,
    d: Denoiser,
    noise: torch.Tensor,
    steps: int,
    cond: Mapping[str, Any] | None = None,
    **step_options: Any,
) -> Run:
    """The scheduler's result from unit ``noise`` (B, ...), in units of the data.

    ``step_options`` go to every ``scheduler.step``, e.g. ``eta`` or a generator; a callable is asked at every call.
    """
    prepare(scheduler, steps)
    x, calls, levels = None, 0, []
    with torch.no_grad():
        for t in scheduler.timesteps:
            alpha, sigma = level(scheduler, t)
            x = sigma * noise if x is None else x
            if hasattr(scheduler, "is_scale_input_called"):
                scheduler.scale_model_input(x, t)
            output = _output(scheduler, x, _estimate(d, x, alpha, sigma, cond or {}), alpha, sigma)
            options = {key: value() if callable(value) else value for key, value in step_options.items()}
            x = scheduler.step(output, t, x, return_dict=False, **options)[0]
            calls += 1
            levels.append((alpha, sigma))
    if x is None:
        raise ValueError("steps must leave the scheduler at least one timestep")
    return Run(x, calls, levels)
