"""DDIM run backwards: the noise of a sample is the network's own, not drawn.

    x' = (alpha' / alpha) x + (sigma' - (alpha' / alpha) sigma) eps(x, t)

Exact inversion of a DDIM step would ask the network at the end of the step, eps(x', t'), which is not known yet.
Re-noising (ReNoise, 2403.14602; SmPO, 2506.02698) estimates x', asks there, and takes the mean of the answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ...models.denoiser import Denoiser
from ...models.paths import Times, coefficient

Told = Literal["now", "then"]


@torch.no_grad()
def invert(
    d: Denoiser,
    x: torch.Tensor,
    times: torch.Tensor,
    refine: int = 0,
    told: Told = "now",
    eta: float = 0.0,
    noise: Callable[[int], torch.Tensor] | None = None,
    **cond: Any,
) -> torch.Tensor:
    """x_t of samples x (B, ...), through ``times`` (n,), or (n, B) for a grid a sample, rising from near 0 to t.

    Args:
        refine: so many estimates of the step's end are asked again; the step is made with the mean of all answers.
        told: the time that the first call is told: of where it is (``now``, Euler's method; refined once, Heun's), or
            of where it goes to (``then``: diffusers' inverse scheduler, and with it InPO's code and SmPO's).
        eta: ``noise(k)`` is added after step k with eta times the standard deviation that DDPM's step back has; InPO's
            code adds it with that of the next step. What is added makes the latents noisier than their level.

    >>> from fewstep.models import GaussianMixture, paths
    >>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
    >>> invert(d, torch.ones(1, 1), torch.linspace(0.01, 1.0, 41))             # the ODE's: sqrt(2)
    tensor([[1.4031]])
    """
    path = d.path
    if told not in ("now", "then"):
        raise ValueError(f"told must be 'now' or 'then', got {told!r}")
    if eta and noise is None:
        raise ValueError(f"eta = {eta} needs noise, a function from a step's number to standard normals")
    levels: list[Times] = list(times.unbind()) if times.ndim > 1 else [float(t) for t in times]
    if len(levels) < 2 or (times.ndim == 1 and sorted(levels) != levels):
        raise ValueError(f"times must rise and be two or more, got {levels}")
    x = coefficient(path.alpha(levels[0]), x) * x
    for k, (now, then) in enumerate(zip(levels, levels[1:], strict=False)):
        ratio = path.alpha(then) / path.alpha(now)
        along, across = coefficient(ratio, x), coefficient(path.sigma(then) - ratio * path.sigma(now), x)
        eps = d.eps(x, now if told == "now" else then, **cond)
        for asked in range(1, refine + 1):
            eps = (asked * eps + d.eps(along * x + across * eps, then, **cond)) / (asked + 1)
        x = along * x + across * eps
        if eta and noise is not None:
            x = x + coefficient(eta * _step_back(path, now, then), x) * noise(k)
    return x


def _step_back(path: Any, now: Times, then: Times) -> Times:
    """The standard deviation of x_now given x_then and x0."""
    ratio = path.alpha(then) / path.alpha(now)
    fresh = (path.sigma(then) ** 2 - (ratio * path.sigma(now)) ** 2) ** 0.5
    return path.sigma(now) / path.sigma(then) * fresh
