"""Analytical teleportation (2412.09726): the noisy part of a trajectory in closed form, without the network.

At high noise data are as good as Gaussian, and the probability-flow ODE of a Gaussian has a closed form on any path:
``teleport`` is that jump, and ``skip`` makes it and then runs any solver on what is left of the same grid. A multistep
solver would begin again with one stored output; its history is seeded with the Gaussian's exact outputs at the grid
points that were skipped, so that it goes on as if it had come the whole way.

    >>> import torch
    >>> from fewstep.models import GaussianMixture, gaussian, paths
    >>> from fewstep.samplers import deis, grids, starting_noise
    >>> mixture = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], 0.01)
    >>> stats, path = gaussian(mixture.sample(4000)), paths.edm()
    >>> x = skip(stats, mixture.denoiser(path), starting_noise(0, 8, (2,)), deis, grids.karras(path, 12), until=5.0)
    >>> bool((x[:, 0].abs() - 1).abs().max() < 0.5)
    True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.gaussian_stats import GaussianStats
from ..models.paths import Path
from .loop import Info, State, _raise_unless_finite, _total, init, sample, step
from .openings import openings
from .table import Table


def teleport(
    stats: GaussianStats,
    path: Path,
    x: torch.Tensor,
    t_from: float,
    t_to: float,
    label: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where the Gaussian's probability-flow ODE carries x (B, ...) from ``t_from`` to ``t_to``: ``stats.transport``.

    >>> from fewstep.models import gaussian, paths
    >>> teleport(gaussian(torch.tensor([[1.0], [3.0]])), paths.flow(), torch.tensor([[0.5]]), 1.0, 0.0)
    tensor([[2.5000]])
    """
    return stats.transport(path, x, t_from, t_to, label)


def skipped_steps(path: Path, times: np.ndarray, until: float) -> int:
    """How many steps of a grid end at noise levels sigma / alpha >= ``until``.

    >>> from fewstep.models import paths
    >>> skipped_steps(paths.edm(), np.array([80.0, 30.0, 10.0, 1.0, 0.0]), 10.0)
    2
    """
    if isinstance(until, bool) or not isinstance(until, (int, float, np.number)) or not until > 0:
        raise ValueError(f"until must be a positive noise level sigma / alpha, got {until!r}")
    return int((path.rho(np.asarray(times, dtype=np.float64)[1:]) >= until).sum())


def skip(
    stats: GaussianStats,
    d: Denoiser,
    noise: torch.Tensor,
    solver: Callable[[Path, Any], Table],
    times: Any,
    *,
    steps: int | None = None,
    until: float | None = None,
    seed_history: bool = True,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    transform: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
    callback: Callable[[Info], None] | None = None,
    check: Literal["end", "off"] = "end",
) -> torch.Tensor:
    """Samples (B, ...) from standard normal ``noise``: teleported over the first steps of a grid, solved over the rest.

    The network is called for the remaining steps only. Guided models follow no Gaussian path: skip less, or not.

    Args:
        stats: of the data as the network has them, ``gaussian(data)``; of a Gaussian a class, ``cond["label"]`` picks.
        solver: a function (path, times) -> Table, such as ``heun`` or ``functools.partial(deis, order=3)``.
        steps: how many steps of the grid to skip, 0 to all of them; or
        until: skip the steps that end at a noise level sigma / alpha of at least this.
        seed_history: whether the solver goes on with the Gaussian's outputs as its history, or begins anew.
        cond, seed, ids, transform, callback, check: as in ``sample``.
    """
    for name, value, kind in (("stats", stats, GaussianStats), ("d", d, Denoiser)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if d.shape is not None and stats.shape != d.shape:
        raise ValueError(f"stats must be of samples {d.shape} as d's, got {stats.shape}")
    if (steps is None) == (until is None):
        raise ValueError("skip needs either steps= (of the grid) or until= (a noise level)")
    table = solver(d.path, times)
    if not isinstance(table, Table) or table.times.ndim != 1:
        raise TypeError("solver must be a function (path, times) -> Table, on one grid for all samples")
    times, path, total = table.times, d.path, len(table.times) - 1
    count = skipped_steps(path, times, until) if steps is None else steps
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 0 <= count <= total:
        raise ValueError(f"steps must be an integer in 0 .. {total}, got {steps!r}")
    options: dict[str, Any] = dict(cond=cond, seed=seed, transform=transform)
    if count == 0:
        return sample(d, noise, table, ids=ids, callback=callback, check=check, **options)
    state = init(table, noise, ids, 0, seed)
    label = (cond or {}).get("label")
    stats = stats.to(noise.device)
    with torch.no_grad():
        start = path.sigma(float(times[0])) * (noise if noise.dtype == torch.float64 else noise.float())
        jumped = stats.transport(path, start, times[0], times[count], label)
        if count == total:
            return jumped
        if not seed_history:
            rest, unit = solver(path, times[count:]), jumped / path.sigma(float(times[count]))
            return sample(d, unit, rest, ids=ids, callback=callback, check=check, **options)
        opens = openings(table)
        known = stats.denoiser(path)
        plan = table.on(known, noise.device)
        for index in range(count):
            state = _at(state, stats.transport(path, start, times[0], times[index], label), opens[index])
            for _ in range(opens[index], opens[index + 1]):
                state, _ = step(known, plan, state, **options)
        state, plan, totals = _at(state, jumped, opens[count]), table.on(d, noise.device), []
        for _ in range(opens[count], table.calls):
            state, info = step(d, plan, state, **options)
            if check == "end":
                totals.append(_total(info.outputs))
            if callback is not None:
                callback(info)
        if totals:
            _raise_unless_finite(totals, plan, opens[count], 0)
    return state.x


def _at(state: State, x: torch.Tensor, row: int) -> State:
    """Both registers at x, history as it is."""
    return state._replace(x=x, y=x, row=row)
