"""Time grids: n steps are n + 1 times, from the path's noisy end to sigma = 0 exactly.

A grid is a choice of what to be uniform in. Where the last point sigma = 0 is at a finite place there (t, powers of t) the n
steps are uniform down to it; where it is not (log-SNR, Karras) n times are spread down to ``t_min`` and the clean end
follows. With ``end="t_min"`` the grid stops at ``t_min`` instead.

    >>> from fewstep.models import paths
    >>> uniform(paths.flow(), 4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> karras(paths.edm(), 3).round(3).tolist()
    [80.0, 2.515, 0.002, 0.0]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..models.paths import Path


def _spread(path: Path, n: int, forward: Callable, backward: Callable, t_max: float | None, t_min: float | None, end: str) -> np.ndarray:
    """Uniform in forward(t); ``backward`` is its inverse. The end points are put in as given, not through the inverse."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"n, the number of steps, must be a positive integer, got {n!r}")
    if end not in ("clean", "t_min"):
        raise ValueError(f"end must be 'clean' (sigma = 0) or 't_min', got {end!r}")
    first = path.t_max if t_max is None else float(t_max)
    to_zero = end == "clean" and t_min is None and np.isfinite(forward(path.t_clean))
    last = path.t_clean if to_zero else (path.t_min if t_min is None else float(t_min))
    if not path.t_clean <= last < first <= path.t_max:
        raise ValueError(f"t_max and t_min must satisfy {path.t_clean:g} <= t_min < t_max <= {path.t_max:g}, got {first:g} and {last:g}")
    count = n + 1 if to_zero or end == "t_min" else n
    start = forward(first)
    if not np.isfinite(start):  # lam at alpha = 0: begin as far from the middle as the other end lies
        start = -forward(last)
    times = backward(np.linspace(start, forward(last), count))
    times[0] = first
    if count > 1:
        times[-1] = last
    return times if count == n + 1 else np.append(times, path.t_clean)


def uniform(path: Path, n: int, t_max: float | None = None, t_min: float | None = None, end: str = "clean") -> np.ndarray:
    """Uniform in t."""
    return _spread(path, n, lambda t: t, lambda u: u, t_max, t_min, end)


def power(path: Path, n: int, exponent: float = 2.0, t_max: float | None = None, t_min: float | None = None, end: str = "clean") -> np.ndarray:
    """Uniform in t^(1/exponent): dense near the data."""
    if not exponent > 0:
        raise ValueError(f"exponent must be positive, got {exponent!r}")
    zero = path.t_clean
    return _spread(path, n, lambda t: (t - zero) ** (1 / exponent), lambda u: zero + u**exponent, t_max, t_min, end)


def quadratic(path: Path, n: int, t_max: float | None = None, t_min: float | None = None, end: str = "clean") -> np.ndarray:
    """Uniform in sqrt(t), DEIS' usual grid."""
    return power(path, n, 2.0, t_max, t_min, end)


def logsnr(path: Path, n: int, t_max: float | None = None, t_min: float | None = None, end: str = "clean") -> np.ndarray:
    """Uniform in log-SNR, DPM-Solver's usual grid."""
    return _spread(path, n, path.lam, path.time, t_max, t_min, end)


def karras(path: Path, n: int, exponent: float = 7.0, t_max: float | None = None, t_min: float | None = None, end: str = "clean") -> np.ndarray:
    """Uniform in rho^(1/exponent) (2206.00364); finite paths' ends only, so a flow starts just below t = 1."""
    if not exponent > 0:
        raise ValueError(f"exponent must be positive, got {exponent!r}")
    t_min = path.t_min if t_min is None else t_min

    def forward(t):
        rho = path.rho(t)
        return rho ** (1 / exponent) if np.isfinite(rho) else path.rho(1 - 1e-3) ** (1 / exponent)

    return _spread(path, n, forward, lambda u: path.time_of_rho(u**exponent), t_max, t_min, end)
