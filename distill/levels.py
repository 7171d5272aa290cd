"""How training draws noise levels: a law of t by its quantile function, so u = 1/4 is a level a quarter of the way.

>>> path = paths.edm()
>>> [round(float(time_at(Times("karras"), path, torch.tensor(u, dtype=torch.float64))), 3) for u in (0.0, 0.5, 1.0)]
[0.002, 2.515, 80.0]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..models import paths

KINDS = ("uniform", "karras", "lognormal", "logit_normal", "logistic")


@dataclass
class Times:
    """A law of t, between the quantiles ``low`` and ``high`` of it.

    ``uniform``: t uniform between the path's t_min and t_max, then shifted where a flow says so. ``karras``: the noise
    level's seventh root uniform (2206.00364); on a flow the level is t. ``lognormal``: log rho normal (EDM).
    ``logit_normal``: logit t normal (2403.03206). ``logistic``: log rho logistic, of ``mean`` and scale ``std``; at
    scale 1 the t = sigma / (alpha + sigma) of a flow that is as noisy is uniform, shifted by e^mean, whatever the
    path.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0


def time_at(times: Times, path: paths.Path, share: torch.Tensor, above: float | None = None) -> torch.Tensor:
    """The time at quantile ``share`` in [0, 1] of the law, float64; rising in share.

    ``above`` puts the law of ``uniform`` and ``karras`` on the times from there to t_max, for a phase that ends there.
    """
    least = path.t_min if above is None else above
    if not 0 <= times.low < times.high <= 1:
        raise ValueError(
            f"times.low and times.high must be 0 <= low < high <= 1, got {times.low} and {times.high}"
        )
    share = times.low + (times.high - times.low) * share.double()
    if times.kind == "uniform":
        if above is None:
            return shifted(path, least + share * (path.t_max - least))
        t = least + share * (path.t_max - least)
    elif times.kind == "karras":
        level, back = (path.rho, path.time_of_rho) if path.name != "flow" else (lambda t: t, lambda t: t)
        first, last = float(level(least)) ** (1 / 7), float(level(path.t_max)) ** (1 / 7)
        t = back((first + share * (last - first)) ** 7)
    elif times.kind == "logistic" and above is None:
        t = path.time(-times.mean - times.std * torch.logit(share.clamp(1e-6, 1 - 1e-6)))
    elif times.kind in ("lognormal", "logit_normal") and above is None:
        share = share.clamp(1e-6, 1 - 1e-6)
        normal = times.mean + times.std * math.sqrt(2) * torch.erfinv(2 * share - 1)
        t = path.time(-normal) if times.kind == "lognormal" else normal.sigmoid() * path.t_max
    else:
        known = KINDS if above is None else KINDS[:2]
        raise ValueError(f"times.kind must be one of {', '.join(known)} here, got {times.kind!r}")
    return t.clamp(least, path.t_max)


def shifted(path: paths.Path, t: torch.Tensor) -> torch.Tensor:
    """t' = s t / (1 + (s - 1) t) on a flow with shift s; t itself on any other path."""
    shift = getattr(path, "shift", 1.0)
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def draw_times(times: Times, path: paths.Path, n: int, random: torch.Generator) -> torch.Tensor:
    """n times, one from each n-th of the distribution, in random order: less noise in the gradient for nothing."""
    shares = (torch.randperm(n, generator=random) + torch.rand(n, generator=random, dtype=torch.float64)) / n
    return time_at(times, path, shares.clamp(1e-6, 1 - 1e-6))
