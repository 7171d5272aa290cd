"""DMD2 (2405.14867): reverse KL by the difference of two denoisers, a critic on two time scales, and a GAN beside it.

student   x0 = G(z);  x_t = alpha x0 + sigma eps;  g = (D_critic - D_teacher)(x_t) / mean|x0 - D_teacher|
          loss = sg[g] x0  +  w_G softplus(-logit(x_s))                       x_s noised anew, at a level of its own
critic    loss = w(t) |D_critic(x_t) - sg x0|^2  +  w_D (softplus(logit(fake_s)) + softplus(-logit(real_s)))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...models.denoiser import Denoiser
from ..discriminator import estimate_and_logits
from ..levels import Times
from ..losses import (
    approximate_r1,
    denoising_loss,
    discriminator_loss,
    dmd_gradient,
    generator_loss,
    surrogate,
)
from ..players import Batch, Players

Numbers = dict[str, torch.Tensor]


@dataclass
class Gan:
    """``student`` and ``critic`` are the weights of its losses (0: no GAN), ``r1`` that of the penalty.

    ``features``: ``critic`` (DMD2) or ``teacher`` (FastGen); ``layers``: names of submodules to read.
    """

    student: float = 0.0
    critic: float = 0.01
    features: str = "critic"
    layers: list[str] = field(default_factory=list)
    width: int | None = None
    r1: float = 0.0
    r1_scale: float = 0.01
    times: Times = field(default_factory=lambda: Times("karras"))


@dataclass
class DMD2:
    """``weight``: as in ``dmd_gradient``; ``critic_weight``: as in ``x0_weight``; ``guidance``: of the teacher."""

    guidance: float = 1.0
    weight: str = "dmd"
    critic_weight: str = "edm"
    times: Times = field(default_factory=lambda: Times("karras", low=0.02, high=0.98))
    critic_times: Times = field(default_factory=lambda: Times("karras"))
    gan: Gan = field(default_factory=Gan)

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        x0 = batch.generate(players.student)
        t, _ = batch.level(self.times, players.teacher)
        x_t, alpha, sigma = noised(
            players.teacher, x0.detach(), t, batch.draws.normal("forward", batch.shape)
        )
        with torch.no_grad():
            real = players.real(x_t, t, batch, self.guidance)
            fake = players.critic(x_t, t, **batch.cond)
        gradient = dmd_gradient(x0, real, fake, alpha, sigma, self.weight)
        loss = surrogate(x0, gradient)
        numbers = {"gradient": gradient.square().mean().sqrt(), "gap": (fake - real).abs().mean()}
        if self.gan.student:
            adversarial = gan_student_loss(self.gan, players, batch, x0)
            loss = loss + self.gan.student * adversarial
            numbers["gan_student"] = adversarial.detach()
        return loss, numbers

    def critic_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        with torch.no_grad():
            x0 = batch.generate(players.student)
        loss = critic_denoising_loss(players, batch, x0, self.critic_times, self.critic_weight)
        numbers = {"critic": loss.detach()}
        if self.gan.student:
            adversarial, logits = gan_critic_loss(self.gan, players, batch, x0)
            loss = loss + self.gan.critic * adversarial
            numbers |= {"gan_critic": adversarial.detach(), **logits}
        return loss, numbers


def noised(
    d: Denoiser, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_t, alpha, sigma) at times t (B,)."""
    return d.path.add_noise(x0, t, eps), d.path.alpha(t), d.path.sigma(t)


def critic_denoising_loss(
    players: Players, batch: Batch, x0: torch.Tensor, law: Times, weight: str
) -> torch.Tensor:
    """The critic's regression on the student's samples: its score becomes theirs."""
    t, _ = batch.level(law, players.critic)
    x_t, alpha, sigma = noised(players.critic, x0, t, batch.draws.normal("forward", batch.shape))
    estimate = players.critic(x_t, t, **batch.cond)
    return denoising_loss(estimate, x0, alpha, sigma, weight, players.critic.sigma_data)


def gan_student_loss(gan: Gan, players: Players, batch: Batch, x0: torch.Tensor) -> torch.Tensor:
    """softplus(-logit) of the noised samples; its gradient passes through the features to the student."""
    t, _ = batch.level(gan.times, players.teacher, "gan_level")
    x_s, *_ = noised(players.teacher, x0, t, batch.draws.normal("gan_forward", batch.shape))
    return generator_loss(estimate_and_logits(players.features, players.discriminator, x_s, t, batch.cond)[1])


def gan_critic_loss(
    gan: Gan, players: Players, batch: Batch, x0: torch.Tensor
) -> tuple[torch.Tensor, Numbers]:
    """Real against fake at the same levels with noise of their own, and the R1 penalty where asked for."""
    if batch.real is None:
        raise ValueError("gan.student > 0 needs real data: the batch has none (data.path)")
    t, _ = batch.level(gan.times, players.teacher, "gan_level")
    logits = []
    for x, purpose in ((x0, "gan_forward"), (batch.real, "real_forward")):
        x_s, *_ = noised(players.teacher, x, t, batch.draws.normal(purpose, batch.shape))
        logits.append(estimate_and_logits(players.features, players.discriminator, x_s, t, batch.cond)[1])
    fake, real = logits
    loss = discriminator_loss(real, fake)
    if gan.r1:
        loss = loss + gan.r1 * approximate_r1(
            lambda x: estimate_and_logits(players.features, players.discriminator, x, t, batch.cond)[1],
            x_s,
            gan.r1_scale,
            batch.draws.normal("user", batch.shape),
            real,
        )
    right = torch.cat([real.detach() > 0, fake.detach() < 0]).float().mean()
    return loss, {
        "logit_real": real.detach().mean(),
        "logit_fake": fake.detach().mean(),
        "gan_accuracy": right,
    }
