"""What methods that learn from pairs share: where both samples are noised to, and the errors of policy and reference.

A pair (winner, loser) is denoised by the student, the policy, and by the frozen teacher, the reference, both at the
same time t. A method says where x_t is (``noised``), what the loss of the four errors is (``objective``), and what a
pair costs (``cost``). The student may be whole weights or an adapter on the teacher's network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...models.denoiser import Denoiser
from ...models.paths import Times as TimesOf
from ...samplers.chain import per_sample
from ..levels import Times
from ..losses import network_error, output_weight
from ..pairs import Groups, Pairs
from ..players import Batch, Players
from .dmd2 import Numbers


class Noised(NamedTuple):
    """x_t (2 B, ...) of winners and then losers, at times t (B,)."""

    x: torch.Tensor
    t: torch.Tensor


class Errors(NamedTuple):
    """Denoising errors (B,) of both by the policy, and by the reference where it is asked (else the policy's)."""

    winner: torch.Tensor
    loser: torch.Tensor
    base_winner: torch.Tensor
    base_loser: torch.Tensor


@dataclass
class Preference:
    """``pairs``: their file; else they are made from ``reward`` by ``groups``. ``times``: the law of t.

    ``reduce``: squares are summed over a sample's elements, as in papers, or averaged (mean), as in their code.
    ``updates``: of the student on one batch.
    """

    reward: str | None = None
    pairs: str | None = None
    groups: Groups = field(default_factory=Groups)
    times: Times = field(default_factory=Times)
    reduce: str = "mean"
    updates: int = 1
    compares = True  # the reference is asked

    def __post_init__(self):
        if self.updates < 1:
            raise ValueError(f"method.updates must be 1 or more, got {self.updates}")

    def noised(self, players: Players, batch: Batch) -> Noised:
        """Winner and loser with the same noise."""
        t, _ = batch.level(self.times, players.student.d)
        eps = batch.draws.normal("forward", batch.shape)
        return Noised(players.student.d.path.add_noise(both(batch.pairs), twice(t), twice(eps)), t)

    def cost(self) -> int:
        """Network calls that a pair costs in one iteration, one with a gradient counted as three."""
        return 2 * self.updates * (3 + self.compares)

    def student_loss(self, players: Players, batch: Batch) -> tuple[torch.Tensor, Numbers]:
        """See the module."""
        if batch.pairs is None:
            raise ValueError(
                "preference methods learn from pairs, and the batch has none (pairs= or reward=)"
            )
        noised = self.noised(players, batch)
        weight = output_weight(players.student.d, twice(noised.t))
        mine = self.errors(players.student.d, batch, noised, weight)
        base = mine.detach()
        if self.compares:
            with torch.no_grad():
                base = self.errors(players.teacher, batch, noised, weight)
        errors = Errors(*mine.chunk(2), *base.chunk(2))
        loss, u = self.objective(errors, batch.pairs)
        numbers = {
            "implicit_accuracy": (u > 0).float().mean(),
            "margin": u.mean(),
            "winner_error": errors.winner.mean(),
            "passes": loss.new_full((), float(batch.draws.total * self.cost())),
        }
        if self.compares:
            numbers["winner_gain"] = (errors.base_winner - errors.winner).mean()
        return loss, numbers

    def errors(self, d: Denoiser, batch: Batch, noised: Noised, weight: TimesOf) -> torch.Tensor:
        """Errors (2 B,) of a network, winners' and then losers', in the form of the student's own output."""
        estimate = d(noised.x, twice(noised.t), **cond_of_both(batch))
        return network_error(estimate, both(batch.pairs), weight, self.reduce)

    def objective(self, errors: Errors, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, what its sigmoid is taken of (B,))."""
        raise NotImplementedError


def both(pairs: Pairs) -> torch.Tensor:
    """Winners and then losers (2 B, ...)."""
    return torch.cat([pairs.winner, pairs.loser])


def cond_of_both(batch: Batch) -> dict[str, Any]:
    """The conditions of ``both``."""
    count = batch.draws.count
    return per_sample(batch.cond, torch.arange(count, device=batch.draws.device).repeat(2), count)


def twice(value: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """The same for losers as for winners."""
    return torch.cat([value, value], axis)
