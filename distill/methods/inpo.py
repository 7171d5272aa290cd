"""DDIM-InPO (2503.18454): Diffusion-DPO at the latents that a sample comes from, found by DDIM inversion.

x_t of winner and loser are their own samples run backwards through the current student's ODE (``losses.invert``), so
that what is tuned is what the sampler meets; the noise to be predicted is the one that this implies,

    eps* = (x_t - alpha x0) / sigma,           and loss = -log sigmoid(-(beta / 2) [(e_w - e_l) - (b_w - b_l)])

The released code differs: one t for a whole batch (its first; ``levels: one``, here each pair has its own), ten steps
over all times of which those below t are made (here ``steps`` below every t), and the last of them ends at the grid's
time below t, whose latents are then told to be at t. Here they end at t. ``inversion.told: then`` is the code's, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..levels import time_at
from ..losses import invert
from ..players import Batch, Players
from .dpo import DPO
from .preference import Noised, both, cond_of_both, twice

LEVELS = ("own", "one")


@dataclass
class Inversion:
    """``steps`` at equal shares of the law of t; ``eta``, ``refine`` and ``told`` as in ``losses.invert``."""

    steps: int = 4
    eta: float = 0.1
    refine: int = 0
    told: str = "now"

    def __post_init__(self):
        if self.steps < 1 or self.refine < 0:
            raise ValueError(
                f"inversion.steps must be 1 or more and inversion.refine 0 or more, got {self.steps} and {self.refine}"
            )
        if self.told not in ("now", "then"):
            raise ValueError(f"inversion.told must be now or then, got {self.told!r}")

    @property
    def calls(self) -> int:
        """Network calls of a sample."""
        return self.steps * (1 + self.refine)


@dataclass
class InPO(DPO):
    """``levels``: own, a time for each pair, or one for all; see ``DPO`` for the rest."""

    levels: str = "own"
    inversion: Inversion = field(default_factory=Inversion)

    def __post_init__(self):
        super().__post_init__()
        if self.levels not in LEVELS:
            raise ValueError(f"method.levels must be one of {', '.join(LEVELS)}, got {self.levels!r}")

    def cost(self) -> int:
        """And the inversion, once for all updates."""
        return super().cost() + 2 * self.inversion.calls

    def collect(self, players: Players, batch: Batch) -> Noised:
        """Both samples of each pair, inverted by the student as it is."""
        d, draws, inversion = players.student.d, batch.draws, self.inversion
        share = draws.stratified("level")
        if self.levels == "one":
            share = torch.full_like(share, (draws.choice("level", 10**6) + 0.5) / 10**6)
        parts = torch.linspace(0, 1, inversion.steps + 1, dtype=torch.float64, device=share.device)
        times = time_at(self.times, d.path, parts[:, None] * share)

        def noise(k: int) -> torch.Tensor:
            drawn = draws._replace(turn=draws.turn * inversion.steps + k).normal("forward", (2, *batch.shape))
            return torch.cat(drawn.unbind(1))

        cond = cond_of_both(batch)
        x = invert(
            d, both(batch.pairs), twice(times, 1), inversion.refine, inversion.told, inversion.eta, noise, **cond
        )  # fmt: skip
        return Noised(x, times[-1])

    def noised(self, players: Players, batch: Batch) -> Noised:
        """What ``collect`` found."""
        return batch.collected
