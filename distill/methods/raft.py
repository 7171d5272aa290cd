"""RAFT (2304.06767): the policy's best samples are its next training data, by the ordinary diffusion loss.

    proposals   of every group of one condition, from the student's rollouts, or from the student steered
    choice      best: of each group the best;  top: of all groups the best 1 / group;  rwr: all, weighed by
                softmax(r / temperature) within the group (reward-weighted regression)
    loss        mean of  w |D(x_t) - x0|^2, as in pretraining, and the same on samples of the base beside them

The best of K has the law  K F(r)^(K - 1) p,  F the distribution function of the reward: one round tilts p by that,
more rounds by its powers, and the diversity that is lost does not come back. ``base`` samples of the frozen model, a
share of what is trained on, hold on to it, in the place of a KL. For ``best`` only the order of rewards counts.
Steered proposals are drawn by the Feynman-Kac corrector from p exp(scale r) with ``group`` particles, or found by the
tree search with the calls of ``group`` rollouts: what search finds once the policy then does by itself. Both walk on
a table that draws noise: where the student's own draws none, on ``ddim`` at eta = 1 with as many calls.

A group whose rewards are all the same has no best: nothing is learned from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ...models.paths import coefficient
from ...samplers import feynman_kac, sample, targets, tree_search
from ...samplers.chain import per_sample
from ..levels import Times, time_at
from ..losses import x0_weight
from ..losses.policy import flat_groups
from ..players import Batch, Players
from ..rollouts import NO_REWARD, Numbers, Rollout, grouped, judged, levels, rolled_out, seed_of, spread_of

PROPOSALS = ("rollouts", "feynman_kac", "tree_search")
KEEP = ("best", "top", "rwr")


class Collected(NamedTuple):
    """Rewards of what was proposed (B,); what is trained on, its conditions and weights, the base's samples last."""

    rewards: torch.Tensor
    x0: torch.Tensor
    cond: dict[str, Any]
    weights: torch.Tensor
    calls: float


@dataclass
class RAFT:
    """``reward``: by name; ``group``: samples of one condition, of which ``keep`` (best, top, rwr) keeps some.

    ``proposals``: rollouts, feynman_kac (``scale`` of the reward) or tree_search. ``base``: the share of the base's
    samples in what is trained on, for ``updates`` at ``repeats`` fresh noise levels a sample. ``weight``: as in
    ``x0_weight``.
    """

    reward: str | None = None
    group: int = 8
    keep: str = "best"
    temperature: float = 0.1
    proposals: str = "rollouts"
    scale: float = 10.0
    rollout: Rollout = field(default_factory=Rollout)
    base: float = 0.25
    updates: int = 4
    repeats: int = 4
    weight: str = "edm"
    least_spread: float = 1e-6
    times: Times = field(default_factory=lambda: Times("lognormal", mean=-0.4, std=1.2))

    def __post_init__(self):
        for name, known in (("keep", KEEP), ("proposals", PROPOSALS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"method.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.proposals != "rollouts" and self.keep != "best":
            raise ValueError(f"method.keep must be best with steered proposals, got {self.keep!r}")
        for name, least in (("group", 2), ("updates", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"method.{name} must be {least} or more, got {getattr(self, name)}")
        if not (self.temperature > 0 and self.scale > 0):
            raise ValueError(
                f"method.temperature and method.scale must be positive, got {self.temperature}, {self.scale}"
            )
        if not 0 <= self.base < 1:
            raise ValueError(f"method.base must be a share in [0, 1), got {self.base}")

    def collect(self, players: Players, batch: Batch) -> Collected:
        """Proposals, what is kept of them, and samples of the base."""
        given, group = grouped(batch, self.group), self.group
        table = self.rollout.table(players.student)
        if self.proposals != "rollouts" and self.rollout.sampler == "student" and not table.stochastic:
            table = Rollout("ddim", table.calls, self.rollout.grid, {"eta": 1.0}).table(players.student)
        if self.proposals == "rollouts":
            x = rolled_out(players, given, table)
            rewards = judged(players, x)
            index, weights = chosen(rewards, group, self.keep, self.temperature, self.least_spread)
            x0, calls = x[index], float(table.calls)
        else:
            rewards, x0, calls = self._steered(players, given, table)
            index = torch.arange(len(x0), device=x0.device) * group
            weights = (~flat_groups(rewards, group, self.least_spread)).to(x0.dtype)
        cond = per_sample(given.cond, index, batch.draws.count)
        more = round(self.base / (1 - self.base) * len(x0))
        if self.base and not 1 <= more <= batch.draws.count:
            raise ValueError(
                f"method.base = {self.base} beside {len(x0)} kept samples is {more} of the base, which must be 1 to "
                f"{batch.draws.count}: change it, or train.batch"
            )
        if more:
            x0, cond, weights, extra = self._with_base(players, given, table, more, (x0, index, weights))
            calls += extra
        return Collected(rewards, x0, cond, weights, calls)

    def _steered(
        self, players: Players, batch: Batch, table: Any
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(rewards (B,) of what each group's sample was chosen from, samples (groups, ...), calls a proposal)."""
        draws, group, d = batch.draws, self.group, players.student.d
        if d.net is not None:
            d.net.eval()
        first = torch.arange(0, draws.count, group, device=draws.device)
        noise, ids = draws.normal("start", batch.shape)[first], draws.ids[first]
        cond, seed = per_sample(batch.cond, first, draws.count), seed_of(batch)
        if players.reward is None:
            raise ValueError(NO_REWARD)
        if not table.stochastic:
            raise ValueError(
                f"method.proposals = {self.proposals} needs a table that draws noise, and method.rollout.sampler = "
                f"{table.solver} draws none: say ddim with method.rollout.options.eta=1"
            )
        if self.proposals == "feynman_kac":
            target = targets.tilt(players.reward, self.scale, reward_space="latent")  # it decodes by itself
            x0, info = feynman_kac(
                d, noise, table, target=target, particles=group, cond=cond, seed=seed, ids=ids
            )
            rewards = judged(players, info.particles.flatten(0, 1))
            return rewards, x0, info.calls / group
        x0, trees = tree_search(
            d, noise, table, reward=players.reward, budget=group * table.calls, cond=cond, seed=seed, ids=ids,
            reward_space="latent",
        )  # fmt: skip
        # trees have leaves of different numbers: their rewards' quantiles stand for them
        shares = np.linspace(0.0, 1.0, group)
        found = np.concatenate([np.quantile(tree.rewards, shares) for tree in trees])
        rewards = torch.as_tensor(found, dtype=torch.float32, device=noise.device)
        return rewards, x0, sum(tree.calls for tree in trees) / draws.count

    def _with_base(self, players: Players, batch: Batch, table: Any, more: int, kept: tuple):
        """The kept samples with ``more`` of the base's behind them."""
        x0, index, weights = kept
        draws = batch.draws
        places = torch.arange(more, device=x0.device) * (draws.count // more) % draws.count
        noise = draws.normal("user", batch.shape)[places]
        made = sample(
            players.teacher, noise, table, cond=per_sample(batch.cond, places, draws.count), seed=seed_of(batch) ^ 1,
            ids=draws.ids[places],
        )  # fmt: skip
        cond = per_sample(batch.cond, torch.cat([index, places]), draws.count)
        return (
            torch.cat([x0, made]), cond, torch.cat([weights, torch.ones_like(weights[:1]).expand(more)]),
            more * table.calls / draws.count,
        )  # fmt: skip

    def settle(self, batches: list[Batch]) -> tuple[list[Batch], Numbers]:
        """No batches where no group of any part had a best."""
        draws, made = batches[0].draws, batches[0].collected
        rewards = [batch.collected.rewards for batch in batches]
        flat = torch.cat([flat_groups(r, self.group, self.least_spread).double() for r in rewards])
        share = batches[0].reduce(flat.sum()) / (draws.total // self.group)
        learns = bool(share < 1)
        trained = 3 * self.updates * self.repeats * len(made.x0) / draws.count
        numbers = {
            "rollout_reward": spread_of(batches, rewards)[1],
            "flat_groups": share,
            "passes": torch.tensor(draws.total * (made.calls + learns * trained)),
        }
        return (batches if learns else []), numbers

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        made, d, many = batch.collected, players.student.d, self.repeats
        index = torch.arange(len(made.x0), device=made.x0.device).repeat_interleave(many)
        x0, cond = made.x0[index], per_sample(made.cond, index, len(made.x0))
        share, eps = levels(batch, len(x0))
        t = time_at(self.times, d.path, share)
        x_t = d.path.add_noise(x0, t, eps.to(x0.dtype))
        error = (d(x_t, t, **cond) - x0).square().flatten(1).mean(1)
        weight = x0_weight(self.weight, d.path.alpha(t), d.path.sigma(t), d.sigma_data)
        loss = (made.weights[index] * coefficient(weight, error) * error).mean()
        return loss, {"matching": error.detach().mean()}


def chosen(
    rewards: torch.Tensor, group: int, keep: str, temperature: float = 0.1, least_spread: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(places, weights) of what is kept of a batch (B,); flat groups weigh nothing.

    >>> chosen(torch.tensor([0.0, 3.0, 1.0, 1.0]), 2, "best")
    (tensor([1, 2]), tensor([1., 0.]))
    >>> chosen(torch.tensor([0.0, 3.0, 5.0, 4.0]), 2, "top")[0]
    tensor([2, 3])
    """
    flat = flat_groups(rewards, group, least_spread)
    r = rewards.reshape(-1, group)
    first = torch.arange(len(r), device=r.device) * group
    if keep == "best":
        return first + r.argmax(1), (~flat).to(rewards.dtype)
    if keep == "top":
        places = rewards.topk(len(r)).indices
        return places, (~flat)[places // group].to(rewards.dtype)
    weights = group * (r / temperature).softmax(1) * (~flat)[:, None].to(r.dtype)
    return torch.arange(len(rewards), device=r.device), weights.flatten()
