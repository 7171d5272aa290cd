"""Diffusion-DPO (2311.12908): what is preferred is to be denoised better than the reference does, and the rest worse.

    loss = -log sigmoid(-(beta / 2) [(e_w - e_l) - (b_w - b_l)])

e and b are the errors of student and frozen teacher, at the same t and with the same noise for both of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..losses import dpo_loss, preference_logit
from ..pairs import Pairs
from .preference import Errors, Preference


@dataclass
class DPO(Preference):
    """``beta``: how near to the reference the student is kept, more is nearer; see ``Preference`` for the rest."""

    beta: float = 5000.0

    def objective(self, errors: Errors, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """See the module."""
        u = preference_logit(*errors, beta=self.beta)
        return dpo_loss(u), u
