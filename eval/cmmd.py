"""CMMD: a kernel distance of CLIP embeddings, good at small N (2401.09603).

    CMMD = 1000 MMD^2,   k(x, y) = exp(-|x - y|^2 / (2 s^2)),  s = 10,  of x / |x|

The paper states the unbiased estimate; the code that came with it keeps the terms i = j, which adds
1000 (1 - mean k) / N for each side, so that its numbers depend on N a little. Both are offered.
"""

from __future__ import annotations

import torch

from .checks import sample_pair
from .mmd import Estimate, kernel_mmd

WIDTH, SCALE = 10.0, 1000.0
ESTIMATORS = ("unbiased", "released")


def cmmd(a, b, estimator: str = "unbiased", chunk: int = 1024) -> Estimate:
    """CMMD of embeddings a (m, D) and b (n, D), which are brought to length 1 here.

    >>> x = torch.eye(3)
    >>> abs(cmmd(x, x, "released").value) < 1e-9
    True
    >>> round(cmmd(x, x).value, 6)                 # 2 (e - (1 + 2 e) / 3) 1000, e = exp(-1/100)
    -6.633444
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    a, b = (_unit(x, name) for x, name in zip(sample_pair(a, b, ("a", "b"), least=2), ("a", "b")))

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.exp((x @ y.T - 1) / WIDTH**2)  # |x - y|^2 = 2 - 2 x.y

    value, stderr = kernel_mmd(a, b, kernel, chunk)
    if estimator == "released":
        value += _own_terms(a, kernel, chunk) + _own_terms(b, kernel, chunk)
    return Estimate(SCALE * value, SCALE * stderr)


def _unit(x: torch.Tensor, name: str) -> torch.Tensor:
    length = x.norm(dim=1, keepdim=True)
    if bool((length == 0).any()):
        raise ValueError(f"{name} has a row of zeros, which has no direction")
    return x / length


def _own_terms(x: torch.Tensor, kernel, chunk: int) -> float:
    """What the mean of k(x_i, x_j) over all pairs has more than that over the pairs i != j."""
    total = sum(float(kernel(some, other).sum()) for some in x.split(chunk) for other in x.split(chunk))
    count = len(x)
    return total / count**2 - (total - count) / (count * (count - 1))
