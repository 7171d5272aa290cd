"""The trainer: turns of critic and student, averages, validation, checkpoints that resume to the bit.

A turn's random numbers follow from its number (``draws``), so the state of a run is its networks, optimizers, the
average, the method's own tensors and one integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..models.denoiser import Denoiser
from .data import Data
from .draws import Draws
from .parallel import ALONE, Ranks, average_gradients, whole
from .players import Batch, Players, frozen
from .precision import autocast
from .schema import DistillRecipe


class BadBatches(RuntimeError):
    """More non-finite losses than the recipe allows."""


class Trainer:
    """One run's moving parts. ``turn()`` is a student update with the critic's before it.

    A method without a ``critic_loss`` has no critic: no turns of it, no optimizer, nothing of it in a checkpoint. One
    with ``updates`` makes so many of the student on a batch, and one with ``collect(players, batch)`` finds in
    ``batch.collected`` what that answered, once before them and without a graph. ``settle(batches)`` then sees all
    parts of a rank's batch and answers (batches, numbers); where it answers none, there is nothing to learn from, and
    no optimizer makes a step. Nothing of it outlives the turn.
    """

    def __init__(
        self, recipe: DistillRecipe, method: Any, players: Players, data: Data, ranks: Ranks = ALONE
    ):  # noqa: B008
        self.recipe, self.method, self.data, self.ranks = recipe, method, data, ranks
        self.iteration, self.bad = 0, 0
        self._take_up(players)

    def _take_up(self, players: Players) -> None:
        self.players, optim = players, self.recipe.optim
        self.rates = {"student": optim.lr}
        self.trained = {"student": nn.ModuleList(self._trained())}
        if hasattr(self.method, "critic_loss"):
            self.rates["critic"] = optim.critic_lr
            self.trained["critic"] = nn.ModuleList(players.critic_modules())
        self.optimizers = {
            who: torch.optim.AdamW(
                module.train().requires_grad_(True).parameters(),
                lr=self.rates[who],
                betas=tuple(optim.betas),
                weight_decay=optim.weight_decay,
                fused=True,
            )
            for who, module in self.trained.items()
        }
        self.average = [p.detach().clone() for p in self.trained["student"].parameters()]

    def next_phase(self, phase: int, critic: Denoiser) -> None:
        """The expert in training keeps its averaged weights and is frozen; the next one and a fresh critic begin."""
        with torch.no_grad():
            for p, mean in zip(self.trained["student"].parameters(), self.average, strict=True):
                p.copy_(mean)
        self.trained["student"].eval().requires_grad_(False)
        self.method.phase = phase
        self._take_up(self.players._replace(critic=critic))

    def _trained(self) -> list[nn.Module]:
        experts = getattr(self.players.student.d, "experts", None)
        return [self.players.student_module()] if experts is None else [experts[self.method.phase].net]

    def turn(self) -> dict[str, float]:
        """One iteration: ``critic_steps`` updates of the critic, one of the student; the numbers it gave."""
        method, student, critic = self.method, self.trained["student"], self.trained.get("critic")
        steps = 0 if critic is None else self.recipe.train.critic_steps
        first = self.iteration * (steps + getattr(method, "updates", 1))
        numbers: dict[str, torch.Tensor] = {}
        for k in range(steps):
            with frozen(student):
                numbers |= self._update("critic", method.critic_loss, first + k)
        with frozen(critic):
            numbers |= self._update("student", method.student_loss, first + steps)
        self.iteration += 1
        # a young average forgets the start it was copied from
        weight = max(1 - self.recipe.train.ema, 1 / (self.iteration + 1))
        torch._foreach_lerp_(self.average, [p.detach() for p in student.parameters()], weight)
        return {k: float(v) for k, v in numbers.items()}

    def _update(self, who: str, loss_of, turn: int) -> dict[str, torch.Tensor]:
        train, ranks, method = self.recipe.train, self.ranks, self.method
        count = train.batch // (ranks.world * train.accumulate)
        half = autocast(train.precision, ranks.device)
        batches = []
        for part in range(train.accumulate):
            first = (ranks.rank * train.accumulate + part) * count
            draws = Draws(self.recipe.seed, turn, first, count, train.batch, ranks.device)
            batches.append(self.data.batch(draws)._replace(reduce=ranks.sum))
        if who == "critic":
            return self._descend(who, loss_of, batches)
        with torch.no_grad(), half:
            if len(batches) > 1 and hasattr(method, "weigh"):
                batches = method.weigh(self.players, batches)
            if hasattr(method, "collect"):
                batches = [batch._replace(collected=method.collect(self.players, batch)) for batch in batches]
            settled: dict[str, torch.Tensor] = {}
            if hasattr(method, "settle"):
                batches, settled = method.settle(batches)
        numbers: dict[str, torch.Tensor] = {}
        for again in range(getattr(method, "updates", 1) if batches else 0):
            batches = [b._replace(draws=b.draws._replace(turn=turn + again)) for b in batches]
            numbers = self._descend(who, loss_of, batches)
        return settled | numbers

    def _descend(self, who: str, loss_of, batches: list[Batch]) -> dict[str, torch.Tensor]:
        train, ranks, optimizer = self.recipe.train, self.ranks, self.optimizers[who]
        half, turn = autocast(train.precision, ranks.device), batches[0].draws.turn
        optimizer.zero_grad(set_to_none=True)
        numbers: dict[str, torch.Tensor] = {}
        for batch in batches:
            with half:
                loss, said = loss_of(self.players, batch)
            (loss / train.accumulate).backward()
            for key, value in {"loss": loss.detach(), **said}.items():
                numbers[key] = numbers.get(key, 0) + value.detach() / train.accumulate
        parameters = list(self.trained[who].parameters())
        average_gradients(parameters, ranks)
        norm = whole(nn.utils.clip_grad_norm_(parameters, self.recipe.optim.clip))
        keys = list(numbers)
        means = ranks.sum(torch.stack([numbers[key].float() for key in keys])) / ranks.world
        numbers = dict(zip(keys, means.unbind(), strict=True))
        if not math.isfinite(float(norm + numbers["loss"])):
            self._count_bad(turn)
            optimizer.zero_grad(set_to_none=True)
            return {}
        for group in optimizer.param_groups:
            group["lr"] = self.rates[who] * min(1.0, (self.iteration + 1) / max(1, self.recipe.optim.warmup))
        optimizer.step()
        return numbers

    def _count_bad(self, turn: int) -> None:
        self.bad += 1
        if self.bad > self.recipe.train.bad_limit:
            raise BadBatches(
                f"{self.bad} losses or gradients were not finite (turn {turn} the last): more than train.bad_limit = "
                f"{self.recipe.train.bad_limit}; lower optim.lr, or look at the data"
            )

    def averaged(self):
        """Inside, the student has its averaged weights."""
        return swapped(list(self.trained["student"].parameters()), self.average)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold, as nested dicts of tensors; loading fills these very tensors."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        names = [name for name, _ in self.trained["student"].named_parameters()]
        critic = self.trained.get("critic")
        return {
            "student": self.players.student_module().state_dict(),
            "critic": {} if critic is None else critic.state_dict(),
            "average": dict(zip(names, self.average, strict=True)),
            "optimizers": {
                who: get_optimizer_state_dict(module, self.optimizers[who])
                for who, module in self.trained.items()
            },
            "method": getattr(self.method, "state", dict)(),
            "counters": {"iteration": torch.tensor(self.iteration), "bad": torch.tensor(self.bad)},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` told, after its tensors were filled."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        self.players.student_module().load_state_dict(state["student"])
        if "critic" in self.trained:
            self.trained["critic"].load_state_dict(state["critic"])
        for who, module in self.trained.items():
            set_optimizer_state_dict(module, self.optimizers[who], state["optimizers"][who])
        if hasattr(self.method, "load_state"):
            self.method.load_state(state["method"])
        self.iteration, self.bad = (int(state["counters"][k]) for k in ("iteration", "bad"))


class swapped:  # noqa: N801 (used as a function)
    """Exchange the values of two lists of tensors, and back again at the end.

    >>> a, b = [torch.zeros(1)], [torch.ones(1)]
    >>> with swapped(a, b): inside = a[0].item()
    >>> inside, a[0].item()
    (1.0, 0.0)
    """

    def __init__(self, first: Iterable[torch.Tensor], second: Iterable[torch.Tensor]):
        self.pairs = list(zip(first, second, strict=True))

    def _exchange(self) -> None:
        with torch.no_grad():
            for a, b in self.pairs:
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_) -> None:
        self._exchange()


def warm_up(
    net: Denoiser, teacher: Denoiser, data: Data, seed: int, iters: int, batch: int, lr: float = 2e-3
) -> None:
    """Teach a fresh network the teacher's own estimates, all levels, so that it can stand for a copy of the teacher."""
    from .levels import Times, time_at
    from .losses import denoising_loss

    net.net.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.net.parameters(), lr=lr, fused=True)
    for turn in range(iters):
        draws = Draws(seed ^ 0x5EED, turn, 0, batch, batch)
        made = data.batch(draws)
        t = time_at(Times("karras"), teacher.path, draws.stratified("level"))
        x_t = teacher.path.add_noise(made.real, t, draws.normal("forward", data.shape))
        with torch.no_grad():
            wanted = teacher(x_t, t, **made.cond)
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * turn / iters))
        loss = denoising_loss(
            net(x_t, t, **made.cond), wanted, net.path.alpha(t), net.path.sigma(t), "edm", net.sigma_data
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
