"""FD without its bias: what it tends to as the number of samples grows (1911.07023).

The FD of N samples is too large by about c / N, and c depends on the model, so that two models can change places as N
grows. FD of subsets of several sizes lies on a line over 1 / N, whose value at 1 / N = 0 is the estimate.
"""

from __future__ import annotations

import numpy as np
import torch

from .checks import sample_matrix, whole_number
from .frechet import frechet_distance
from .mmd import Estimate
from .moments import Stats, gaussian_stats


def fd_infinity(a, b, points: int = 15, least: int | None = None, seed: int = 0) -> Estimate:
    """The line's value at infinitely many samples of `a` (N, D), against `b`, and its standard error in the fit.

    b is features, a `Gaussian` or a `Stats`; its own bias stays, so give it many. Sizes are `points` from `least`
    (None: N / 10, but more than D) to N, evenly as in the paper; each subset is drawn anew, without replacement.

    >>> draw = torch.Generator().manual_seed(0)
    >>> a, b = torch.randn(2000, 8, generator=draw), torch.randn(50000, 8, generator=draw)
    >>> plain, corrected = frechet_distance(a, b), fd_infinity(a, b)
    >>> abs(corrected.value) < plain                  # the distributions are equal
    True
    """
    a = sample_matrix(a, "a", least=4)
    points = whole_number(points, "points", 3)
    count, dim = a.shape
    # Up to N = D covariances are singular, and FD does not fall as 1 / N there.
    lowest = (
        max(count // 10, min(dim + 1, count // 2), 2) if least is None else whole_number(least, "least", 2)
    )
    if lowest >= count:
        raise ValueError(f"least is {lowest}; expected less than {count}, the rows of a")
    if isinstance(b, Stats):
        b = b.finish()
    elif isinstance(b, (torch.Tensor, np.ndarray)):
        b = gaussian_stats(b)
    draw = torch.Generator().manual_seed(seed)
    sizes = np.unique(np.linspace(lowest, count, points).round().astype(int))
    values = []
    for size in sizes:
        rows = torch.randperm(count, generator=draw)[: int(size)].to(a.device)
        values.append(frechet_distance(a[rows], b))
    design = np.stack([np.ones(len(sizes)), 1 / sizes], axis=1)
    fit, *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    rest = np.array(values) - design @ fit
    spread = float(rest @ rest) / max(1, len(sizes) - 2)
    return Estimate(float(fit[0]), float(np.sqrt(spread * np.linalg.inv(design.T @ design)[0, 0])))
