"""sCM (2410.11081): consistency models in continuous time, from a teacher (sCD) or from data alone (sCT), on any path.

student   loss = |F - sg[F + g]|^2 / E[the same | s],      g = cos(s) df/ds along the ODE, normalised (``trigflow``)
dx/ds     the teacher's (guided), or cos(s) z - sin(s) x0 of data

The paper divides by the expectation through a second network, whose minimum it is; here it is a running mean in bins of
the level. There is no critic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...models.paths import coefficient
from ..forward_mode import jvp
from ..levels import Times
from ..losses import LevelMeans, level_means
from ..losses.trigflow import (
    angle_of,
    consistency_tangent,
    normalised,
    scm_loss,
    stretch,
    trig_output,
    trig_velocity,
)
from ..players import Batch, Players
from .dmd2 import Numbers


@dataclass
class SCM:
    """``source`` of the velocity: teacher, or data; ``warmup``: iterations in which consistency is faded in.

    ``c``: of the tangent's normalisation (0: none); ``bins`` of the level for the adaptive weight (0: none), each with
    ``memory`` samples.
    """

    source: str = "teacher"
    guidance: float = 1.0
    warmup: int = 10_000
    c: float = 0.1
    bins: int = 10
    memory: float = 1024.0
    times: Times = field(default_factory=lambda: Times("lognormal", mean=-1.0, std=1.4))

    def __post_init__(self):
        if self.source not in ("teacher", "data"):
            raise ValueError(f"method.source must be teacher or data, got {self.source!r}")
        if self.source == "data" and self.guidance != 1:
            raise ValueError(
                f"method.guidance is of a teacher; with source = data it is 1, got {self.guidance}"
            )
        self.means: LevelMeans | None = None

    def state(self) -> dict[str, torch.Tensor]:
        """The running means of the loss, for a checkpoint."""
        return (self.means or LevelMeans.start(max(1, self.bins)))._asdict()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Back from a checkpoint."""
        self.means = LevelMeans(**state)

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        if batch.real is None:
            raise ValueError("sCM trains on noised data, and the batch has none (data.path)")
        d, cond = players.student.d, dict(batch.cond)
        t, quantile = batch.level(self.times, d)
        s = angle_of(d.path, t, d.sigma_data)
        eps = batch.draws.normal("forward", batch.shape).to(batch.real.dtype)
        z, cos, sin = d.sigma_data * eps, coefficient(torch.cos(s), eps), coefficient(torch.sin(s), eps)
        x = cos * batch.real + sin * z
        velocity = cos * z - sin * batch.real
        if self.source == "teacher":
            with torch.no_grad():
                x_t = coefficient(stretch(d.path, t, d.sigma_data), x) * x
                velocity = trig_velocity(x, players.real(x_t, t, batch, self.guidance), s)
        scale = torch.cos(s) * torch.sin(s)
        output, change = jvp(
            lambda x, s: trig_output(d, x, s, **cond), (x, s), (coefficient(scale, x) * velocity, scale)
        )
        share = min(1.0, (batch.draws.turn + 1) / self.warmup) if self.warmup else 1.0
        raw = consistency_tangent(x, s, output, change, velocity, d.sigma_data, share)
        tangent = normalised(raw, self.c) if self.c else raw
        terms = scm_loss(trig_output(d, x, s, **cond), tangent)
        loss = (terms / self._expected(terms.detach(), quantile, batch)).mean()
        return loss, {"tangent": raw.square().mean().sqrt(), "share": torch.tensor(share, device=x.device)}

    def _expected(self, terms: torch.Tensor, quantile: torch.Tensor, batch: Batch) -> torch.Tensor:
        if not self.bins:
            return torch.ones_like(terms)
        state = self.means or LevelMeans.start(self.bins, terms.device)
        self.means, mean = level_means(
            state, terms.float(), quantile.to(terms.device), self.memory, reduce=batch.reduce
        )
        return mean
