"""MaPO (2406.06424): a margin between winners and losers, and no reference model.

    loss = e_w - beta log sigmoid(T [h(e_w) - h(e_l)]),           h(e) = k e / (exp(k e) - 1)

at the same t and with the same noise for both. The first term is supervised training on winners.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..losses import mapo_loss
from ..pairs import Pairs
from .preference import Errors, Preference


@dataclass
class MaPO(Preference):
    """``beta``: the margin's weight; ``k``, ``horizon``: as in ``losses.mapo_loss``, T being the horizon."""

    beta: float = 0.1
    k: float = 0.5
    horizon: float = 1000.0
    compares = False

    def objective(self, errors: Errors, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module."""
        return mapo_loss(errors.winner, errors.loser, self.beta, self.k, self.horizon)
