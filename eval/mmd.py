"""Unbiased squared maximum mean discrepancy (arXiv:0805.2368), with a standard error, in bounded memory.

    MMD^2 = sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1))
            - 2 sum_{i, j} k(x_i, y_j) / (m n)

Its mean is exactly 0 for equal distributions, at any sample size, so it may come out negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .checks import sample_matrix, sample_pair, whole_number

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    stderr: float


def rbf_mmd(
    a, b, bandwidths: float | Sequence[float] | None = None, chunk: int = 1024, seed: int = 0
) -> Estimate:
    """Unbiased MMD^2 of samples a (m, D) and b (n, D) under k(x, y) = mean_h exp(-|x - y|^2 / (2 h^2)).

    bandwidths: one h or several; None takes the median distance of the pooled sample, which treats both
    samples alike and so keeps the mean at 0 for equal distributions. chunk: rows held at once, for
    O(chunk^2) memory. The standard error is the jackknife's.

    >>> a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
    >>> round(rbf_mmd(a, b, bandwidths=1.0).value, 6)          # exp(-1/2) - 1
    -0.393469
    """
    a, b = sample_pair(a, b, ("a", "b"), least=2)
    widths = [median_distance(torch.cat([a, b]), seed=seed)] if bandwidths is None else _widths(bandwidths)
    origin = torch.cat([a, b]).mean(dim=0)  # distances by products lose digits far from the origin

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        square = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)
        return torch.stack([torch.exp(square / (-2 * h * h)) for h in widths]).mean(dim=0)

    return kernel_mmd(a - origin, b - origin, kernel, chunk)


def median_distance(x, rows: int = 1000, seed: int = 0) -> float:
    """The median heuristic: the median of |x_i - x_j|, i < j, over at most `rows` rows drawn by `seed`.

    >>> median_distance(torch.tensor([[0.0], [1.0], [3.0]]))
    2.0
    """
    x = sample_matrix(x, "x", least=2)
    rows = whole_number(rows, "rows", 2)
    if len(x) > rows:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:rows].to(x.device)]
    median = float(torch.pdist(x).median())
    if median == 0:
        raise ValueError("x has a median distance of 0 (most rows are equal); give bandwidths instead")
    return median


def kernel_mmd(a: torch.Tensor, b: torch.Tensor, kernel: Kernel, chunk: int = 1024) -> Estimate:
    """Unbiased MMD^2 of a (m, D) and b (n, D) under `kernel`, which maps (p, D) and (q, D) to (p, q).

    The standard error is the delete-one jackknife over both samples, infinite for fewer than 3 rows. All
    its leave-one-out values follow from the row sums of the three kernel matrices, so it costs nothing
    beyond them; it errs upward (Efron and Stein, 1981), by a factor near sqrt(2) where the distributions
    are equal.

    >>> x = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    >>> round(kernel_mmd(x, x, lambda p, q: p @ q.T).value, 6)          # 2 * 28/6 - 2 * 49/9
    -1.555556
    """
    chunk = whole_number(chunk, "chunk")
    a, b = sample_pair(a, b, ("a", "b"), least=2)
    m, n = len(a), len(b)
    within_a = _row_sums(a, a, kernel, chunk, diagonal=False)[0]
    within_b = _row_sums(b, b, kernel, chunk, diagonal=False)[0]
    a_to_b, b_to_a = _row_sums(a, b, kernel, chunk, diagonal=True)
    sum_a, sum_b, cross = within_a.sum(), within_b.sum(), a_to_b.sum()
    mean_a, mean_b = sum_a / (m * (m - 1)), sum_b / (n * (n - 1))
    value = float(mean_a + mean_b - 2 * cross / (m * n))
    if min(m, n) < 3:
        return Estimate(value, float("inf"))
    without_a = (sum_a - 2 * within_a) / ((m - 1) * (m - 2)) + mean_b - 2 * (cross - a_to_b) / ((m - 1) * n)
    without_b = (sum_b - 2 * within_b) / ((n - 1) * (n - 2)) + mean_a - 2 * (cross - b_to_a) / (m * (n - 1))
    variance = without_a.var(correction=0) * (m - 1) + without_b.var(correction=0) * (n - 1)
    return Estimate(value, float(variance.sqrt()))


def _row_sums(x: torch.Tensor, y: torch.Tensor, kernel: Kernel, chunk: int, diagonal: bool):
    """Sums of k(x_i, y_j) over j and over i; without the terms i = j unless `diagonal`."""
    over_y, over_x = x.new_zeros(len(x)), x.new_zeros(len(y))
    for i in range(0, len(x), chunk):
        for j in range(0, len(y), chunk):
            block = kernel(x[i : i + chunk], y[j : j + chunk])
            if i == j and not diagonal:
                block = block - torch.diag(block.diagonal())
            over_y[i : i + chunk] += block.sum(dim=1)
            over_x[j : j + chunk] += block.sum(dim=0)
    return over_y, over_x


def _widths(bandwidths) -> list[float]:
    try:
        widths = np.atleast_1d(np.asarray(bandwidths, dtype=float)).ravel().tolist()
    except (TypeError, ValueError):
        widths = []
    if not widths or not all(0 < h < float("inf") for h in widths):
        raise ValueError(f"bandwidths is {bandwidths!r}; expected a positive number or several")
    return widths
