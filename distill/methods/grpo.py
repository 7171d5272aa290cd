"""Policy gradients on a sampler's steps: DDPO (2305.13301), Flow-GRPO (2505.05470), Pref-GRPO (2508.20751).

A stochastic table's rollout is a Markov chain of Gaussian steps x' ~ N(mean_theta(x, t), std^2), so every step has a
density, and a sample's advantage A (within its group of one condition) is that of each of its steps:

    loss = mean over steps of  max(-A rho, -A clip(rho)) + beta KL(step | base's step),
    rho  = p_theta(x' | x) / p_old(x' | x)

with the old policy the one that made the rollouts: rho is exactly 1 in the first update. Any table without history
that draws noise will do (``ddim`` at eta = 1, ``ddpm``, ``flow_sde``, ``consistency``); steps that draw none have no
density and are left out. ``advantage: wins`` is Pref-GRPO: a sample's reward is the share of its group that it beats,
by the reward or by a ``judge`` of pairs, where small differences of rewards, divided by their own spread, would count
in full.

What papers and released code do: the log-likelihood is a sum over elements (``log_prob: sum``); the code of both
takes the mean, whose ratios are so near 1 that the clip is 1e-4, and leaves dt out of Flow-GRPO's KL (``kl:
released``). Both are presets, ``ddpo`` and ``flow_grpo``. Their guidance within the policy (scales 5 and 4.5) is not
offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...samplers import noise
from ...samplers.loop import init
from ...samplers.transitions import Transition, transitions
from ..draws import stream
from ..losses.policy import clipped_surrogate, flow_level, judged_win_rates
from ..players import Batch, Players
from ..rollouts import Numbers, Rollout, check_options, grouped, judged, pair_judge, seed_of, settled

SUMS = ("sum", "mean")
KL = ("step", "released")
KL_OF = ("all", "trained")


class Collected(NamedTuple):
    """Every point of the rollouts (calls + 1, B, ...), old log-likelihoods (steps, B) of the steps that are trained;
    ``turn``: the number of the first update; ``times`` (calls + 1,): of the points."""

    points: torch.Tensor
    old: torch.Tensor
    rewards: torch.Tensor
    turn: int
    steps: list[Transition]
    rest: list[Transition]
    times: list[float]
    advantages: torch.Tensor | None = None


@dataclass
class GRPO:
    """``reward``, or a ``judge`` (package.module:function of two batches of images) with ``advantage: wins``.

    ``group``, ``advantage`` (group, global, none, wins, ranks): of samples of one condition. ``updates`` on each
    batch of rollouts, clipped at ``clip``. ``share``: of the steps, from the first on, that are trained; ``each``: so
    many of them in an update, every update others (0: all). ``beta``: of the KL to the base, ``kl``: of the step, or
    as released; ``kl_of``: all steps that draw noise (of those beyond ``share`` one an update, with the weight of
    all), or the trained ones alone: what nobody holds drifts.
    """

    reward: str | None = None
    judge: str | None = None
    group: int = 16
    advantage: str = "group"
    advantage_clip: float = 5.0
    least_spread: float = 1e-6
    rollout: Rollout = field(default_factory=lambda: Rollout("flow_sde"))
    clip: float = 0.2
    updates: int = 1
    share: float = 1.0
    each: int = 0
    log_prob: str = "sum"
    beta: float = 0.01
    kl: str = "step"
    kl_of: str = "all"

    def __post_init__(self):
        check_options(self)
        for name, known in (("log_prob", SUMS), ("kl", KL), ("kl_of", KL_OF)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"method.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not 0 < self.share <= 1:
            raise ValueError(f"method.share must lie in (0, 1], got {self.share}")
        if self.each < 0:
            raise ValueError(f"method.each must be 0 or more, got {self.each}")
        if self.judge is not None and self.advantage != "wins":
            raise ValueError(f"method.judge is for method.advantage=wins, got {self.advantage!r}")

    def collect(self, players: Players, batch: Batch) -> Collected:
        """Rollouts step by step, with the likelihood of each step."""
        turn, batch = batch.draws.turn, grouped(batch, self.group)
        d, table = players.student.d, self.rollout.table(players.student)
        start = batch.draws.normal("start", batch.shape)
        chain = transitions(table.on(d, start.device))
        noisy = [step for step in chain if step.std > 0]
        trained = [step for step in noisy if step.row < max(1, int(self.share * len(chain)))]
        if not trained:
            raise ValueError(
                f"method.share = {self.share} leaves no step that draws noise, of {len(chain)}: raise it"
            )
        if d.net is not None:
            d.net.eval()  # a policy is its network without dropout
        ids, seed = batch.draws.ids, seed_of(batch)
        x = init(table, start, ids, seed=seed).x
        points, old = [x], []
        for step in chain:
            x0 = d(x, step.t, **batch.cond)
            after = step.mean(x, x0)
            if step.std > 0:
                fresh = noise.normal(seed, ids, batch.shape, step.row + 1, noise.STEP, x.dtype)
                after = after + step.std * fresh
            if step in trained:
                old.append(self._log_prob(step, after, x, x0))
            x = after
            points.append(x)
        if self.judge is None:
            rewards = judged(players, x)
        else:
            rewards = judged_win_rates(pair_judge(self.judge, players.teacher.codec), x, self.group)
        return Collected(
            torch.stack(points),
            torch.stack(old),
            rewards,
            turn,
            trained,
            noisy[len(trained) :],
            table.times.tolist(),
        )

    def settle(self, batches: list[Batch]) -> tuple[list[Batch], Numbers]:
        """Advantages, over all parts where they are global."""
        made = batches[0].collected
        each = len(self._chosen(batches[0], len(made.steps)))
        update = each * (3 + (self.beta > 0)) + 4 * len(self._held(batches[0]))
        return settled(batches, self, len(made.points) - 1, update)

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        made = batch.collected
        chosen = self._chosen(batch, len(made.steps))
        losses, gaps, away = [], [], []
        for k in chosen:
            step = made.steps[k]
            x, after = made.points[step.row], made.points[step.row + 1]
            x0 = players.student.d(x, step.t, **batch.cond)
            ratio = (self._log_prob(step, after, x, x0) - made.old[k]).exp()
            losses.append(clipped_surrogate(ratio, made.advantages, self.clip).mean())
            away.append(((ratio.detach() - 1).abs() > self.clip).float().mean())
            if self.beta:
                gaps.append(self._gap(players, batch, step, x0))
        loss = torch.stack(losses).mean()
        numbers = {"clipped": torch.stack(away).mean()}
        if gaps:
            gap = torch.stack(gaps).mean()
            for step in self._held(batch):  # one stands for all that are not trained
                x0 = players.student.d(made.points[step.row], step.t, **batch.cond)
                gap = gap + self._gap(players, batch, step, x0) * len(made.rest) / len(made.steps)
            numbers["kl"] = gap.detach()
            loss = loss + self.beta * gap
        return loss, numbers

    def _gap(self, players: Players, batch: Batch, step: Transition, x0: torch.Tensor) -> torch.Tensor:
        """The mean KL of a step to the base's."""
        made, path = batch.collected, players.student.d.path
        x = made.points[step.row]
        with torch.no_grad():
            base = players.teacher(x, step.t, **batch.cond)
        gap = step.divergence(x0, base)
        if self.log_prob == "mean":
            gap = gap / x[0].numel()
        if self.kl == "released":  # of the mean's distance over 2 S^2, where the step's variance is S^2 dt
            around = made.times[step.row : step.row + 2]
            at, until = (flow_level(path.alpha(t), path.sigma(t)) for t in around)
            gap = gap * (at - until)
        return gap.mean()

    def _log_prob(
        self, step: Transition, after: torch.Tensor, x: torch.Tensor, x0: torch.Tensor
    ) -> torch.Tensor:
        found = step.log_prob(after, x, x0)
        return found if self.log_prob == "sum" else found / x[0].numel()

    def _chosen(self, batch: Batch, count: int) -> list[int]:
        """The steps of this update: all, or its share of an order drawn anew for every batch of rollouts."""
        if self.each == 0 or self.each >= count:
            return list(range(count))
        made = batch.collected
        order = self._order(batch, count)
        first = (batch.draws.turn - made.turn) * self.each
        return sorted(order[(first + k) % count] for k in range(self.each))

    def _held(self, batch: Batch) -> list[Transition]:
        """The step beyond ``share`` that is held to the base in this update, if any."""
        made = batch.collected
        if self.kl_of == "trained" or not (self.beta and made.rest):
            return []
        order = self._order(batch, len(made.rest))
        return [made.rest[order[(batch.draws.turn - made.turn) % len(order)]]]

    def _order(self, batch: Batch, count: int) -> list[int]:
        """0 .. count - 1 in an order of these rollouts, the same on every rank."""
        everyone = torch.tensor([2**32 - 1])
        drawn = noise.uniform(batch.draws.seed, everyone, count, batch.collected.turn, stream("step"))
        return drawn[0].argsort().tolist()
