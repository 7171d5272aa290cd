"""Score implicit matching (2410.16794), and SiD (2404.04057) as ``distance="sid"``: gradients through both networks.

student   loss = - d'(D_critic - D_teacher)^T (D_critic - x0)             at x_t = alpha x0 + sigma eps, graph and all
critic    loss = w(t) |D_critic(x_t) - sg x0|^2
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..levels import Times
from ..losses import sid_loss, sim_loss
from ..players import Batch, Players
from .dmd2 import Numbers, critic_denoising_loss, noised


@dataclass
class SIM:
    """``distance``: huber, l2, log (of ``sim_loss``), or sid with its ``alpha``; ``c``: the Huber width in sqrt(n)."""

    distance: str = "huber"
    c: float = 0.03
    alpha: float = 1.2
    guidance: float = 1.0
    critic_weight: str = "edm"
    times: Times = field(default_factory=lambda: Times("karras", high=0.8))
    critic_times: Times = field(default_factory=lambda: Times("karras"))

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module. The value may be negative; divided by the elements of a sample, as DMD's is."""
        x0 = batch.generate(players.student)
        t, _ = batch.level(self.times, players.teacher)
        x_t, *_ = noised(players.teacher, x0, t, batch.draws.normal("forward", batch.shape))
        real = players.real(x_t, t, batch, self.guidance)
        fake = players.critic(x_t, t, **batch.cond)
        if self.distance == "sid":
            loss = sid_loss(x0, real, fake, self.alpha)
        else:
            loss = sim_loss(x0, real, fake, self.distance, self.c)
        return loss / x0[0].numel(), {"sim": loss.detach(), "gap": (fake - real).detach().abs().mean()}

    def critic_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """The denoising regression."""
        with torch.no_grad():
            x0 = batch.generate(players.student)
        loss = critic_denoising_loss(players, batch, x0, self.critic_times, self.critic_weight)
        return loss, {"critic": loss.detach()}
