"""Distilled Decoding 2 (2510.21003): a one-step student of an autoregressive model, by one conditional score a place.

student   x0 = G(z), all n places from one call;  x_t,i = alpha x0_i + sigma eps_i, a level of its own at each place
          loss = d(D_critic, D_teacher)(x_t,i; sg x0_<i)                     see ``losses.conditional_score``
critic    loss = w(t_i) |D_critic(x_t,i; sg x0_<i) - sg x0_i|^2
start     w(t_i) |D(x_t,i; x0_<i) - D_teacher(x_t,i; x0_<i)|^2 on the teacher's samples: the GTS loss, of the network
          that both student and critic are copies of (``autoregressive_start``)

From the paper: the teacher's closed-form score, the straight path, SiD's form, the prefix without a gradient, both
networks from one autoregressive diffusion model fitted by the GTS loss. Ours, since its text does not say or was not to
be had, and its code was not released: the student is that network with noise in place of the prefix; what stands before
is rounded to codewords for teacher and critic alike, so that both condition on the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...models import paths
from ...models.autoregressive import Autoregressive
from ...models.codebook import Codebook
from ...models.denoiser import Denoiser
from ...models.load import build
from ..draws import Draws
from ..levels import Times, time_at
from ..losses.conditional_score import conditional_critic_loss, conditional_distillation_loss
from ..players import Batch, Players
from .dmd2 import Numbers

BANK = 2000  # samples of the teacher that the start is fitted on


@dataclass
class DD2:
    """``distance`` (sid with its ``alpha``, or dmd), ``groups``: as in ``conditional_distillation_loss``."""

    distance: str = "sid"
    alpha: float = 1.0
    groups: str = "place"
    critic_weight: str = "flow"
    times: Times = field(default_factory=lambda: Times("uniform", low=0.02, high=0.98))
    critic_times: Times = field(default_factory=lambda: Times("uniform", low=0.02, high=1.0))

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        x0 = book_of(players.teacher).split(batch.generate(players.student))
        real, fake, _ = self._estimates(players, batch, x0)
        loss = conditional_distillation_loss(x0, real, fake, self.distance, self.alpha, self.groups)
        book = book_of(players.teacher)
        return loss, {
            "gap": (fake - real).detach().abs().mean(),
            "off_codebook": (x0 - book.rounded(x0)).detach().abs().mean(),
        }

    def critic_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """The denoising regression, given what stands before."""
        book = book_of(players.teacher)
        with torch.no_grad():
            x0 = book.split(batch.generate(players.student))
        path = players.teacher.path
        t = levels(batch.draws, self.critic_times, path, x0)
        x_t = path.add_noise(x0, t, batch.draws.normal("forward", tuple(x0.shape[1:])))
        estimate = players.critic(x_t, t, prefix=book.rounded(x0), **batch.cond)
        loss = conditional_critic_loss(estimate, x0, path.alpha(t), path.sigma(t), self.critic_weight)
        return loss, {"critic": loss.detach()}

    def examined(self, players: Players, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Critic, teacher, what both aim at, and weights, a row a place: what ``diagnostics`` looks at."""
        x0 = book_of(players.teacher).split(batch.generate(players.student))
        real, fake, t = self._estimates(players, batch, x0)
        weight = players.teacher.path.sigma(t).flatten() ** -2
        return fake.flatten(0, 1), real.flatten(0, 1), x0.flatten(0, 1), weight

    def _estimates(
        self, players: Players, batch: Batch, x0: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(D_teacher, D_critic, t) at the student's places, noised; x_t keeps x0's graph where it is wanted."""
        path, prefix = players.teacher.path, book_of(players.teacher).rounded(x0.detach())
        t = levels(batch.draws, self.times, path, x0)
        noise = batch.draws.normal("forward", tuple(x0.shape[1:]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.distance == "sid"):
            x_t = path.add_noise(x0, t, noise)
            real = players.teacher(x_t, t, prefix=prefix, **batch.cond)
            fake = players.critic(x_t, t, prefix=prefix, **batch.cond)
        return real, fake, t


def levels(draws: Draws, law: Times, path: paths.Path, x0: torch.Tensor) -> torch.Tensor:
    """t (B, n), drawn for each place of x0 (B, n, d)."""
    return time_at(law, path, draws.uniforms("level", x0.shape[1]))


def book_of(teacher: Denoiser) -> Codebook:
    """The codebook of an autoregressive teacher; ValueError of any other."""
    if not isinstance(teacher.net, Autoregressive):
        raise ValueError(
            f"method dd2 distils autoregressive models, such as teacher.path = digits-ar; got a teacher whose network "
            f"is {type(teacher.net).__name__}"
        )
    return teacher.net.book


def autoregressive_start(
    teacher: Denoiser, iters: int, batch: int, seed: int = 0, lr: float = 2e-3, weight: str = "flow"
) -> Denoiser:
    """The autoregressive diffusion model that student and critic start as: the teacher's backbone under a new head.

    Fitted for ``iters`` steps by the GTS loss on ``BANK`` samples of the teacher, classes drawn uniformly.
    """
    from ..fitting import Fitting, fit

    book, path = book_of(teacher), teacher.path
    d = build({
        "path": path.to_config(), "predicts": "flow", "shape": list(book.shape),
        "net": {"type": "token_flow", **teacher.net.config.to_dict(), "dropout": 0.0},
    })  # fmt: skip
    d.net.take_over(teacher.net)
    d.to(book.codes.device)
    if not iters:
        return d
    law, drawn = Times("uniform", low=0.02), Draws(seed, iters, 0, BANK, BANK, book.codes.device)
    labels = (drawn.uniform("data") * teacher.net.null_label).long()
    made = book.split(teacher.net.sample(labels, seed, drawn.ids))

    def loss_of(draws: Draws) -> torch.Tensor:
        draws = draws._replace(device=made.device)
        rows = (draws.uniform("data") * BANK).long()
        x0, label = made[rows], labels[rows]
        t = levels(draws, law, path, x0)
        x_t = path.add_noise(x0, t, draws.normal("forward", tuple(x0.shape[1:])))
        with torch.no_grad():
            wanted = teacher(x_t, t, prefix=x0, label=label)
        estimate = d(x_t, t, prefix=x0, label=label)
        return conditional_critic_loss(estimate, wanted, path.alpha(t), path.sigma(t), weight)

    fit(d.net, loss_of, Fitting(name="start", steps=iters, batch=batch, lr=lr, seed=seed))
    return d
