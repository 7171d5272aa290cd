"""Rewards of digit images: functions from x0 (B, 1, 8, 8) to (B,), differentiable in x0.

>>> reward = class_probability(3)
>>> reward(torch.zeros(2, 1, 8, 8)).shape
torch.Size([2])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .classifier import load_classifier

Reward = Callable[[torch.Tensor], torch.Tensor]


def class_probability(label: int, classifier: nn.Module | None = None, log: bool = False) -> Reward:
    """p(label | x0) by the digit classifier (or its log, which has a gradient where p is close to 0 or 1)."""
    if not isinstance(label, int) or not 0 <= label < 10:
        raise ValueError(f"label must be an integer from 0 to 9, got {label!r}")
    judge = load_classifier() if classifier is None else classifier

    def reward(x0: torch.Tensor) -> torch.Tensor:
        log_p = judge(x0.float())[1].log_softmax(dim=-1)[:, label]
        return log_p if log else log_p.exp()

    return reward


def ink() -> Reward:
    """The mean darkness, (1 + x0) / 2 averaged over pixels: 0 for an empty image, 1 for a full one.

    >>> ink()(torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 8, 8))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return lambda x0: (1 + x0.float()).flatten(1).mean(dim=1) / 2
