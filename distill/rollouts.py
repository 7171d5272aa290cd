"""Rollouts: what methods that learn from a reward sample before they learn, in groups of one condition.

A group is a run of ``group`` neighbours of the batch, and its condition that of its first. Groups lie within a part
of the batch (train.batch / ranks / train.accumulate), so that a part knows all of what it compares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.reward_names import named_reward
from ..samplers import catalogue, sample
from ..samplers.chain import per_sample
from ..samplers.table import Table
from .losses.policy import SCALES, flat_groups, group_advantages, rank_advantages, win_rates
from .players import Batch, Players
from .student import Student

Numbers = dict[str, torch.Tensor]
NO_REWARD = "method.reward must be given, e.g. reward=class:7, reward=ink or reward=package.module:function"
ADVANTAGES = (*SCALES, "wins", "ranks")


@dataclass
class Rollout:
    """``steps`` of ``sampler`` on ``grid``, by name, with ``options`` of the solver; student: its own table."""

    sampler: str = "student"
    steps: int = 10
    grid: str = "vp"
    options: dict[str, Any] = field(default_factory=dict)

    def table(self, student: Student) -> Table:
        """The table."""
        if self.sampler == "student":
            return student.table
        if self.steps < 1:
            raise ValueError(f"method.rollout.steps must be 1 or more, got {self.steps}")
        times = catalogue.find_grid(self.grid)(student.d.path, self.steps)
        return catalogue.find(self.sampler)(student.d.path, times, **self.options)


def grouped(batch: Batch, group: int) -> Batch:
    """The batch with every sample under the condition of its group's first."""
    count = batch.draws.count
    if group < 2:
        raise ValueError(f"method.group must be 2 or more, or there is nothing to compare with, got {group}")
    if count % group:
        raise ValueError(
            f"a part of the batch must be whole groups of method.group = {group}, got {count} samples (train.batch / "
            "ranks / train.accumulate)"
        )
    first = torch.arange(count, device=batch.draws.device) // group * group
    null = None if batch.null is None else per_sample(batch.null, first, count)
    return batch._replace(cond=per_sample(batch.cond, first, count), null=null)


def seed_of(batch: Batch) -> int:
    """The seed of the fresh noise between the steps of a batch's rollouts."""
    return (batch.draws.seed ^ (batch.draws.turn << 20)) % 2**63


def rolled_out(players: Players, batch: Batch, table: Table) -> torch.Tensor:
    """x0 (B, ...) by the student, of the batch's noise and conditions."""
    d = players.student.d
    if d.net is not None:
        d.net.eval()  # a policy is its network without dropout
    noise = batch.draws.normal("start", batch.shape)
    return sample(d, noise, table, cond=batch.cond, seed=seed_of(batch), ids=batch.draws.ids)


def judged(players: Players, x0: torch.Tensor) -> torch.Tensor:
    """The rewards (B,) of samples."""
    if players.reward is None:
        raise ValueError(NO_REWARD)
    return players.reward(x0).to(x0.device, torch.float32)


def pair_judge(name: str, codec: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """package.module:function of two batches of images, which answers the share of a win that the first has."""
    judge = _imported(name)
    seen = (lambda x: x) if codec is None else codec.decode
    return lambda a, b: torch.as_tensor(judge(seen(a), seen(b))).to(a.device)


@functools.lru_cache
def _imported(name: str) -> Any:
    if ":" not in name or "." not in name.partition(":")[0]:
        raise ValueError(
            f"method.judge must be package.module:function of two batches of images, got {name!r}"
        )
    return named_reward(name)


def advantages_of(
    kind: str,
    rewards: torch.Tensor,
    group: int,
    clip: float = 5.0,
    least_spread: float = 1e-6,
    spread: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B,) advantages by the name of a scale, or by ``wins`` (Pref-GRPO) or ``ranks`` within the group."""
    if kind not in ADVANTAGES:
        raise ValueError(f"method.advantage must be one of {', '.join(ADVANTAGES)}, got {kind!r}")
    if kind in SCALES:
        return group_advantages(rewards, group, kind, clip, least_spread, spread)  # type: ignore[bad-argument-type]
    if kind == "wins":
        found = group_advantages(win_rates(rewards, group, least_spread), group, "group", clip)
    else:
        found = rank_advantages(rewards, group)
    return torch.where(flat_groups(rewards, group, least_spread).repeat_interleave(group), 0.0, found)


def settled(batches: list[Batch], method: Any, rollouts: float, update: float) -> tuple[list[Batch], Numbers]:
    """The batches with their advantages, none where every group of every rank is flat; and what is logged.

    ``rollouts`` and ``update``: network passes a sample of the batch, of all rollouts and of one update; a forward
    pass is one, and forward and backward are three.
    """
    draws, group = batches[0].draws, method.group
    rewards = [batch.collected.rewards for batch in batches]
    flat = [flat_groups(r, group, method.least_spread).double() for r in rewards]
    spread, mean = spread_of(batches, rewards)
    share = batches[0].reduce(torch.cat(flat).sum()) / (draws.total // group)
    learns = bool(share < 1)
    numbers = {
        "rollout_reward": mean,
        "flat_groups": share,
        "passes": torch.tensor(draws.total * (rollouts + learns * method.updates * update)),
    }
    if not learns:
        return [], numbers
    found = []
    for batch, r in zip(batches, rewards, strict=True):
        advantages = advantages_of(
            method.advantage, r, group, method.advantage_clip, method.least_spread, spread
        )
        collected = batch.collected._replace(advantages=advantages)
        found.append(grouped(batch, group)._replace(collected=collected))
    return found, numbers


def spread_of(batches: list[Batch], rewards: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard deviation and mean of the rewards of the whole batch, all parts and ranks."""
    r, reduce = torch.cat(rewards).double(), batches[0].reduce
    total = batches[0].draws.total
    mean = reduce(r.sum()) / total
    return (reduce((r - mean).square().sum()) / total).sqrt(), mean


def check_options(method: Any) -> None:
    """``ValueError`` unless what methods on rollouts have in common makes sense."""
    if method.advantage not in ADVANTAGES:
        raise ValueError(f"method.advantage must be one of {', '.join(ADVANTAGES)}, got {method.advantage!r}")
    if method.group < 2:
        raise ValueError(f"method.group must be 2 or more, got {method.group}")
    if method.updates < 1:
        raise ValueError(f"method.updates must be 1 or more, got {method.updates}")
    for name in ("clip", "advantage_clip"):
        if not getattr(method, name) > 0:
            raise ValueError(f"method.{name} must be positive, got {getattr(method, name)}")
    for name in ("beta", "least_spread"):
        if not getattr(method, name) >= 0:
            raise ValueError(f"method.{name} must be 0 or more, got {getattr(method, name)}")


def levels(batch: Batch, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(quantiles (count,), noise (count, ...)) for an update on ``count`` samples made of the batch, more or fewer.

    Where a sample of the batch is there many times, one after the other, its quantiles stand equally far apart.
    """
    draws = batch.draws
    many = -(-count // draws.count)
    apart = torch.arange(many, device=draws.device) / many
    share = (draws.stratified("level")[:, None] + apart).remainder(1.0).flatten()
    return share[:count], draws.normal("forward", (many, *batch.shape)).flatten(0, 1)[:count]
