"""How fast a Feynman-Kac corrector's log-weights grow (2503.02819): sums of squares of what a step reads anyway.

With eps of every expert affine in its network's output, e_i = p_i y + q_i F_i, the rate of the log-weights is

    d log w / d lam = - (1/B) sum_{i<j} b_i b_j |e_i - e_j|^2 + (1 - 1/B) { |E|^2          the target drift
                                                                          { sigma div E     the transport drift

with E = sum_i b_i e_i. Each square is of one combination of y and the outputs. ``log_rate`` adds them up in torch; on a
GPU the fused step takes the inner products of two such combinations while it makes the next x, and ``in_two`` says
which two they are and what is to be made of <u, u>, <u, v>, <v, v>.

>>> from fewstep.models import GaussianMixture, paths
>>> one, two = (GaussianMixture([1.0], [[m]], 1.0).denoiser(paths.edm(), "eps") for m in (0.0, 2.0))
>>> y = torch.ones(1, 1, dtype=torch.float64)                                 # eps: (1 - 0) / 2 and (1 - 2) / 2
>>> outputs = [d.raw(y, 1.0)[0] for d in (one, two)]
>>> log_rate(y, outputs, (one, two), (-1.0, 2.0), 1.0), log_rate(y, outputs, (one, two), (1.0, 1.0), 1.0)
(tensor([2.], dtype=torch.float64), tensor([-0.5000], dtype=torch.float64))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from .blend import is_zero


class Square(NamedTuple):
    """factor |v|^2  of  v = y * its weight + sum of outputs * theirs."""

    factor: float
    y: float
    outputs: tuple[float, ...]


class Pair(NamedTuple):
    """A rate as  uu <u, u> + uv <u, v> + vv <v, v>."""

    u: Square
    v: Square
    uu: float
    uv: float
    vv: float


def squares(leaves: Sequence[Denoiser], exponents: Sequence[float], t: float, diverges: bool) -> list[Square]:
    """What the rate adds up at time t; ``diverges``: a divergence stands in the place of |E|^2.

    Experts are subtracted before they are squared: where they all but agree, the difference of two squares would have
    no digits left.
    """
    active = [k for k, b in enumerate(exponents) if not is_zero(b)]
    total = sum(float(exponents[k]) for k in active)
    found = []
    for i, j in itertools.combinations(active, 2):
        (p, (q,)), (r, (s,)) = leaves[i].affine(t, "eps"), leaves[j].affine(t, "eps")  # type: ignore[misc]
        factor, weights = -float(exponents[i]) * float(exponents[j]) / total, [0.0] * len(leaves)
        if (p, q) == (r, s):
            weights[i], weights[j] = 1.0, -1.0
            found.append(Square(factor * q * q, 0.0, tuple(weights)))
        else:
            weights[i], weights[j] = q, -s
            found.append(Square(factor, p - r, tuple(weights)))
    if not is_one(total) and not diverges:
        found.append(summed(leaves, exponents, t, 1 - 1 / total))
    return found


def summed(leaves: Sequence[Denoiser], powers: Sequence[float], t: float, factor: float = 1.0) -> Square:
    """sum_i powers_i e_i."""
    y, weights = 0.0, [0.0] * len(leaves)
    for k, (b, leaf) in enumerate(zip(powers, leaves, strict=True)):
        if not is_zero(b):
            p, (q,) = leaf.affine(t, "eps")  # type: ignore[misc]
            y, weights[k] = y + float(b) * p, float(b) * q
    return Square(factor, y, tuple(weights))


def combined(square: Square, y: torch.Tensor, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The vector that is squared."""
    total = square.y * y if square.y else None
    for weight, output in zip(square.outputs, outputs, strict=True):
        if weight:
            term = output.to(y.dtype) if weight == 1.0 else weight * output.to(y.dtype)
            total = term if total is None else total + term
    return torch.zeros_like(y) if total is None else total


def log_rate(
    y: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    leaves: Sequence[Denoiser],
    exponents: Sequence[float],
    t: float,
    divergence: torch.Tensor | None = None,
) -> torch.Tensor:
    """d log w / d lam, (B,) in float64: with the divergence (B,) of E for the transport drift, else the target's."""
    rate = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for square in squares(leaves, exponents, t, divergence is not None):
        v = combined(square, y, outputs)
        rate = rate + square.factor * dot(v, v)
    if divergence is not None:
        rate = rate + divergence_factor(leaves, exponents, t) * divergence
    return rate


def divergence_factor(leaves: Sequence[Denoiser], exponents: Sequence[float], t: float) -> float:
    """Of div E: (1 - 1/B) sigma."""
    return (1 - 1 / sum(float(b) for b in exponents)) * float(leaves[0].path.sigma(t))


def in_two(found: Sequence[Square]) -> Pair | None:
    """The same sum from inner products of two vectors; None where there is none, or it takes more.

    >>> gaps = [Square(2.0, 0.0, w) for w in ((1.0, -1.0, 0.0), (1.0, 0.0, -1.0), (0.0, 1.0, -1.0))]
    >>> in_two(gaps)[2:]                            # three experts: the second gap is the sum of the other two
    (4.0, 4.0, 4.0)
    """
    if not found:
        return None
    if len(found) == 3:
        one, whole, two = found
        vectors = [np.array([square.y, *square.outputs]) for square in (one, two, whole)]
        if not np.allclose(vectors[0] + vectors[1], vectors[2], rtol=1e-12, atol=0.0):
            return None
        return Pair(one, two, one.factor + whole.factor, 2 * whole.factor, two.factor + whole.factor)
    if len(found) > 3:
        return None
    u, v = found[0], found[-1]
    return Pair(u, v, u.factor, 0.0, v.factor if len(found) == 2 else 0.0)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B,) in float64."""
    return (a * b).flatten(1).sum(1).double()


def is_one(total: float) -> bool:
    """B = 1 but for rounding: no divergence, and one drift."""
    return abs(total - 1) < 1e-12
