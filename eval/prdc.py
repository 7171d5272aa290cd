"""Precision, recall, density, coverage: fidelity and diversity apart, by balls around points (1904.06991, 2002.09797).

With r_i the distance of the real point x_i to its k-th nearest other real one, s_j alike for the M samples y_j,

    precision = share of y_j within r_i of some x_i          recall   = share of x_i within s_j of some y_j
    density   = sum_ij [ |y_j - x_i| <= r_i ] / (k M)        coverage = share of x_i that have some y_j within r_i

Precision and recall take k = 3 in their paper, density and coverage k = 5. Balls are closed, as in the first paper; the
code of the second leaves out the border, which differs only where a sample lies on it, such as a repeated image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import sample_pair, whole_number
from .neighbours import nearest_centred


class PRDC(NamedTuple):
    """Each 0 to 1 but for density, whose mean is 1 where samples are as the real points are."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(samples, real, k: int = 3, chunk: int = 1024) -> PRDC:
    """The four numbers of features `samples` (M, D) against `real` (N, D); chunk: rows and columns held at once.

    Distances are those of brute force in float64: products propose them, and what is within their rounding of a ball's
    border is measured directly.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    >>> prdc(x[:100], x[:100])                       # samples that are the real points
    PRDC(precision=1.0, recall=1.0, density=1.3..., coverage=1.0)
    >>> prdc(x[:100] + 50, x[100:])
    PRDC(precision=0.0, recall=0.0, density=0.0, coverage=0.0)
    """
    samples, real = sample_pair(samples, real, ("samples", "real"))
    k, chunk = whole_number(k, "k"), whole_number(chunk, "chunk")
    for name, points in (("samples", samples), ("real", real)):
        if len(points) <= k:
            raise ValueError(f"{name} has {len(points)} rows; k = {k} needs at least {k + 1}")
    origin = real.mean(dim=0)
    samples, real = samples - origin, real - origin
    # A point is its own nearest neighbour, so that the k-th other one is the k + 1st.
    around_real = nearest_centred(real, real, k + 1, chunk).distance[:, k]
    around_samples = nearest_centred(samples, samples, k + 1, chunk).distance[:, k]
    holds, held = _inside(samples, real, around_real, chunk)
    _, covered = _inside(real, samples, around_samples, chunk)
    return PRDC(
        precision=float((held > 0).double().mean()),
        recall=float((covered > 0).double().mean()),
        density=float(held.sum()) / (k * len(samples)),
        coverage=float((holds > 0).double().mean()),
    )


def _inside(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor, chunk: int):
    """How many points each ball holds (centres,), and how many balls hold each point (points,)."""
    holds = torch.zeros(len(centres), dtype=torch.long, device=points.device)
    held = torch.zeros(len(points), dtype=torch.long, device=points.device)
    # As in `nearest`: each sum of D products is within D eps of the size of its terms.
    unit = 4 * (points.shape[1] + 4) * torch.finfo(points.dtype).eps
    for i in range(0, len(points), chunk):
        some = points[i : i + chunk]
        size = some.square().sum(dim=1, keepdim=True)
        for j in range(0, len(centres), chunk):
            middle, radius = centres[j : j + chunk], radii[j : j + chunk]
            other = middle.square().sum(dim=1)
            gap = size + other - 2 * some @ middle.T - radius.square()
            inside = gap <= 0
            row, column = (gap.abs() <= unit * (size + other)).nonzero(as_tuple=True)
            for few in torch.arange(len(row), device=row.device).split(4 * chunk):
                away = (some[row[few]] - middle[column[few]]).square().sum(dim=1).sqrt()
                inside[row[few], column[few]] = away <= radius[column[few]]
            holds[j : j + chunk] += inside.sum(dim=0)
            held[i : i + chunk] += inside.sum(dim=1)
    return holds, held
