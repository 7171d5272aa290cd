"""Advantage weighted matching (2509.25050): the pretraining loss of the policy's own samples, weighed by advantages.

rollouts  x0 from the student by any sampler; r = reward(x0); A = advantages within groups of one condition
ell       = - w(t) |v_theta(x_t) - (eps - x0)|^2 at x_t noised afresh: what stands for log p(x0), up to a constant
loss      = max(-A rho, -A clip(rho)) + beta |v_theta - v_base|^2,            rho = exp(ell - ell_old)

where the old policy is the one that made the rollouts, at the same t and eps. On policy rho = 1, and the gradient is
A grad |v_theta - (eps - x0)|^2, the matching loss weighed by A. In its place DDPO and Flow-GRPO have noisy targets,
the steps of the rollout instead of its end; here no step of a sampler needs a density. v is a flow's: in estimates
of x0, with t = sigma / (alpha + sigma) for the noise level, the loss is the same on every path (``matching_loss``).

The paper's loss has ``weight: uniform, power: 1``; its released configurations ``weight: t, power: 0.25`` and
advantages clipped at 5 and divided by 5. They also hold the policy to an average of itself, whose decay after n
iterations is min(0.3, n / 1000): more or less the policy of the rollouts. ``beta_old`` holds it to that very policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...models.paths import Times as TimesOf
from ...samplers.chain import per_sample
from ..levels import Times, time_at
from ..losses.policy import clipped_surrogate, flow_level, matching_loss, velocity_gap
from ..players import Batch, Players
from ..rollouts import Numbers, Rollout, check_options, grouped, judged, levels, rolled_out, settled

OBJECTIVES = ("on_policy", "clipped")
KL = ("uniform", "elbo")


class Collected(NamedTuple):
    """Samples, rewards, and the old policy's estimates at the second update's levels, the third's, and so on; ``turn``:
    the number of the first update; ``calls``: of a rollout."""

    x0: torch.Tensor
    rewards: torch.Tensor
    old: tuple[torch.Tensor, ...]
    turn: int
    calls: int
    advantages: torch.Tensor | None = None


class Noised(NamedTuple):
    """Samples, each at ``repeats`` noise levels, one after the other."""

    x0: torch.Tensor
    x_t: torch.Tensor
    t: torch.Tensor
    cond: dict
    alpha: TimesOf
    sigma: TimesOf


@dataclass
class AWM:
    """``reward``: by name; ``group``, ``advantage`` (group, global, none, wins, ranks): of samples of one condition.

    ``updates`` on each batch of rollouts, each with ``repeats`` noise levels a sample; ``objective``: on_policy (rho is
    1 whatever the update) or clipped at ``clip``. ``weight``, ``power``: as in ``matching_loss``. ``beta``: of the
    distance to the base, ``beta_old``: to the policy of the rollouts; ``kl``: uniform in t, or elbo (over 2 S^2).
    """

    reward: str | None = None
    group: int = 16
    advantage: str = "group"
    advantage_clip: float = 5.0
    least_spread: float = 1e-6
    rollout: Rollout = field(default_factory=Rollout)
    objective: str = "clipped"
    clip: float = 0.2
    updates: int = 4
    repeats: int = 1
    weight: str = "uniform"
    power: float = 1.0
    beta: float = 0.01
    beta_old: float = 0.0
    kl: str = "uniform"
    times: Times = field(default_factory=lambda: Times("logistic"))

    def __post_init__(self):
        check_options(self)
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"method.objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        if self.kl not in KL:
            raise ValueError(f"method.kl must be one of {', '.join(KL)}, got {self.kl!r}")
        if self.repeats < 1:
            raise ValueError(f"method.repeats must be 1 or more, got {self.repeats}")
        if self.beta_old and self.updates == 1:
            raise ValueError(
                "method.beta_old holds later updates to the policy of the rollouts: it needs method.updates > 1"
            )

    @property
    def remembers(self) -> bool:
        """Whether the old policy is asked at later updates' noise levels."""
        return self.updates > 1 and (self.objective == "clipped" or self.beta_old > 0)

    def collect(self, players: Players, batch: Batch) -> Collected:
        """Rollouts, rewards, and the old policy's estimates where they are wanted."""
        turn, batch = batch.draws.turn, grouped(batch, self.group)
        table = self.rollout.table(players.student)
        x0 = rolled_out(players, batch, table)
        rewards, old = judged(players, x0), []
        for again in range(1, self.updates if self.remembers else 1):
            seen = self.noised(players, batch._replace(draws=batch.draws._replace(turn=turn + again)), x0)
            old.append(players.student.d(seen.x_t, seen.t, **seen.cond))
        return Collected(x0, rewards, tuple(old), turn, table.calls)

    def settle(self, batches: list[Batch]) -> tuple[list[Batch], Numbers]:
        """Advantages, over all parts where they are global."""
        rollouts = batches[0].collected.calls + self.repeats * len(batches[0].collected.old)
        return settled(batches, self, rollouts, self.repeats * (3 + (self.beta > 0)))

    def noised(self, players: Players, batch: Batch, x0: torch.Tensor) -> Noised:
        """x_t at the update's own levels: a sample's stand 1 / ``repeats`` apart in the law's quantiles."""
        path, many = players.student.d.path, self.repeats
        share, eps = levels(batch, many * len(x0))
        t = time_at(self.times, path, share)
        index = torch.arange(len(x0), device=x0.device).repeat_interleave(many)
        x0 = x0[index]
        cond = per_sample(batch.cond, index, batch.draws.count)
        x_t = path.add_noise(x0, t, eps.to(x0.dtype))
        return Noised(x0, x_t, t, cond, path.alpha(t), path.sigma(t))

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        made = batch.collected
        again = batch.draws.turn - made.turn
        seen = self.noised(players, batch, made.x0)
        scalars = seen.alpha, seen.sigma
        estimate = players.student.d(seen.x_t, seen.t, **seen.cond)
        now = matching_loss(estimate, seen.x0, *scalars, self.weight, self.power)
        old = now.detach()
        if again and self.objective == "clipped":
            old = matching_loss(made.old[again - 1], seen.x0, *scalars, self.weight, self.power)
        ratio = (old - now).exp()
        advantages = made.advantages.repeat_interleave(self.repeats)
        loss = clipped_surrogate(ratio, advantages, self.clip).mean()
        numbers = {
            "matching": now.detach().mean(),
            "clipped": ((ratio.detach() - 1).abs() > self.clip).float().mean(),
        }
        if self.beta:
            with torch.no_grad():
                base = players.teacher(seen.x_t, seen.t, **seen.cond)
            gap = self._gap(estimate, base, seen)
            loss, numbers["kl"] = loss + self.beta * gap, gap.detach()
        if self.beta_old and again:
            loss = loss + self.beta_old * self._gap(estimate, made.old[again - 1], seen)
        return loss, numbers

    def _gap(self, estimate: torch.Tensor, other: torch.Tensor, seen: Noised) -> torch.Tensor:
        gap = velocity_gap(estimate, other, seen.alpha, seen.sigma)
        if self.kl == "elbo":
            t = flow_level(seen.alpha, seen.sigma)
            gap = gap * ((1 - t).clamp(min=0.01) / (2 * 0.7**2 * t)).to(gap.dtype)
        return gap.mean()
