"""The kernel distance of features: unbiased MMD^2 with a cubic kernel (KID, arXiv:1801.01401)."""

from __future__ import annotations

import numpy as np
import torch

from .checks import sample_pair, whole_number
from .mmd import Estimate, kernel_mmd


def cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """k(x, y) = (x.y / D + 1)^3 of rows x (p, D) and y (q, D), shape (p, q).

    >>> cubic_kernel(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])).tolist()
    [[8.0, 1.0]]
    """
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(
    a, b, subsets: int | None = None, subset_size: int = 1000, seed: int = 0, chunk: int = 1024
) -> Estimate:
    """Unbiased KID of features a (m, D) and b (n, D), and its standard error; may be negative.

    subsets None: every pair is used, and the error is the jackknife's, for the scatter of the samples
    themselves. subsets = S: the mean over S pairs of random subsets of `subset_size` rows, drawn without
    replacement by `seed`, as in the paper (100 of 1000); the error is then std / sqrt(S), which tells how
    far the mean is from that of all subsets, not how far the samples are from their distributions. The
    subsets are torch-fidelity's for its `rng_seed` (2020 by default there), a being its input 1.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    >>> value, stderr = kernel_distance(x, x + 1)
    >>> value > 5 * stderr
    True
    """
    a, b = sample_pair(a, b, ("a", "b"), least=2)
    if subsets is None:
        return kernel_mmd(a, b, cubic_kernel, chunk)
    subsets = whole_number(subsets, "subsets", 2)
    size = whole_number(subset_size, "subset_size", 2)
    if size > min(len(a), len(b)):
        smaller = min(len(a), len(b))
        raise ValueError(f"subset_size is {size}; expected at most {smaller}, the rows of the smaller sample")
    draw = np.random.RandomState(seed)  # its stream is frozen
    values = []
    for _ in range(subsets):
        rows_a = torch.from_numpy(draw.choice(len(a), size, replace=False)).to(a.device)
        rows_b = torch.from_numpy(draw.choice(len(b), size, replace=False)).to(b.device)
        values.append(kernel_mmd(a[rows_a], b[rows_b], cubic_kernel, chunk).value)
    scatter = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(scatter.mean()), float(scatter.std() / subsets**0.5))
