"""How far a metric would move with other samples: the delete-a-group jackknife (Quenouille, 1956; Tukey, 1958).

With the samples in g groups and T_(i) the metric without group i,

    stderr^2 = (g - 1) / g  sum_i (T_(i) - mean T)^2

It holds for smooth functions of means, as FD, KID and IS are, not for counts of nearest neighbours, nor for medians.
KID and MMD have their own, of single samples, for nothing (``kernel_mmd``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .checks import sample_matrix, whole_number
from .frechet import frechet_distance
from .mmd import Estimate
from .moments import Gaussian, Stats, stream_stats

# Two-sided Student quantiles of 95 % for g - 1 degrees of freedom, g = 2 to 30; beyond, the normal's is near enough.
T95 = [
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
]
T95 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045]


def jackknife(metric: Callable[[torch.Tensor], float], x, groups: int = 10) -> Estimate:
    """metric(x) of rows x (N, ...), and its standard error; row i is in group i modulo `groups`.

    >>> x = torch.tensor([[1.0], [2.0], [4.0], [7.0]])
    >>> value, stderr = jackknife(lambda rows: float(rows.mean()), x, groups=4)
    >>> abs(stderr - float(x.std()) / 2) < 1e-6             # of a mean it is the usual one
    True
    """
    x = torch.as_tensor(x)
    groups = _groups(groups, len(x))
    of = torch.arange(len(x), device=x.device) % groups
    without = [metric(x[of != group]) for group in range(groups)]
    return Estimate(metric(x), _error(without))


def frechet_jackknife(a, b, groups: int = 10) -> Estimate:
    """FD of features a (N, D) to `b` and its standard error, from the moments of the groups: each row is seen once.

    b: features, a `Gaussian` or a `Stats`, taken as exact. Costs `groups` + 1 traces. A group has to leave more than D
    samples, or FD without it is another quantity: FD of N <= D samples is refused an error here.
    """
    a = sample_matrix(a, "a", least=2)
    groups = _groups(groups, len(a))
    if len(a) - math.ceil(len(a) / groups) <= a.shape[1]:
        raise ValueError(
            f"a has {len(a)} rows of {a.shape[1]} dimensions; without one of {groups} groups more rows than dimensions "
            "must be left"
        )
    b = b if isinstance(b, (Gaussian, Stats)) else stream_stats([sample_matrix(b, "b", least=2)])
    parts = [stream_stats([a[group::groups]]) for group in range(groups)]
    return Estimate(
        frechet_distance(merged(parts), b), _error([frechet_distance(s, b) for s in leaving_one(parts)])
    )


def interval(estimate: Estimate, groups: int) -> tuple[float, float]:
    """The 95 % confidence interval of a jackknife of so many groups, by Student's t.

    >>> interval(Estimate(2.0, 0.1), groups=10)
    (1.7738, 2.2262)
    """
    groups = whole_number(groups, "groups", 2)
    reach = estimate.stderr * (T95[groups - 2] if groups - 2 < len(T95) else 1.96)
    return estimate.value - reach, estimate.value + reach


def merged(parts: list[Stats]) -> Stats:
    """All of them together."""
    total = Stats()
    for part in parts:
        total = total.merge(part)
    return total


def leaving_one(parts: list[Stats]):
    """All but each of them in turn, holding two sums at a time."""
    for left in range(len(parts)):
        yield merged([part for place, part in enumerate(parts) if place != left])


def _groups(groups: int, rows: int) -> int:
    groups = whole_number(groups, "groups", 2)
    if groups > rows:
        raise ValueError(f"groups is {groups}; expected at most {rows}, the rows of x")
    return groups


def _error(without: list[float]) -> float:
    values = torch.tensor(without, dtype=torch.float64)
    return float(((values - values.mean()).square().sum() * (len(values) - 1) / len(values)).sqrt())
