"""Restart sampling (2306.14878): an ODE solver that goes back up through one interval of noise, again and again.

Having come down to t_l, noise is added until t_h, and the interval is solved once more on a grid of its own:

    x_h = (alpha_h/alpha_l) x_l + sqrt(sigma_h^2 - (alpha_h sigma_l / alpha_l)^2) z
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from . import grids
from .heun import heun
from .multistep import check_order
from .program import check_times, solver
from .table import Table


def chain(first: Table, second: Table, a: np.ndarray, c: np.ndarray) -> Table:
    """One table that runs ``first``, makes a x + c z of its result, and runs ``second`` from there. a, c: (lanes,)."""
    slots = max(first.slots, second.slots)
    opening = second.a[0].sum(axis=-1)  # (lanes, 2)
    if (opening[:, 0] != opening[:, 1]).any() or second.c[0].any():
        raise ValueError(f"{second.solver} cannot follow: it opens its two registers differently")

    def widened(b: np.ndarray) -> np.ndarray:
        return np.pad(b, ((0, 0), (0, 0), (0, 0), (0, slots - b.shape[-1])))

    shape = a.shape + (1,)
    last_c = np.hypot(a[:, None] * first.c[-1], c[:, None])
    fields = {
        "a": np.concatenate([first.a[:-1], [a.reshape(*shape, 1) * first.a[-1]], second.a[1:]]),
        "b": np.concatenate(
            [widened(first.b[:-1]), widened(a.reshape(*shape, 1) * first.b[-1:]), widened(second.b[1:])]
        ),
        "c": np.concatenate([first.c[:-1], [last_c], second.c[1:]]),
    }
    for name in ("t", "alpha", "sigma", "slot"):
        fields[name] = np.concatenate([getattr(first, name), getattr(second, name)])
    return replace(first, form=first.form + second.form, **fields)


@solver(paper="2306.14878", calls="2", order=0)
def restart(
    path,
    times,
    intervals: Sequence[Sequence[float]] = ((0.06, 0.3, 2, 3),),
    base: Callable[..., Table] = heun,
) -> Table:
    """``base`` on the grid, and again through intervals (rho_low, rho_high, repeats, steps).

    An interval is walked on a Karras grid of ``steps`` steps; rho_low moves to the nearest point of the main grid.
    These steps do not shrink as the main grid is refined, hence no order of convergence.

    >>> from fewstep.models import paths
    >>> path = paths.edm()
    >>> table = restart(path, grids.karras(path, 18)); table.calls == 35 + 2 * 6, table.stochastic
    (True, True)
    """
    times = check_times(path, times)
    if times.ndim > 1:
        raise ValueError("restart takes one grid, not lanes of them")
    inner = [path.rho(float(t)) for t in times[1:-1]]
    if not inner:
        raise ValueError("restart needs a grid of at least two steps")
    wanted: dict[int, list[tuple[float, int, int]]] = {}
    for interval in intervals:
        if len(interval) != 4:
            raise ValueError(f"an interval is (rho_low, rho_high, repeats, steps), got {tuple(interval)!r}")
        low, high, repeats, steps = interval
        check_order("repeats", repeats, 1, 1000)
        check_order("steps", steps, 1, 1000)
        at = 1 + int(np.argmin(np.abs(np.log(np.array(inner) / low)))) if low > 0 else 0
        if not (0 < low < high <= path.rho(path.t_max) and high > inner[at - 1]):
            raise ValueError(
                f"an interval must have 0 < rho_low < rho_high <= {path.rho(path.t_max):g} on this path, and "
                f"the grid's point nearest to rho_low must lie below rho_high; got rho_low = {low}, rho_high = {high}"
            )
        wanted.setdefault(at, []).append((high, int(repeats), int(steps)))
    table, begin = None, 0
    for at in [*sorted(wanted), len(times) - 1]:
        piece = base(path, times[begin : at + 1])
        table = piece if table is None else chain(table, piece, *_carry(path, times[begin], times[begin]))
        for high, repeats, steps in wanted.get(at, ()):
            up = path.time_of_rho(high)
            piece = base(path, grids.karras(path, steps, t_max=up, t_min=times[at], end="t_min"))
            for _ in range(repeats):
                table = chain(table, piece, *_carry(path, times[at], up))
        begin = at
    return replace(table, times=times)


def _carry(path, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """What raises the noise from time low to high: the factor on x and the scale of the fresh normal."""
    a = path.alpha(float(high)) / path.alpha(float(low))
    return np.array([a]), np.array(
        [np.sqrt(max(path.sigma(float(high)) ** 2 - (a * path.sigma(float(low))) ** 2, 0.0))]
    )
