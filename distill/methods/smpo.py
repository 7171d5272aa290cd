"""SmPO (2506.02698): InPO with labels as sure as the reward is, and an inversion that asks again where it leads to.

    p = softmax of both scores, put on 0 .. 1 by their range;         loss = -log sigmoid(10 (2 p - 1) u)

so that pairs that are next to alike count next to nothing. The code's 10 is ``sharpness``; ``labels: expected`` is the
mean of DPO's loss under p (see ``losses.smpo_loss``). The range is that of the pairs' scores; the code's is PickScore's
on its data, [0.1154, 0.2820].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..losses import preference_logit, smoothed_labels, smpo_loss
from ..pairs import Pairs
from .inpo import InPO, Inversion
from .preference import Errors


@dataclass
class SmPO(InPO):
    """``range``: the scores that 0 and 1 are put on, if not the pairs' least and most.

    ``labels``, ``sharpness``: as in ``losses.smpo_loss``.
    """

    range: list[float] | None = None
    labels: str = "geometric"
    sharpness: float = 10.0
    inversion: Inversion = field(default_factory=lambda: Inversion(steps=2, eta=0.0, refine=1))

    def __post_init__(self):
        super().__post_init__()
        if self.range is not None and (len(self.range) != 2 or not self.range[1] > self.range[0]):
            raise ValueError(f"method.range must be the least score and the most, got {list(self.range)}")
        if self.labels not in ("geometric", "expected"):
            raise ValueError(f"method.labels must be geometric or expected, got {self.labels!r}")

    def objective(self, errors: Errors, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module."""
        if pairs.scores is None:
            raise ValueError(
                "SmPO is as sure of a pair as its scores are apart, and the pairs have no scores"
            )
        u = preference_logit(*errors, beta=self.beta)
        low, high = pairs.span.unbind() if self.range is None else self.range
        p = smoothed_labels(*pairs.scores.to(u.dtype).unbind(1), low, high)
        return smpo_loss(u, p, self.labels, self.sharpness), u
