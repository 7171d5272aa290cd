"""Phased DMD (2510.27684): an expert a phase of noise levels, each matched to the teacher's marginal at its own end.

    student   x_s from noise by the ODE: the frozen experts of earlier phases, then this one; a graph in its last step
              t in (s, t_max);  x_t = a x_s + sqrt(v) eps;  g = (alpha_t / alpha_s) (S_critic - S_teacher)(x_t) on x_s
    critic    its score at t from (x_s, eps) alone, by targets whose means are the marginal's predictions

The last phase, s = 0, is DMD without its normaliser. No data are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ...models.denoiser import Denoiser
from ...samplers import ddim, grids, init, step
from ..levels import Times, time_at
from ..losses import phased_critic_loss, phased_gradient, phased_kernel, phased_target, surrogate, x0_weight
from ..players import Batch, Players
from ..student import Student
from .dmd2 import Numbers


class Experts(Denoiser):
    """Denoisers that take turns: expert k answers from its phase's first time down to, not including, its last."""

    def __init__(self, experts: Sequence[Denoiser], ends: Sequence[float]):
        """``ends``: the time at which each phase ends, falling; the last is the clean end."""
        first = experts[0]
        if len(experts) != len(ends) or list(ends) != sorted(ends, reverse=True):
            raise ValueError(f"ends must fall, one an expert, got {list(ends)} for {len(experts)} experts")
        super().__init__(
            first.call,
            first.path,
            first.predicts,
            precond=first.precond,
            sigma_data=first.sigma_data,
            time=first.time,
            net=nn.ModuleList([d.net for d in experts]),
            shape=first.shape,
            codec=first.codec,
        )
        self.experts, self.ends = list(experts), list(ends)

    def at(self, t: float) -> Denoiser:
        """Whose turn it is at time t."""
        if isinstance(t, torch.Tensor):
            raise ValueError(
                "experts take turns by time, so a call has one time (a float) for the whole batch"
            )
        return next(
            d for d, end in zip(self.experts, self.ends, strict=True) if t > end or end == self.ends[-1]
        )

    def raw(self, x: torch.Tensor, t: Any, **cond: Any) -> tuple[torch.Tensor, ...]:
        """The output of the expert whose turn it is."""
        return self.at(t).raw(x, t, **cond)


@dataclass
class PhasedDMD:
    """``phases``: how many; ``gap``: how far above a phase's end its noise levels begin, as a share of the range.

    ``weight``: kl (the paper's), dmd or residual, as in ``phased_gradient``; ``cap``: of the critic's weight.
    """

    phases: int = 2
    guidance: float = 1.0
    weight: str = "kl"
    cap: float = 10.0
    gap: float = 0.01
    times: Times = field(default_factory=lambda: Times("karras"))

    def __post_init__(self):
        self.phase = 0

    def rollout(self, student: Student, batch: Batch) -> torch.Tensor:
        """x_s at the end of the present phase (B, ...), with a graph through its last call."""
        plan, rows = student.table.on(student.d, batch.draws.device), self.rows(student)
        state = init(student.table, batch.draws.normal("start", batch.shape), batch.draws.ids)
        with torch.no_grad():
            for _ in range(rows - 1):
                state, _ = step(student.d, plan, state, cond=batch.cond)
        return step(student.d, plan, state, cond=batch.cond)[0].x

    def rows(self, student: Student) -> int:
        """How many calls lead from noise to the end of the present phase."""
        return student.calls * (self.phase + 1) // self.phases

    def _noised(self, players: Players, batch: Batch, x_s: torch.Tensor):
        path = players.teacher.path
        s = float(players.student.table.times[self.rows(players.student)])
        above = max(path.t_min, s + self.gap * (path.t_max - s)) if s > path.t_clean else None
        t = time_at(self.times, path, batch.draws.stratified("level"), above)
        levels = (path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s))
        a, v = phased_kernel(*levels)
        eps = batch.draws.normal("forward", batch.shape)
        wide = (-1,) + (1,) * (x_s.ndim - 1)
        return t, eps, (a.reshape(wide) * x_s + v.sqrt().reshape(wide) * eps).to(x_s.dtype), levels

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        x_s = self.rollout(players.student, batch)
        t, _, x_t, levels = self._noised(players, batch, x_s.detach())
        with torch.no_grad():
            real = players.real(x_t, t, batch, self.guidance)
            fake = players.critic(x_t, t, **batch.cond)
        gradient = phased_gradient(x_s, x_t, real, fake, *levels, weight=self.weight)
        return surrogate(x_s, gradient), {
            "gradient": gradient.square().mean().sqrt(),
            "gap": (fake - real).abs().mean(),
        }

    def examined(self, players: Players, batch: Batch) -> tuple[torch.Tensor, ...]:
        """(critic's estimate, teacher's, target, weights) of x0 on fresh x_s, for the diagnostics."""
        x_s = self.rollout(players.student, batch)
        t, eps, x_t, levels = self._noised(players, batch, x_s)
        target = phased_target("x0", x_s, eps, *levels)
        _, v = phased_kernel(*levels)
        alpha, sigma = levels[:2]
        # near s the target's variance grows as 1 / v, and so its weight falls
        weight = x0_weight("edm", alpha, sigma, players.teacher.sigma_data) * v / sigma**2
        real = players.real(x_t, t, batch, self.guidance)
        return players.critic(x_t, t, **batch.cond), real, target, weight

    def critic_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        with torch.no_grad():
            x_s = self.rollout(players.student, batch)
        t, eps, x_t, levels = self._noised(players, batch, x_s)
        loss = phased_critic_loss(players.critic(x_t, t, **batch.cond), x_s, eps, *levels, cap=self.cap)
        return loss, {"critic": loss.detach()}


def phased_student(
    teacher: Denoiser, steps: int = 4, phases: int = 2, times: Sequence[float] | None = None
) -> Student:
    """Copies of the teacher as experts, on an ODE table of ``steps`` calls, as many in each phase."""
    if steps % phases:
        raise ValueError(f"steps must be a multiple of phases, got {steps} and {phases}")
    path = teacher.path
    grid = np.asarray([*times, path.t_clean]) if times is not None else grids.vp(path, steps)
    ends = [float(grid[steps * (k + 1) // phases]) for k in range(phases)]
    return Student(Experts([teacher.copy() for _ in range(phases)], ends), ddim(path, grid))
