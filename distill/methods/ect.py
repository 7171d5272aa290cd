"""Consistency in discrete steps that shorten (ECT, 2406.14548; consistency models, 2303.01469), on any path.

student   loss = w |D(x_t, t) - sg[D(x_r, r)]|,        r < t nearer and nearer to t, stage by stage (``next_level``)
x_r       on the same noise as x_t (``source: data``, tuning), or a step of the teacher's ODE away (distillation)

D(., 0) is the identity, so the first steps, r = 0, are denoising. The network at r is the student itself, as in ECT
and iCT (2310.14189), not its average, as in 2303.01469. There is no critic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...models.paths import coefficient
from ..levels import Times
from ..losses import consistency_loss, next_level, ode_step, x0_weight
from ..players import Batch, Players
from .dmd2 import Numbers

SOURCES = ("data", "teacher", "teacher_heun")


@dataclass
class ECT:
    """``source`` of x_r: data; teacher (a step of Euler, with ``guidance``) or teacher_heun (two calls).

    ``q``, ``k``, ``b``: of the steps' lengths; a stage lasts ``stage`` iterations, and there are at most ``stages``.
    ``weight``: as in ``x0_weight``, or gap: 1 / (rho_t - rho_r), iCT's. ``c``: the Huber width.
    """

    source: str = "data"
    guidance: float = 1.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stage: int = 10_000
    stages: int = 8
    weight: str = "edm"
    c: float = 1e-6
    times: Times = field(default_factory=lambda: Times("lognormal", mean=-1.1, std=2.0))

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"method.source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.source == "data" and self.guidance != 1:
            raise ValueError(
                f"method.guidance is of a teacher; with source = data it is 1, got {self.guidance}"
            )
        if self.stage < 1 or self.stages < 1:
            raise ValueError(
                f"method.stage and method.stages must be 1 or more, got {self.stage} and {self.stages}"
            )

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        if batch.real is None:
            raise ValueError("ECT trains on noised data, and the batch has none (data.path)")
        d, path = players.student.d, players.student.d.path
        t, _ = batch.level(self.times, d)
        stage = min(self.stages, 1 + batch.draws.turn // self.stage)
        rho = path.rho(t)
        rho_r = next_level(rho, stage, self.q, self.k, self.b)
        rho_r = torch.where(rho_r < path.rho(path.t_min), 0.0, rho_r)
        eps = batch.draws.normal("forward", batch.shape).to(batch.real.dtype)
        x_t = path.add_noise(batch.real, t, eps)
        with torch.no_grad():
            early = self.earlier(players, batch, x_t, t, rho_r, eps)
        late = d(x_t, t, **batch.cond)
        if self.weight == "gap":
            weight = 1 / (rho - rho_r)
        else:
            weight = x0_weight(self.weight, path.alpha(t), path.sigma(t), d.sigma_data)
        loss = consistency_loss(late, early, weight, self.c)
        return loss, {
            "gap": (late.detach() - early).abs().mean(),
            "step": (1 - rho_r / rho).mean(),
        }

    def earlier(
        self,
        players: Players,
        batch: Batch,
        x_t: torch.Tensor,
        t: torch.Tensor,
        rho_r: torch.Tensor,
        eps: torch.Tensor,
    ) -> torch.Tensor:
        """D(x_r, r), and x_r itself where r is the clean end."""
        d, path = players.student.d, players.student.d.path
        clean = rho_r == 0
        r = path.time_of_rho(torch.where(clean, path.rho(path.t_min), rho_r))
        alpha_r = torch.where(clean, 1.0, path.alpha(r))
        sigma_r = torch.where(clean, 0.0, path.sigma(r))
        at_end = clean.reshape(-1, *[1] * (x_t.ndim - 1))
        if self.source == "data":
            x_r = coefficient(alpha_r, x_t) * batch.real + coefficient(sigma_r, x_t) * eps
        else:
            levels = (path.alpha(t), path.sigma(t), alpha_r, sigma_r)
            found = self._noise(players, batch, x_t, t)
            x_r = ode_step(x_t, found, *levels)
            if self.source == "teacher_heun":
                again = torch.where(at_end, found, self._noise(players, batch, x_r, r))
                x_r = ode_step(x_t, (found + again) / 2, *levels)
        cuda = [x_t.device] if x_t.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):  # the two calls of the student drop out the same units
            early = d(x_r, r, **batch.cond)
        return torch.where(at_end, x_r, early)

    def _noise(self, players: Players, batch: Batch, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        path = players.teacher.path
        x0 = players.real(x, t, batch, self.guidance)
        return (x - coefficient(path.alpha(t), x) * x0) / coefficient(path.sigma(t), x)
