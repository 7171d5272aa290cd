"""The Inception score: how sure a classifier is of each sample, and how evenly it names the classes (1606.03498).

    IS = exp E_x KL( p(y | x) || p(y) ),   p(y) = E_x p(y | x)

It never looks at real images, and is of a network's classes: Inception's for photographs, the digit classifier's for
digits. Between 1 and the number of classes; large is good.
"""

from __future__ import annotations

import numpy as np
import torch

from .checks import sample_matrix, whole_number
from .mmd import Estimate


def inception_score(logits, splits: int = 10, seed: int | None = 2020, chunk: int = 4096) -> Estimate:
    """The mean of the scores of `splits` parts of logits (N, K), and their standard deviation as stderr.

    Parts are runs of rows after a permutation by `seed`, torch-fidelity's for the same rng_seed; None keeps the order.
    The score of few samples is too small, so N and splits belong to the number: 50,000 and 10 in the papers.

    >>> even = 50 * torch.eye(4).repeat(8, 1)                  # 32 samples, each sure, classes alike
    >>> round(inception_score(even, splits=1).value, 9)
    4.0
    """
    logits = sample_matrix(logits, "logits", least=2)
    splits = whole_number(splits, "splits")
    count = len(logits)
    if splits > count:
        raise ValueError(f"splits is {splits}; expected at most {count}, the rows of logits")
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(count)).to(logits.device)]
    scores = []
    for part in range(splits):
        rows = logits[part * count // splits : (part + 1) * count // splits]
        logs = [some.log_softmax(dim=1) for some in rows.split(chunk)]
        whole = sum(some.exp().sum(dim=0) for some in logs) / len(rows)
        # 0 log 0 is 0: a class that nothing here is given has no share in any sample.
        log_whole = torch.where(whole > 0, whole, torch.ones_like(whole)).log()
        kl = sum((some.exp() * (some - log_whole)).sum() for some in logs) / len(rows)
        scores.append(float(torch.exp(kl)))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))
