"""A table joined to a denoiser: the network's conversion folded into every row's coefficients, made once.

A row is three weighted sums over one list of tensors, the *sources* (x, y, z, history .., network outputs ..): what is
stored, x' and y'. Where a stored output is never read after its own row, nothing is stored and x', y' are made of the
network's outputs directly. For a batch that walks in step the weights are Python floats, a row a handful of axpys;
where samples differ in row or lane the same weights are gathered, one set a sample, from tensors on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser, convert
from . import fused

if TYPE_CHECKING:
    from .table import Table

X, Y, Z, HISTORY = 0, 1, 2, 3  # where each source stands; the network's outputs follow the history
Terms = tuple[tuple[int, float], ...]  # (source, weight) ..


class Row(NamedTuple):
    """One network call and what follows it, for a whole batch: ``new`` goes into ``slot`` (None: nowhere);
    ``y`` is None where y' = x'. ``plan``, ``index``, ``lane`` and ``source`` say where it comes from."""

    t: float
    draws: bool
    slot: int | None
    new: Terms
    x: Terms
    y: Terms | None
    plan: Plan
    index: int
    lane: int
    source: Literal["outputs", "x0"]


class Gathered(NamedTuple):
    """The same, one set a sample: t and slot (B,), weights (B, sources); ``y`` is None where y' = x' throughout."""

    t: torch.Tensor
    slot: torch.Tensor
    new: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor | None


class Weights(NamedTuple):
    """Of every row, (R, L, sources) each."""

    new: np.ndarray
    x: np.ndarray
    y: np.ndarray


class Plan:
    """``table.on(d, device)``. ``affine`` says whether the network's own outputs are used or d(x, t); ``outputs``
    how many they are; ``joined[r]`` that row r = 0 .. R leaves y' = x'; ``kept[r]`` that call r is read again later.
    """

    def __init__(self, table: Table, d: Denoiser, device: torch.device):
        self.table, self.path, self.device = table, d.path, device
        self.affine = d.affine(float(table.t[0, 0]), "x0") is not None
        _check_path(table, d)
        self.joined, self.kept, self.draws = joined(table), _kept(table), bool(table.c[1:].any())
        p, q = self._conversion(d if self.affine else None)
        self.outputs = q.shape[-1]
        self._weights = {not self.affine: self._folded(p, q)}
        self._rows: dict[tuple[int, int, bool], Row] = {}
        self._tensors: dict[tuple[torch.dtype, bool], tuple] = {}
        # stays float64: it is rounded by whoever knows what the network wants
        self._t: torch.Tensor | None = None
        self._fused: dict[tuple[torch.device, str], fused.Rows] = {}
        self._denoiser = d

    def row(self, index: int, lane: int = 0, from_x0: bool = False) -> Row:
        """Call ``index`` (from 0) and what follows it; ``from_x0``: made of an estimate of x0, not of outputs."""
        key = (index, lane, from_x0)
        if key not in self._rows:
            new, x, y = (_nonzero(w[index, lane]) for w in self.weights(from_x0))
            draws = any(source == Z for source, _ in (*x, *y))
            slot = int(self.table.slot[index]) if self.kept[index] else None
            y = None if self.joined[index + 1] else y
            where = (self, index, lane, "x0" if from_x0 else "outputs")
            self._rows[key] = Row(float(self.table.t[index, lane]), draws, slot, new, x, y, *where)
        return self._rows[key]

    def gather(
        self, index: torch.Tensor, lane: torch.Tensor, dtype: torch.dtype, from_x0: bool = False
    ) -> Gathered:
        """Calls ``index`` (B,) in lanes ``lane`` (B,), as tensors."""
        if (dtype, from_x0) not in self._tensors:
            new, x, y = (torch.as_tensor(w).to(self.device, dtype) for w in self.weights(from_x0))
            slot = torch.as_tensor(self.table.slot.copy()).to(self.device)
            self._tensors[dtype, from_x0] = (slot, new, x, None if self.joined.all() else y)
        slot, new, x, y = self._tensors[dtype, from_x0]
        return Gathered(
            self.times(index, lane),
            slot[index],
            new[index, lane],
            x[index, lane],
            None if y is None else y[index, lane],
        )

    def fused(self, device: torch.device, source: Literal["outputs", "x0", "clip"]) -> fused.Rows:
        """All rows on ``device`` as the fused step reads them, uploaded once."""
        if (device, source) not in self._fused:
            self._fused[device, source] = fused.rows(self, device, source)
        return self._fused[device, source]

    def times(self, index: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
        """t of calls ``index`` (B,) in lanes ``lane`` (B,), in float64."""
        if self._t is None:
            self._t = torch.as_tensor(self.table.t.copy()).to(self.device)
        return self._t.index_select(0, index).gather(1, lane.unsqueeze(1)).squeeze(1)

    def weights(self, from_x0: bool) -> Weights:
        """The weights of every row, in float64."""
        if from_x0 not in self._weights:
            self._weights[from_x0] = self._folded(*self._conversion(None))
        return self._weights[from_x0]

    @property
    def to_x0(self) -> tuple[np.ndarray, np.ndarray]:
        """P (R, L) and Q (R, L, m) with  x0 = P y + sum Q_i F_i  in every row, for a denoiser that is affine."""
        return self._conversion(self._denoiser, ["x0"] * self.table.calls)

    def _conversion(
        self, d: Denoiser | None, forms: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """P (R, L) and Q (R, L, m) with  form = P y + sum Q_i F_i  in every row; without ``d``, F is an x0."""
        table = self.table
        p, q = [], []
        for row, form in enumerate(forms or table.form):
            for lane, t in enumerate(table.t[row].tolist()):
                if d is not None:
                    one_p, one_q = d.affine(t, form)  # type: ignore[misc, arg-type]
                else:
                    one_p, single = convert(self.path, t, "x0", "flow" if form == "v" else form)
                    one_q = (single,)
                if not np.isfinite([one_p, *one_q]).all():
                    alpha, sigma = table.alpha[row, lane], table.sigma[row, lane]
                    raise ValueError(
                        f"row {row} of {table.solver} wants {form} at t = {t:g}, where alpha = {alpha:g} and sigma = "
                        f"{sigma:g}: this network does not determine it there (an eps-model cannot start at alpha = 0)"
                    )
                p.append(one_p)
                q.append(one_q)
        shape = (table.calls, table.lanes)
        return np.array(p, dtype=np.float64).reshape(shape), np.array(q, dtype=np.float64).reshape(*shape, -1)

    def _folded(self, p: np.ndarray, q: np.ndarray) -> Weights:
        """The table's coefficients as weights over the sources, with P and Q multiplied in."""
        table, calls, output = self.table, self.table.calls, HISTORY + self.table.slots
        new, x, y = (np.zeros((calls, table.lanes, output + q.shape[-1])) for _ in range(3))
        new[..., Y], new[..., output:] = p, q
        for out, weights in enumerate((x, y)):
            weights[..., : HISTORY - 1], weights[..., Z] = table.a[1:, :, out], table.c[1:, :, out]
            weights[..., HISTORY:output] = table.b[1:, :, out]
            for row in np.flatnonzero(~self.kept):
                once = weights[row, :, HISTORY + table.slot[row]].copy()
                weights[row, :, HISTORY + table.slot[row]] = 0.0
                weights[row] += once[:, None] * new[row]
        for weights in (new, x, y):  # where y is x, one tensor is read instead of two
            weights[self.joined[:-1], :, X] += weights[self.joined[:-1], :, Y]
            weights[self.joined[:-1], :, Y] = 0.0
        return Weights(new, x, y)


def joined(table: Table) -> np.ndarray:
    """(R + 1,) bools: the rows that leave one and the same tensor in both registers."""
    a, b, c = table.a, table.b, table.c
    opening = (a[:1, :, 0].sum(-1) == a[:1, :, 1].sum(-1)).all(-1)  # both registers held the noise
    later = (a[1:, :, 0] == a[1:, :, 1]).all((1, 2)) & (b[1:, :, 0] == b[1:, :, 1]).all((1, 2))
    return np.concatenate([opening, later]) & (c[:, :, 0] == c[:, :, 1]).all(1)


def _kept(table: Table) -> np.ndarray:
    """(R,) bools: whether what call r stores is read after its own row, before its slot is written again."""
    read = (table.b != 0).any(axis=(1, 2))  # (R + 1, K)
    kept = []
    for call, slot in enumerate(table.slot):
        again = np.flatnonzero(table.slot[call + 1 :] == slot)
        until = call + 1 + again[0] if len(again) else table.calls
        kept.append(read[call + 2 : until + 1, slot].any())
    return np.array(kept, dtype=bool)


def _nonzero(weights: np.ndarray) -> Terms:
    return tuple((int(source), float(weights[source])) for source in np.flatnonzero(weights))


def _check_path(table: Table, d: Denoiser) -> None:
    alpha, sigma = d.path.alpha(table.t.copy()), d.path.sigma(table.t.copy())
    if not (
        np.allclose(alpha, table.alpha, atol=1e-6) and np.allclose(sigma, table.sigma, rtol=1e-6, atol=1e-6)
    ):
        raise ValueError(f"the table was made for path {table.path.get('path')!r}, and the denoiser's path "
                         f"{d.path.name!r} has other alpha and sigma at its times: build it on d.path")  # fmt: skip
