"""Time shift (2305.15583): tell the network the time whose noise level a sample really has, one label a sample.

A sample that a solver made differs from what the network was trained on; some label near the grid's time may fit it
better. Algorithm 3 finds it from the variance V over the elements of each sample: after every step down to grid point
t_i whose start lay above the cutoff,

    t_s = argmin { |V - v(tau)| : tau within window / 2 of t_i }
    v = sigma^2 (match="noise")  or  alpha^2 v0 + sigma^2 (match="marginal")

and the next step believes that it starts at t_s. Data of variance v0 > 0 have V = alpha^2 v0 + sigma^2 without any
error, so that "noise", the paper's, shifts upwards even where nothing is wrong; "marginal" does not. (The paper prints
the window round the step's start; with that no narrow window would hold the time that the sample is at.)

Every candidate is a lane of one table, made ahead of time, and a step picks a lane a sample: no more network calls, and
no waiting for the device. Window and cutoff are in thousandths of the path's time, the paper's units; on EDM's path and
on flows, of the linear VP path's time at the same log-SNR (where near the noise a thousandth of t may be a world).

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids, starting_noise
    >>> d = GaussianMixture([1.0], torch.zeros(1, 48), 0.25).denoiser(paths.vp_linear(), predicts="eps")
    >>> noise, times = starting_noise(0, 2, (48,)), grids.uniform(d.path, 10)
    >>> x, labels = time_shift(d, noise, ddim, times, match="marginal", data_variance=0.25, return_labels=True)
    >>> labels.shape, bool((labels[:, 1:9] - torch.as_tensor(times[1:9])).abs().max() <= 0.02 + 1e-9)
    (torch.Size([2, 10]), True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.paths import Path, Times
from .loop import Info, _raise_unless_finite, _total, init, step
from .multistep import check_choice
from .openings import openings
from .quadrature import vp_lam, vp_time
from .table import Table

COMPAT = ("paper", "pnm", "adm", "deis")
MARGIN = 0.1  # of a grid interval: as near as a label may come to the next grid point


def to_units(path: Path, t: Times) -> Times:
    """Thousandths of a VP path's own time; on other paths, of the linear VP path's at the same log-SNR.

    >>> from fewstep.models import paths
    >>> to_units(paths.vp_linear(), 0.25), round(to_units(paths.edm(), 1.0)), to_units(paths.flow(), 1.0)
    (250.0, 259, 1000.0)
    """
    if path.name not in ("edm", "flow"):
        return 1000.0 * (t - path.t_clean) / (path.t_max - path.t_clean)
    units = 1000.0 * vp_time(np.asarray(path.lam(t)))
    units = np.where(np.isfinite(units), units, 1000.0)  # a flow's t = 1 has no such time
    return units if isinstance(t, np.ndarray) else float(units)


def from_units(path: Path, u: Times) -> Times:
    """The inverse of ``to_units``."""
    if path.name in ("edm", "flow"):
        return path.time(vp_lam(u / 1000.0))
    return path.t_clean + u / 1000.0 * (path.t_max - path.t_clean)


@dataclass(frozen=True, eq=False)
class Shifts:
    """A table whose lanes are a step's candidates, lane 0 the grid's own, and what a sample is held against.

    All (steps, lanes): ``labels``, the time that the network is told; ``signal`` and ``noise``, alpha^2 and sigma^2 of
    the time whose variance a candidate is compared by. ``on``: which steps choose; ``opens``: the call that opens each.
    """

    table: Table
    labels: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    on: tuple[bool, ...]
    opens: tuple[int, ...]

    def to(self, device: torch.device | str) -> Levels:
        """What is read while sampling, as tensors there; float64 wherever it exists."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return Levels(*(torch.as_tensor(a).to(device, dtype) for a in (self.labels, self.signal, self.noise)))


class Levels(NamedTuple):
    """``labels``, ``signal`` and ``noise`` of ``Shifts`` on a device."""

    labels: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor

    def nearest(self, index: int, y: torch.Tensor, v0: float | torch.Tensor = 0.0) -> torch.Tensor:
        """The lane (B,) whose variance, alpha^2 v0 + sigma^2, is nearest to that of each sample of y (B, ...).

        Of equally good ones it is the nearest to the grid's time.
        """
        seen = y.to(self.noise.dtype).flatten(1).var(1, keepdim=True)
        v0 = torch.as_tensor(v0).to(self.noise).reshape(-1, 1)
        return (seen - (self.signal[index] * v0 + self.noise[index])).abs().argmin(1)


def shifts(
    path: Path,
    solver: Callable[[Path, Any], Table],
    times: Any,
    *,
    window: float | None = None,
    cutoff: float = 200.0,
    compat: Literal["paper", "pnm", "adm", "deis"] = "paper",
) -> Shifts:
    """The table of all candidates, from a function (path, times) -> Table; arguments as for ``time_shift``.

    What the solver keeps from earlier calls stays where the grid has it; only the start of a step is moved, or in
    ``compat`` "pnm" and "adm" its end.
    """
    check_choice("compat", compat, COMPAT)
    base = solver(path, times)
    if not isinstance(base, Table):
        raise TypeError(
            f"solver must be a function (path, times) -> Table, got {type(base).__name__} from it"
        )
    if base.lanes != 1:
        raise ValueError(f"times must be one grid for all samples here, got {base.lanes} lanes")
    grid, opens = base.times, openings(base)
    steps = len(opens)
    window = min(40.0, 400.0 / steps) if window is None else window
    for name, value in (("window", window), ("cutoff", cutoff)):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float, np.number))
            or not 0 <= value <= 1000
        ):
            raise ValueError(f"{name} must lie in 0 .. 1000, thousandths of the path's time, got {value!r}")
    half = int(window if compat == "deis" else window / 2)
    offsets = np.array([0.0, *(sign * k for k in range(1, half + 1) for sign in (1.0, -1.0))])
    units = to_units(path, grid)
    labels = np.repeat(grid[:-1, None], len(offsets), axis=1)
    matched, on, built = labels.copy(), [], {}
    for index in range(steps):
        ends = compat in (
            "pnm",
            "adm",
        )  # these move the end of the step, found before it, the others its start
        point, above = (index + 1, index) if ends else (index, index - 1)
        if above < 0 or point == steps or units[above] <= cutoff:
            on.append(False)
            continue
        moved = from_units(path, units[point] + offsets)
        compared = from_units(path, units[index] + offsets) if compat == "adm" else moved
        low = max(grid[point] - (1 - MARGIN) * (grid[point] - grid[point + 1]), path.t_min)
        high = grid[point] + (1 - MARGIN) * (grid[above] - grid[point])
        fits = (moved >= low) & (moved <= high) & (compared <= path.t_max)
        fits[0] = False  # the grid's own time, to the bit: units and back would round it
        moved = np.where(fits, moved, grid[point])
        matched[index] = np.where(fits, compared, grid[index if compat == "adm" else point])
        on.append(bool(fits.any()))
        if not ends:
            labels[index] = moved
        if fits.any() and compat != "deis":
            lanes = np.repeat(grid[None], len(offsets), axis=0)
            lanes[:, point] = moved
            built[index] = solver(path, lanes)
    table = base if compat == "deis" else _joined(base, built, opens, len(offsets))
    return Shifts(table, labels, path.alpha(matched) ** 2, path.sigma(matched) ** 2, tuple(on), tuple(opens))


def _joined(base: Table, built: dict[int, Table], opens: list[int], lanes: int) -> Table:
    """The base table with every step's rows from the table that was built for it, but for lane 0."""
    names = ("t", "alpha", "sigma", "a", "b", "c")
    arrays = {name: np.repeat(getattr(base, name), lanes, axis=1) for name in names}
    for index, table in built.items():
        if table.form != base.form or (table.slot != base.slot).any() or table.slots != base.slots:
            raise ValueError(
                f"solver must make the same calls wherever a step begins; {base.solver} does not"
            )
        first, last = opens[index], (*opens, base.calls)[index + 1]
        for name in names:
            after = name in ("a", "b", "c")  # their row 0 opens the table
            rows = slice(first + after, last + after)
            arrays[name][rows, 1:] = getattr(table, name)[rows, 1:]
    return replace(base, **arrays)


class _Relabelled(Denoiser):
    """The same denoiser, its network told ``label`` in place of the time; what is made of its outputs stays."""

    def __init__(self, inner: Denoiser):
        self.__dict__.update(inner.__dict__)
        self.inner = inner
        self.label: torch.Tensor | None = None

    def raw(self, x: torch.Tensor, t: Times, **cond: Any) -> tuple[torch.Tensor, ...]:
        """The outputs at the label."""
        return self.inner.raw(x, t if self.label is None else self.label, **cond)

    def affine(self, t: Times, form: Any = "x0"):
        """As at the grid's time."""
        return self.inner.affine(t, form)

    def __call__(self, x: torch.Tensor, t: Times, **cond: Any) -> torch.Tensor:
        """x0; where the inner one is not affine, it is the inner one's at the label."""
        if self.inner.affine(t) is None:
            return self.inner(x, t if self.label is None else self.label, **cond)
        return super().__call__(x, t, **cond)


def time_shift(
    d: Denoiser,
    noise: torch.Tensor,
    solver: Callable[[Path, Any], Table],
    times: Any,
    *,
    window: float | None = None,
    cutoff: float = 200.0,
    match: Literal["noise", "marginal"] = "noise",
    data_variance: float | torch.Tensor | None = None,
    compat: Literal["paper", "pnm", "adm", "deis"] = "paper",
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    transform: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
    callback: Callable[[Info], None] | None = None,
    return_labels: bool = False,
    check: Literal["end", "off"] = "end",
) -> Any:
    """Samples (B, ...) from standard normal ``noise`` by any solver, every sample at time labels of its own.

    Args:
        solver: a function (path, times) -> Table, such as ``ddim`` or ``functools.partial(deis, order=3)``. The call
            that opens a step is relabelled, and with it all that the step computes.
        window: full width of the search, in thousandths of the path's time; by default 40, or 400 / steps where that
            is less, about the paper's. 0 is the plain solver. A label stays between the neighbouring grid points.
        cutoff: steps that start at or below it leave the next label alone (the paper: 200 at 10 steps, 300 above).
        match: "noise" compares with sigma^2 as the paper does, "marginal" with alpha^2 v0 + sigma^2.
        data_variance: v0, a number or one a sample: see ``data_variance``.
        compat: what released code does instead. "pnm": the variance before the step, the window round its *end*, which
            is moved while the network sees the grid's time. "adm": the window round the step's start, and the end is
            moved by as much. "deis": the network alone is told the label, from a window twice as wide.
        return_labels: also the times that the network was told at each step's opening, (B, steps) float64.
        cond, seed, ids, transform, callback, check: as in ``sample``.
    """
    if not isinstance(d, Denoiser):
        raise TypeError(f"d must be a Denoiser, e.g. load('digits'), got {type(d).__name__}")
    if check not in ("end", "off"):
        raise ValueError(f"check must be 'end' or 'off', got {check!r}")
    made = shifts(d.path, solver, times, window=window, cutoff=cutoff, compat=compat)
    if d.shape is not None and isinstance(noise, torch.Tensor) and tuple(noise.shape[1:]) != d.shape:
        raise ValueError(
            f"noise must have shape (batch, {', '.join(map(str, d.shape))}) for this model, got {tuple(noise.shape)}"
        )
    with torch.no_grad():
        state = init(made.table, noise, ids, 0, seed)
        v0 = _check_variance(match, data_variance, len(noise))
        plan, levels = made.table.on(d, noise.device), made.to(noise.device)
        told = _Relabelled(d) if compat == "deis" else d
        labels, totals = [], []
        for index, (first, last) in enumerate(
            zip(made.opens, (*made.opens[1:], plan.table.calls), strict=True)
        ):
            lane: int | torch.Tensor = levels.nearest(index, state.y, v0) if made.on[index] else 0
            label = levels.labels[index][lane]
            labels.append(label.expand(len(noise)))
            for call in range(first, last):
                if isinstance(told, _Relabelled):
                    told.label = label if made.on[index] and call == first else None
                state = state._replace(row=call)
                state, info = step(told, plan, state, cond=cond, seed=seed, transform=transform,
                                   lane=0 if compat == "deis" else lane)  # fmt: skip
                if check == "end":
                    totals.append(_total(info.outputs))
                if callback is not None:
                    callback(info)
        if totals:
            _raise_unless_finite(totals, plan, 0, 0)
    return (state.x, torch.stack(labels, 1)) if return_labels else state.x


def data_variance(images: Any) -> float:
    """v0 for ``match="marginal"``: the mean over images (N, ...) of each one's variance over its own elements.

    >>> data_variance(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    1.0
    """
    images = torch.as_tensor(images)
    if images.ndim < 2 or images[:1].numel() < 2 or not images.is_floating_point():
        raise ValueError(
            f"images must be floats (N, ...) of at least two elements each, got {images.dtype} {tuple(images.shape)}"
        )
    return float(images.double().flatten(1).var(1).mean())


def _check_variance(match: str, value: Any, batch: int) -> float | torch.Tensor:
    check_choice("match", match, ("noise", "marginal"))
    if (match == "noise") != (value is None):
        raise ValueError(
            "data_variance goes with match='marginal', and it needs one: a number or one a sample, "
            f"see data_variance(images); got match={match!r} and data_variance={value!r}"
        )
    v0 = torch.as_tensor(0.0 if value is None else value)
    if tuple(v0.shape) not in ((), (batch,)) or not (torch.isfinite(v0) & (v0 >= 0)).all():
        raise ValueError(
            f"data_variance must be a number >= 0, or one for each of {batch} samples, got {value!r}"
        )
    return v0
