"""A metric a class: of the samples that were to be of it, against the real images that are (intra-FID, 1802.05637).

A model that mixes classes up can have a good FD of everything and bad ones of each. Their mean is the usual summary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .checks import sample_pair

T = TypeVar("T")


def by_class(
    metric: Callable[[Any, Any], T], samples, sample_labels, real, real_labels, least: int = 2
) -> dict[int, T]:
    """metric(samples of c, real of c) for every class c of the samples, in order; features (n, D), labels (n,).

    A class of fewer than `least` on either side is an error: silently leaving it out would flatter.

    >>> x = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> by_class(lambda a, b: float(a.mean() - b.mean()), x, labels, x.flip(0), labels)
    {0: -11.0, 1: 11.0}
    """
    samples, real = sample_pair(samples, real, ("samples", "real"))
    sample_labels = _labels(sample_labels, len(samples), "sample_labels").to(samples.device)
    real_labels = _labels(real_labels, len(real), "real_labels").to(real.device)
    found = {}
    for label in sample_labels.unique().tolist():
        ours, theirs = samples[sample_labels == label], real[real_labels == label]
        if min(len(ours), len(theirs)) < least:
            raise ValueError(
                f"class {label} has {len(ours)} samples and {len(theirs)} real images; expected at least {least} each"
            )
        found[label] = metric(ours, theirs)
    return found


def _labels(labels, count: int, name: str) -> torch.Tensor:
    labels = torch.as_tensor(labels)
    if tuple(labels.shape) != (count,) or labels.dtype.is_floating_point:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)} and dtype {labels.dtype}; expected ({count},) integers"
        )
    return labels
