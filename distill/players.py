"""Who takes part in a distillation: the frozen teacher, the student, the critic of the student, a discriminator.

The critic (the fake score) is trained to denoise what the student makes, so that its score is the student's own.
Student and critic start as copies of the teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.denoiser import Denoiser
from ..models.paths import Times
from ..models.rewards import Reward
from .discriminator import Discriminator
from .draws import Draws
from .levels import Times as Law
from .levels import time_at
from .student import Student


class Players(NamedTuple):
    """``features`` is the Denoiser whose layers the discriminator reads: the critic, or the teacher.

    ``adapters``: where student and critic are adapters on the teacher's own network, their parameters. ``reward``: of
    the student's samples (B, ...), latents included, where the method has one: the teacher's codec decodes for it.
    """

    teacher: Denoiser
    student: Student
    critic: Denoiser | None = None
    discriminator: Discriminator | None = None
    features: Denoiser | None = None
    adapters: tuple[nn.Module, nn.Module] | None = None
    reward: Reward | None = None

    def real(
        self,
        x: torch.Tensor,
        t: Times,
        batch: Batch,
        guidance: float = 1.0,
        conditional: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The teacher's estimate of x0 with classifier-free guidance; ``conditional``: its answer, if it is known."""
        conditional = self.teacher(x, t, **batch.cond) if conditional is None else conditional
        if guidance == 1:
            return conditional
        if batch.null is None:
            raise ValueError(
                f"guidance = {guidance} needs a null condition, and the teacher and the data give none"
            )
        unconditional = self.teacher(x, t, **batch.null)
        return unconditional + guidance * (conditional - unconditional)

    def student_module(self) -> nn.Module:
        """What of the student is its own: its network, or its adapter."""
        return self.student.d.net if self.adapters is None else self.adapters[0]

    def critic_modules(self) -> list[nn.Module]:
        """What the critic's optimizer trains: the critic's network, or its adapter, and the discriminator's heads."""
        if self.critic is None:
            raise ValueError("this method trains a critic, and players.critic is None")
        own = self.critic.net if self.adapters is None else self.adapters[1]
        return [own] if self.discriminator is None else [own, self.discriminator]


class Batch(NamedTuple):
    """What one loss is made from: conditions, their null, real data where there is any, and the random numbers.

    It may be a part of the global batch. ``reduce`` sums a tensor over the ranks that have the others; ``scale`` (B,)
    are its samples' weights, where a method has weighed the parts of one rank together. ``collected``: what the method
    made of it before its updates, where it has a ``collect``. ``pairs``: winners and losers (``pairs.Pairs``), instead
    of real data, for methods that learn from preferences.
    """

    draws: Draws
    shape: tuple[int, ...]
    cond: Mapping[str, Any]
    null: Mapping[str, Any] | None = None
    real: torch.Tensor | None = None
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda value: value
    scale: torch.Tensor | None = None
    collected: Any = None
    pairs: Any = None

    def generate(self, student: Student) -> torch.Tensor:
        """The student's x0 (B, ...) at a random one of its calls, the same call for the whole batch."""
        noise = self.draws.normal("start", self.shape)
        last = self.draws.choice("step", student.calls)
        seed = self.draws.seed ^ (self.draws.turn << 20)  # fresh noise between the steps of every batch
        return student.generate(noise, self.cond, last, seed % 2**63, self.draws.ids)

    def level(self, law: Law, d: Denoiser, purpose: str = "level") -> tuple[torch.Tensor, torch.Tensor]:
        """(t, quantile), (B,) each: noise levels by the law, stratified over the global batch."""
        share = self.draws.stratified(purpose)
        return time_at(law, d.path, share), share


@contextlib.contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Inside, the parameters take no gradients; what passes through to inputs still flows.

    It goes round a turn's forward *and* backward: checkpointed layers are computed once more in the backward pass, and
    must find what the forward found.
    """
    changed = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    for p in changed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
