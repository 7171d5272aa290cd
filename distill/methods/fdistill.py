"""f-distill (2502.15681): DMD2's gradient weighted by h(r), r the density ratio that its discriminator has learnt.

The discriminator is evaluated at the very x_t and t of the score difference. With ``divergence="rkl"`` h is 1 and this
is DMD2 with its GAN at that level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..discriminator import estimate_and_logits
from ..levels import Times
from ..losses import (
    LevelMeans,
    density_ratio,
    divergence_weight,
    dmd_gradient,
    generator_loss,
    level_means,
    surrogate,
)
from ..losses.divergences import is_clipped
from ..players import Batch, Players
from .dmd2 import Gan, Numbers, critic_denoising_loss, gan_critic_loss, noised


class Judged(NamedTuple):
    """A student's samples, noised, and what the discriminator says of them; ``estimate`` came with its features."""

    x0: torch.Tensor
    x_t: torch.Tensor
    t: torch.Tensor
    share: torch.Tensor
    estimate: torch.Tensor
    logits: torch.Tensor


@dataclass
class FDistill:
    """``bins`` of the noise level in which the ratio is self-normalised (0: not); each remembers ``memory`` samples."""

    divergence: str = "js"
    guidance: float = 1.0
    weight: str = "dmd"
    critic_weight: str = "edm"
    bins: int = 10
    memory: float = 1024.0
    times: Times = field(default_factory=lambda: Times("karras", low=0.02, high=0.98))
    critic_times: Times = field(default_factory=lambda: Times("karras"))
    gan: Gan = field(default_factory=lambda: Gan(student=1e-3, critic=1.0, features="teacher"))

    def __post_init__(self):
        self.means: LevelMeans | None = None

    def state(self) -> dict[str, torch.Tensor]:
        """The running means of the ratio, for a checkpoint."""
        return (self.means or LevelMeans.start(self.bins))._asdict()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Back from a checkpoint."""
        self.means = LevelMeans(**state)

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        x0, x_t, t, share, estimate, logits = self._judged(players, batch)
        known = estimate.detach()  # one of the two estimates came with the features
        with torch.no_grad():
            of_teacher = players.features is players.teacher
            real = players.real(x_t, t, batch, self.guidance, known if of_teacher else None)
            fake = players.critic(x_t, t, **batch.cond) if of_teacher else known
            ratio = density_ratio(logits)
            h = self._weights(ratio, share, batch) if batch.scale is None else batch.scale
        path = players.teacher.path
        gradient = dmd_gradient(x0, real, fake, path.alpha(t), path.sigma(t), self.weight, scale=h)
        adversarial = generator_loss(logits)
        loss = surrogate(x0, gradient) + self.gan.student * adversarial
        return loss, {
            "gradient": gradient.square().mean().sqrt(),
            "ratio": ratio.mean(),
            "ratio_clipped": is_clipped(ratio).float().mean(),
            "weight_square": h.square().mean(),
            "gan_student": adversarial.detach(),
        }

    def weigh(self, players: Players, batches: Sequence[Batch]) -> list[Batch]:
        """The parts of one batch with their samples' weights, which have mean 1 over all parts and not over each.

        It costs a forward more. What is one part with the others' ranks finds its weights on its way.
        """
        judged = [self._judged(players, batch) for batch in batches]
        ratio = torch.cat([density_ratio(part.logits) for part in judged])
        h = self._weights(ratio, torch.cat([part.share for part in judged]), batches[0])
        parts = h.split([len(part.t) for part in judged])
        return [batch._replace(scale=part) for batch, part in zip(batches, parts, strict=True)]

    def _judged(self, players: Players, batch: Batch) -> Judged:
        x0 = batch.generate(players.student)
        t, share = batch.level(self.times, players.teacher)
        # with its graph: the GAN's part goes through x_t, the score difference does not
        x_t, *_ = noised(players.teacher, x0, t, batch.draws.normal("forward", batch.shape))
        estimate, logits = estimate_and_logits(players.features, players.discriminator, x_t, t, batch.cond)
        return Judged(x0, x_t, t, share, estimate, logits)

    def _weights(self, ratio: torch.Tensor, share: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.bins:
            state = self.means or LevelMeans.start(self.bins, ratio.device)
            share = share.to(ratio.device)
            self.means, mean = level_means(state, ratio, share, self.memory, reduce=batch.reduce)
            ratio = ratio / mean
        return divergence_weight(ratio, self.divergence, batch.reduce)

    def critic_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """DMD2's. ``gan.times`` must cover ``times``: where no level was learnt the ratio is a guess."""
        with torch.no_grad():
            x0 = batch.generate(players.student)
        loss = critic_denoising_loss(players, batch, x0, self.critic_times, self.critic_weight)
        adversarial, logits = gan_critic_loss(self.gan, players, batch, x0)
        return loss + self.gan.critic * adversarial, {
            "critic": loss.detach(),
            "gan_critic": adversarial.detach(),
            **logits,
        }
