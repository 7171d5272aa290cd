"""Metrics of digits, as ``search(metric=...)`` takes them: samples (n, 1, 8, 8) to a number, small is good.

>>> fd = digit_metric("fd")
>>> real = torch.as_tensor(digits("held_out")[0])
>>> fd.__name__, fd(real) < fd(real.flip(-1))
('fd', True)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..models.classifier import load_classifier
from ..models.digits import digits
from .frechet import frechet_distance
from .kid import kernel_distance
from .moments import gaussian_stats

NAMES = ("fd", "kid")


def digit_metric(name: str) -> Callable[[torch.Tensor], float]:
    """The Frechet ("fd") or the kernel distance ("kid") of classifier features to those of all digits.

    FD is biased upwards by the number of samples, alike for all that have as many; KID is not, and below zero where
    samples are spread more evenly than independent ones, such as over classes dealt out in turn.
    """
    if name not in NAMES:
        raise ValueError(f"metric must be one of {', '.join(NAMES)}, got {name!r}")
    classifier = load_classifier()
    real = classifier.features(torch.as_tensor(digits("all")[0]))
    moments = gaussian_stats(real)

    def seen(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1:] != (1, 8, 8):
            raise ValueError(f"metric {name} is of digits, (n, 1, 8, 8), got samples {tuple(x.shape)}")
        return classifier.features(x.clamp(-1, 1).cpu().float())

    def fd(x: torch.Tensor) -> float:
        return frechet_distance(seen(x), moments)

    def kid(x: torch.Tensor) -> float:
        return kernel_distance(seen(x), real).value

    return fd if name == "fd" else kid
