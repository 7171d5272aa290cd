"""A table joined to a denoiser: the scalars of every row, with the network's conversion folded in, made once.

For a batch that walks in step the scalars are Python floats and a row is a handful of axpys. Where samples differ in row
or lane they are gathered, one set a sample, from float32 (float64) tensors on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser, convert

if TYPE_CHECKING:
    from .table import Table

Terms = tuple[float, float, tuple[tuple[int, float], ...], float]  # a_x, a_y, ((slot, b) ..), c


class Row(NamedTuple):
    """One network call and what follows it, for a whole batch. ``y`` is None where y' = x'."""

    t: float
    sigma: float
    p: float
    q: tuple[float, ...]
    slot: int
    x: Terms
    y: Terms | None


class Gathered(NamedTuple):
    """The same, one set a sample: t, p (B,), q (m, B), slot (B,), a (B, 2, 2), b (B, 2, K), c (B, 2)."""

    t: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    slot: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor


class Plan:
    """``table.on(d, device)``. ``affine`` says whether the network's own outputs are used or d(x, t)."""

    def __init__(self, table: Table, d: Denoiser, device: torch.device):
        self.table, self.d, self.device = table, d, device
        self.affine = d.affine(float(table.t[0, 0]), "x0") is not None
        self._rows: dict[tuple[int, int, bool], Row] = {}
        self._tensors: dict[tuple[torch.dtype, bool], tuple[torch.Tensor, ...]] = {}
        self._scalars = {False: self._conversion(self.affine)}

    def _conversion(self, affine: bool) -> tuple[np.ndarray, np.ndarray]:
        """P (R, L) and Q (R, L, m) of every row's stored form, or ``ValueError`` where the form cannot be had."""
        table, path = self.table, self.d.path
        alpha, sigma = path.alpha(table.t.copy()), path.sigma(table.t.copy())
        if not (np.allclose(alpha, table.alpha, atol=1e-6) and np.allclose(sigma, table.sigma, rtol=1e-6, atol=1e-6)):
            raise ValueError(f"the table was made for path {table.path.get('path')!r}, and the denoiser's path "
                             f"{path.name!r} has other alpha and sigma at its times: build it on denoiser.path")  # fmt: skip
        p, q = [], []
        for row, form in enumerate(table.form):
            for lane in range(table.lanes):
                t = float(table.t[row, lane])
                if affine:
                    one_p, one_q = self.d.affine(t, form)  # type: ignore[misc, arg-type]
                else:
                    one_p, single = convert(path, t, "x0", "flow" if form == "v" else form)
                    one_q = (single,)
                if not np.isfinite([one_p, *one_q]).all():
                    raise ValueError(f"row {row} of {table.solver} wants {form} at t = {t:g}, where alpha = "
                                     f"{table.alpha[row, lane]:g} and sigma = {table.sigma[row, lane]:g}: this network does "
                                     "not determine it there (an eps-model cannot start at alpha = 0)")  # fmt: skip
                p.append(one_p)
                q.append(one_q)
        shape = (table.calls, table.lanes)
        return np.array(p, dtype=np.float64).reshape(shape), np.array(q, dtype=np.float64).reshape(*shape, -1)

    def _terms(self, row: int, lane: int) -> tuple[Terms, Terms | None]:
        a, b, c = (getattr(self.table, name)[row, lane] for name in "abc")

        def register(k: int) -> Terms:
            used = tuple((int(j), float(b[k, j])) for j in np.flatnonzero(b[k]))
            return float(a[k, 0]), float(a[k, 1]), used, float(c[k])

        x, y = register(0), register(1)
        return x, None if x == y else y

    def scalars(self, from_x0: bool) -> tuple[np.ndarray, np.ndarray]:
        """The conversion from the network's outputs, or from an x0 that was changed on its way (``from_x0``)."""
        if from_x0 not in self._scalars:
            self._scalars[from_x0] = self._conversion(affine=False)
        return self._scalars[from_x0]

    def row(self, index: int, lane: int = 0, from_x0: bool = False) -> Row:
        """Call ``index`` (from 0) and what follows it, as Python floats."""
        key = (index, lane, from_x0)
        if key not in self._rows:
            t, sigma = float(self.table.t[index, lane]), float(self.table.sigma[index, lane])
            all_p, all_q = self.scalars(from_x0)
            p, q = float(all_p[index, lane]), tuple(all_q[index, lane].tolist())
            self._rows[key] = Row(t, sigma, p, q, int(self.table.slot[index]), *self._terms(index + 1, lane))
        return self._rows[key]

    def gather(self, index: torch.Tensor, lane: torch.Tensor, dtype: torch.dtype, from_x0: bool = False) -> Gathered:
        """Calls ``index`` (B,) in lanes ``lane`` (B,), as tensors."""
        t, p, q, slot, a, b, c = self._uploaded(dtype, from_x0)
        after = index + 1
        return Gathered(t[index, lane], p[index, lane], q[index, lane].T, slot[index], a[after, lane], b[after, lane], c[after, lane])

    def _uploaded(self, dtype: torch.dtype, from_x0: bool) -> tuple[torch.Tensor, ...]:
        if (dtype, from_x0) not in self._tensors:
            table = self.table

            def put(array: np.ndarray, to: torch.dtype | None = None) -> torch.Tensor:
                return torch.as_tensor(np.array(array)).to(device=self.device, dtype=to)

            p, q = self.scalars(from_x0)
            # t stays float64: it is rounded by whoever knows what the network wants
            self._tensors[dtype, from_x0] = (
                put(table.t), put(p, dtype), put(q, dtype), put(table.slot), put(table.a, dtype), put(table.b, dtype), put(table.c, dtype),
            )  # fmt: skip
        return self._tensors[dtype, from_x0]
