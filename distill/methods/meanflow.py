"""MeanFlow (2505.13447): average velocities on a flow, distilled from a teacher's velocity or learnt from data alone.

student   u(x_t, r, t) regressed onto sg[v - (t - r) du/dt];  x_r = x_t - (t - r) u(x_t, r, t) is then one call
v         the teacher's (guided), or eps - x0 of data, guided by the student's own instantaneous velocities

Where r = t, in a batch's other part, this is flow matching. There is no critic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...models.denoiser import Denoiser
from ...models.jumps import has_second_time, jumping, with_second_time
from ...models.paths import coefficient
from ..forward_mode import jvp
from ..levels import Times, time_at
from ..losses import guided_velocity, mean_flow_loss, mean_flow_target
from ..players import Batch, Players
from ..student import Student, few_steps
from .dmd2 import Numbers


@dataclass
class MeanFlow:
    """``source`` of the velocity: teacher, or data; ``share`` of a batch has r < t.

    ``power`` and ``c``: of the adaptive weight. ``guidance``: of the velocity, with the share ``mix`` of it taken from
    the student (kappa), and ``null`` of the labels dropped, where data are the source. ``times``: of both r and t.
    """

    source: str = "teacher"
    share: float = 0.25
    power: float = 1.0
    c: float = 1e-3
    guidance: float = 1.0
    mix: float = 0.5
    null: float = 0.1
    times: Times = field(default_factory=lambda: Times("logit_normal", mean=-0.4, std=1.0))

    def __post_init__(self):
        if self.source not in ("teacher", "data"):
            raise ValueError(f"method.source must be teacher or data, got {self.source!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"method.share must lie in [0, 1], got {self.share!r}")

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module. The derivative is taken of that part of the batch alone in which r < t."""
        if batch.real is None:
            raise ValueError("MeanFlow trains on noised data, and the batch has none (data.path)")
        d, path = players.student.d, players.student.d.path
        t, gap, apart = self.pairs(d, batch)
        eps = batch.draws.normal("forward", batch.shape).to(batch.real.dtype)
        x_t = path.add_noise(batch.real, t, eps)
        cond, v = self.velocity(players, batch, x_t, t, eps)
        gap = gap.to(x_t.dtype)
        (u,) = d.raw(x_t, t, gap=gap, **cond)
        change = torch.zeros_like(x_t)
        if apart:
            rows = slice(None) if len(apart) == len(x_t) else torch.tensor(apart, device=x_t.device)
            some = {key: value[rows] for key, value in cond.items()}
            _, change[rows] = jvp(
                lambda x, t, gap: d.raw(x, t, gap=gap, **some)[0].to(x.dtype),
                (x_t[rows], t[rows], gap[rows]),
                (v[rows], torch.ones_like(t[rows]), torch.ones_like(gap[rows])),
            )
        target = mean_flow_target(v, change, gap)
        loss = mean_flow_loss(u.to(x_t.dtype), target, self.power, self.c)
        return loss, {"error": (u.detach() - target).square().mean(), "change": change.square().mean().sqrt()}

    def pairs(self, d: Denoiser, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """t (B,), t - r (B,), and the places in the batch where r < t: spread evenly over it, on every rank."""
        draws, path = batch.draws, d.path
        t = time_at(self.times, path, draws.stratified("level"))
        other = time_at(self.times, path, draws.stratified("other_level"))
        places = range(draws.first, draws.first + draws.count)
        apart = [i for i, n in enumerate(places) if int((n + 1) * self.share) > int(n * self.share)]
        mask = torch.zeros(draws.count, dtype=torch.bool)
        mask[apart] = True
        mask = mask.to(t.device)
        late, early = torch.maximum(t, other), torch.minimum(t, other)
        t = torch.where(mask, late, t)
        return t, torch.where(mask, t - early, torch.zeros_like(t)), apart

    def velocity(
        self, players: Players, batch: Batch, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
    ) -> tuple[Mapping[str, Any], torch.Tensor]:
        """(the student's conditions, v): with data as the source some labels are dropped, where guidance needs it."""
        d = players.student.d
        with torch.no_grad():
            if self.source == "teacher":
                x0 = players.real(x_t, t, batch, self.guidance)
                return batch.cond, (x_t - x0) / coefficient(t, x_t)
            v = eps - batch.real
            if self.guidance == 1:
                return batch.cond, v
            if batch.null is None:
                raise ValueError(f"guidance = {self.guidance} needs a null condition, and the data give none")
            gap = x_t.new_zeros(len(x_t))
            u, u_null = (d.raw(x_t, t, gap=gap, **cond)[0].to(v.dtype) for cond in (batch.cond, batch.null))
            dropped = batch.draws.uniform("null") < self.null
            guided = guided_velocity(v, u, u_null, self.guidance, self.mix)
            v = torch.where(dropped.reshape(-1, *[1] * (v.ndim - 1)), v, guided)
            return {k: torch.where(dropped, batch.null[k], c) for k, c in batch.cond.items()}, v


def mean_flow_student(
    parent: Denoiser, steps: int = 1, sampler: str = "ode", times: Sequence[float] | None = None
) -> Student:
    """A student of ``steps`` jumps, its network a copy of the parent's with a second time where it has none.

    ``ode``: MeanFlow's own rule, from each time to the next. ``sde``: to the data and back with fresh noise.
    """
    d = parent.copy() if has_second_time(parent) else with_second_time(parent)
    student = few_steps(d, steps, sampler, times)
    path = d.path
    ends = student.table.times.tolist() if sampler == "ode" else [path.t_max, path.t_clean]
    return student._replace(d=jumping(d, ends))
