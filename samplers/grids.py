"""Time grids: n steps are n + 1 times, from the path's noisy end to sigma = 0 exactly.

A grid is a choice of what to be uniform in. Where the last point sigma = 0 is at a finite place there (t, powers
of t) the n steps are uniform down to it; where it is not (log-SNR, Karras) n times are spread down to ``t_min`` and
the clean end follows. With ``end="t_min"`` the grid stops at ``t_min`` instead.

Karras, exponential and beta grids spread the noise level: rho = sigma/alpha, but t itself on a flow, where rho is
infinite at the noisy end (as diffusers has it).

    >>> from fewstep.models import paths
    >>> uniform(paths.flow(), 4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> karras(paths.edm(), 3).round(3).tolist()
    [80.0, 2.515, 0.002, 0.0]
    >>> shifted(paths.flow(shift=3.0), 4).tolist()
    [1.0, 0.9, 0.75, 0.5, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..models.paths import Path, VPDiscrete
from .beta_quantile import beta_quantile
from .quadrature import vp_lam, vp_time

NAMES = (
    "uniform",
    "power",
    "quadratic",
    "vp",
    "logsnr",
    "karras",
    "exponential",
    "beta",
    "shifted",
    "linspace",
    "leading",
    "trailing",
)


def _check_steps(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"n, the number of steps, must be a positive integer, got {n!r}")


def _falling(times: np.ndarray) -> np.ndarray:
    """The grid, if rounding or crowding has left its times apart."""
    if (np.diff(times) >= 0).any():
        step = int(np.flatnonzero(np.diff(times) >= 0)[0])
        raise ValueError(
            f"n = {len(times) - 1} steps are too many here: times {step} and {step + 1} are both {times[step]:g}"
        )
    return times


def _spread(
    path: Path,
    n: int,
    forward: Callable,
    backward: Callable,
    t_max: float | None,
    t_min: float | None,
    end: str,
    to_zero: bool = True,
    fractions: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
    """Uniform in forward(t); ``backward`` is its inverse. The end points are put in as given, not through the inverse.

    ``fractions(count)``, from 0 to 1, may say where the points lie between the first and the last instead.
    """
    _check_steps(n)
    if end not in ("clean", "t_min"):
        raise ValueError(f"end must be 'clean' (sigma = 0) or 't_min', got {end!r}")
    first = path.t_max if t_max is None else float(t_max)
    to_zero = to_zero and end == "clean" and t_min is None and bool(np.isfinite(forward(path.t_clean)))
    last = path.t_clean if to_zero else (path.t_min if t_min is None else float(t_min))
    if not path.t_clean <= last < first <= path.t_max:
        raise ValueError(
            f"t_max and t_min must satisfy {path.t_clean:g} <= t_min < t_max <= {path.t_max:g}, "
            f"got {first:g} and {last:g}"
        )
    count = n + 1 if to_zero or end == "t_min" else n
    start, stop = forward(first), forward(last)
    if not np.isfinite(stop):
        raise ValueError(
            f"t_min must lie above {path.t_clean:g} on this grid: sigma = 0 has no place on it and follows by itself"
        )
    if not np.isfinite(start):  # lam at alpha = 0: begin as far from the middle as the other end lies
        start = -stop
    share = np.linspace(0.0, 1.0, count) if fractions is None else fractions(count)
    times = backward(start + (stop - start) * share)
    times[0] = first
    if count > 1:
        times[-1] = last
    return _falling(times if count == n + 1 or last == path.t_clean else np.append(times, path.t_clean))


def _level(path: Path) -> tuple[Callable, Callable]:
    """The noise level and its inverse: rho, or t on a flow (and on edm, where t is rho)."""
    if path.name in ("flow", "edm"):
        return (lambda t: t), (lambda u: u)
    return path.rho, path.time_of_rho


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float, np.number)) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def uniform(
    path: Path, n: int, t_max: float | None = None, t_min: float | None = None, end: str = "clean"
) -> np.ndarray:
    """Uniform in t."""
    return _spread(path, n, lambda t: t, lambda u: u, t_max, t_min, end)


def power(
    path: Path,
    n: int,
    exponent: float = 2.0,
    t_max: float | None = None,
    t_min: float | None = None,
    end: str = "clean",
) -> np.ndarray:
    """Uniform in t^(1/exponent): dense near the data."""
    _positive("exponent", exponent)
    zero = path.t_clean
    return _spread(
        path, n, lambda t: (t - zero) ** (1 / exponent), lambda u: zero + u**exponent, t_max, t_min, end
    )


def quadratic(
    path: Path, n: int, t_max: float | None = None, t_min: float | None = None, end: str = "clean"
) -> np.ndarray:
    """Uniform in sqrt(t), DEIS' usual grid."""
    return power(path, n, 2.0, t_max, t_min, end)


def vp(
    path: Path,
    n: int,
    exponent: float = 2.0,
    t_max: float | None = None,
    t_min: float | None = None,
    end: str = "clean",
) -> np.ndarray:
    """Uniform in u^(1/exponent), u the linear VP path's time at the same log-SNR: one grid for every path.

    A flow's t = 1 has no such time; there the first step ends where u's spread from 1 puts it.

    >>> from fewstep.models import paths
    >>> vp(paths.flow(), 3).round(3).tolist()
    [1.0, 0.718, 0.275, 0.0]
    """
    _positive("exponent", exponent)

    def forward(t):
        u = vp_time(np.float64(path.lam(t)))
        return float(u if np.isfinite(u) else 1.0) ** (1 / exponent)

    return _spread(path, n, forward, lambda r: path.time(vp_lam(r**exponent)), t_max, t_min, end)


def logsnr(
    path: Path, n: int, t_max: float | None = None, t_min: float | None = None, end: str = "clean"
) -> np.ndarray:
    """Uniform in log-SNR, DPM-Solver's usual grid."""
    return _spread(path, n, path.lam, path.time, t_max, t_min, end)


def karras(
    path: Path,
    n: int,
    exponent: float = 7.0,
    t_max: float | None = None,
    t_min: float | None = None,
    end: str = "clean",
) -> np.ndarray:
    """Uniform in level^(1/exponent) (2206.00364)."""
    _positive("exponent", exponent)
    level, inverse = _level(path)
    return _spread(
        path,
        n,
        lambda t: level(t) ** (1 / exponent),
        lambda u: inverse(u**exponent),
        t_max,
        t_min,
        end,
        to_zero=False,
    )


def exponential(
    path: Path, n: int, t_max: float | None = None, t_min: float | None = None, end: str = "clean"
) -> np.ndarray:
    """Uniform in the level's logarithm: log-SNR's grid, except on a flow, where it is log t."""
    level, inverse = _level(path)
    with np.errstate(divide="ignore"):
        return _spread(
            path,
            n,
            lambda t: np.log(level(t)),
            lambda u: inverse(np.exp(u)),
            t_max,
            t_min,
            end,
            to_zero=False,
        )


def beta(
    path: Path,
    n: int,
    a: float = 0.6,
    b: float = 0.6,
    t_max: float | None = None,
    t_min: float | None = None,
    end: str = "clean",
) -> np.ndarray:
    """Levels at uniform quantiles of a Beta(a, b) law (2407.12173): dense at both ends for a, b < 1."""
    level, inverse = _level(path)

    def fractions(count: int) -> np.ndarray:
        return 1.0 - beta_quantile(np.linspace(1.0, 0.0, count), a, b)

    return _spread(path, n, level, inverse, t_max, t_min, end, to_zero=False, fractions=fractions)


def shifted(
    path: Path,
    n: int,
    shift: float | None = None,
    t_max: float | None = None,
    t_min: float | None = None,
    end: str = "clean",
) -> np.ndarray:
    """t' = s u / (1 + (s - 1) u), u uniform (2403.03206): the flow's ``shift`` s > 1 stays longer at high noise."""
    s = getattr(path, "shift", 1.0) if shift is None else shift
    _positive("shift", s)
    zero, length = path.t_clean, path.t_max - path.t_clean

    def back(u):
        return zero + length * s * u / (1 + (s - 1) * u)

    def there(t):
        u = (t - zero) / length
        return u / (s - (s - 1) * u)

    return _spread(path, n, there, back, t_max, t_min, end)


# --- integer indices of a discrete path, as diffusers spaces them (2305.08891, table 2) ----------------------------


def _indices(path: Path, n: int, like: str) -> int:
    """The number of training steps K, or ``ValueError`` where there are no indices."""
    _check_steps(n)
    if not isinstance(path, VPDiscrete):
        raise ValueError(
            f"this spacing is of integer indices and needs a vp_discrete path, got {path.name}: try uniform"
        )
    if like not in ("ddim", "dpm"):
        raise ValueError(f"like must be 'ddim' or 'dpm', got {like!r}")
    count, most = len(path.alphas_cumprod), len(path.alphas_cumprod) - (like == "dpm")
    if n > most:
        raise ValueError(f"n must be at most {most}, the number of indices, got {n}")
    return count


def linspace(path: Path, n: int, like: str = "ddim") -> np.ndarray:
    """Indices K - 1 .. 0, then clean. ``like="dpm"`` leaves index 0 out, as multistep schedulers of diffusers do.

    >>> from fewstep.models import paths
    >>> path = paths.vp_discrete(paths.ddpm_alphas_cumprod())
    >>> linspace(path, 4).tolist(), leading(path, 4).tolist(), trailing(path, 4).tolist()
    ([999.0, 666.0, 333.0, 0.0, -1.0], [750.0, 500.0, 250.0, 0.0, -1.0], [999.0, 749.0, 499.0, 249.0, -1.0])
    """
    count = _indices(path, n, like)
    points = n + (like == "dpm")
    # one point alone is the noisy end
    rising = np.linspace(0, count - 1, points).round() if points > 1 else np.array([count - 1.0])
    return _falling(np.append(rising[::-1][:n], path.t_clean))


def leading(path: Path, n: int, offset: int = 0, like: str = "ddim") -> np.ndarray:
    """Multiples of K // n plus ``offset``: starts below t_max, as the pipelines of Stable Diffusion do."""
    count = _indices(path, n, like)
    points = n + (like == "dpm")
    indices = (np.arange(points) * (count // points))[::-1][:n] + offset
    if not 0 <= offset or indices[0] > count - 1:
        raise ValueError(
            f"offset must be a non-negative integer that keeps indices below {count}, got {offset!r}"
        )
    return np.append(indices.astype(np.float64), path.t_clean)


def trailing(path: Path, n: int) -> np.ndarray:
    """Indices down from K - 1 in steps of K / n."""
    count = _indices(path, n, "ddim")
    return _falling(np.append(np.round(count - np.arange(n) * (count / n)) - 1, path.t_clean))


# --- given by hand, or by a budget -----------------------------------------------------------------------------------


def explicit(
    path: Path, times: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
) -> np.ndarray:
    """A list of times, or of noise levels as diffusers counts them (rho; t on a flow); the clean end is added.

    >>> from fewstep.models import paths
    >>> explicit(paths.edm(), sigmas=[80, 10, 1]).tolist()
    [80.0, 10.0, 1.0, 0.0]
    """
    if (times is None) == (sigmas is None):
        raise ValueError("explicit needs either times or sigmas")
    name, given = ("times", times) if sigmas is None else ("sigmas", sigmas)
    values = np.array(given, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all() or (np.diff(values) >= 0).any():
        raise ValueError(f"{name} must be a strictly falling list of finite numbers, got {given!r}")
    if sigmas is not None:
        level, inverse = _level(path)
        most = level(path.t_max)
        if values[-1] < 0 or values[0] > most * (1 + 1e-6):
            raise ValueError(
                f"sigmas must lie in 0 .. {most:g} on {path.name}, got {values[0]:g} .. {values[-1]:g}"
            )
        values = np.minimum(inverse(values), path.t_max)
    if values[-1] < path.t_clean or values[0] > path.t_max:
        raise ValueError(
            f"times must lie in {path.t_clean:g} .. {path.t_max:g} on {path.name}, "
            f"got {values[0]:g} .. {values[-1]:g}"
        )
    values = values if values[-1] == path.t_clean else np.append(values, path.t_clean)
    if len(values) < 2:
        raise ValueError(f"{name} needs at least one entry above the clean end")
    return values


def for_calls(
    solver: Callable, path: Path, calls: int, grid: Callable | str = logsnr, **options: Any
) -> np.ndarray:
    """The longest grid on which ``solver(path, times, **options)`` makes at most ``calls`` network calls.

    ``grid`` is a function (path, n) or the name of one here.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import dpm_single, heun
    >>> path = paths.edm()
    >>> len(for_calls(heun, path, 35, karras)) - 1, len(for_calls(dpm_single, path, 10, "logsnr", order=3)) - 1
    (18, 4)
    """
    if isinstance(calls, bool) or not isinstance(calls, (int, np.integer)) or calls < 1:
        raise ValueError(f"calls must be a positive integer, got {calls!r}")
    if isinstance(grid, str):
        if grid not in NAMES:
            raise ValueError(f"grid must be one of {', '.join(NAMES)}, got {grid!r}")
        grid = globals()[grid]

    def cost(n: int) -> int:
        return solver(path, grid(path, n), **options).calls  # type: ignore[operator]

    n, spent = int(calls), cost(int(calls))
    while spent > calls:  # calls are all but proportional to steps: the guess falls fast and seldom too far
        if n == 1:
            raise ValueError(f"calls must be at least {spent} for one step of {solver.__name__}, got {calls}")
        n = max(1, min(n - 1, n * calls // spent))
        spent = cost(n)
    while n < calls and cost(n + 1) <= calls:
        n += 1
    return grid(path, n)  # type: ignore[operator]
