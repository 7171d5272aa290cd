"""Products of powers of densities,  prod_i q_i^(b_i),  as one Denoiser, and tables at the scale of such products.

The score of the product of noised densities is  sum_i b_i s_i, so eps = sum_i b_i eps_i: with weights that sum to B
and not to 1, only eps and score may be added up (x0 and v contain x). An estimate of x0 follows from that eps as from
any other, x0 = (x - sigma eps) / alpha, so every table runs on it; none of it is a posterior mean any more.

    >>> import torch
    >>> from fewstep.models import GaussianMixture, paths
    >>> p = GaussianMixture([1.0], [[3.0]], 2.0)
    >>> x = torch.ones(1, 1, dtype=torch.float64)
    >>> squared = Powers((p.denoiser(paths.edm()),), (2.0,))
    >>> torch.allclose(squared.score(x, 1.5), 2 * p.denoiser(paths.edm()).score(x, 1.5))
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..models.denoiser import Denoiser, Form, convert
from ..models.paths import Times
from .blend import Composite
from .table import Table


class Powers(Composite):
    """prod_i q_i^(b_i) of the densities that ``children`` stand for; blends among them count as such products.

    Args:
        children: Denoisers on one path.
        powers: one finite number a child; their sum B is positive.
        names: what errors call the children.
    """

    def __init__(self, children: Sequence[Denoiser], powers: Sequence[float], names: Sequence[str] = ()):
        super().__init__(children, names)
        self.powers = tuple(float(b) for b in powers)
        if (
            len(self.powers) != len(self.children)
            or not np.isfinite(self.powers).all()
            or sum(self.powers) <= 0
        ):
            raise ValueError(
                f"powers must be {len(self.children)} finite numbers with a positive sum, got {self.powers}"
            )

    @property
    def total(self) -> float:
        """B."""
        return sum(self.powers)

    def exponents(self, t: Times) -> tuple[Times, ...]:
        """One exponent a leaf."""
        return tuple(
            b * inner
            for b, child in zip(self.powers, self.children, strict=True)
            for inner in exponents_of(child, t)
        )

    def affine(self, t: Times, form: Form = "x0") -> tuple[Times, tuple[Times, ...]] | None:
        """(P, (Q_1 .. Q_m)), or None where a child is not affine."""
        p: Times = 0.0
        qs: list[Times] = []
        for b, child in zip(self.powers, self.children, strict=True):
            scalars = child.affine(t, "eps")
            if scalars is None:
                return None
            p = p + b * scalars[0]
            qs += [b * q for q in scalars[1]]
        if form == "eps":
            return p, tuple(qs)
        with np.errstate(divide="ignore", invalid="ignore"):
            r, s = convert(self.path, t, "eps", "flow" if form == "v" else form)
            return r + s * p, tuple(s * q for q in qs)


def exponents_of(d: Denoiser, t: Times) -> tuple[Times, ...]:
    """One exponent a leaf of any denoiser: the score is sum_i exponent_i score_i."""
    return d.exponents(t) if isinstance(d, Composite) else (1.0,) * len(d.parts())


def scaled(table: Table, opening: float, noise: float) -> Table:
    """``table`` with its opening row and its fresh noise multiplied; the same object where nothing changes.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import ddim, grids
    >>> table = ddim(paths.edm(), grids.karras(paths.edm(), 3), eta=1.0)
    >>> float(scaled(table, 0.5, 1.0).a[0, 0, 0].sum()), float(table.a[0, 0, 0].sum())
    (40.0, 80.0)
    """
    if opening == noise == 1.0:
        return table
    a, c = table.a.copy(), table.c.copy()
    a[0] *= opening
    c[0] *= opening
    c[1:] *= noise
    options = {**table.options, "scaled": [opening, noise]}
    return replace(table, a=a, c=c, options=options)
