"""Pairs of samples, a winner and a loser each: what preference methods learn from, in a file or made from a reward.

    fewstep distill dpo-digits pairs=file.safetensors
    fewstep distill dpo-digits reward=class:7                # made once, kept as runs/NAME/pairs.safetensors

The file holds ``winner`` and ``loser`` (N, *shape) as the network sees samples (latents of a latent model), and where
there are any ``scores`` (N, 2), of both, and ``labels`` (N,): their classes, or the numbers of their prompts.

>>> pairs = Pairs(torch.ones(3, 2), torch.zeros(3, 2))
>>> pairs.rows(torch.tensor([2, 0])).winner.shape
torch.Size([2, 2])
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..eval.ranks import gather_rows, share
from ..models import checkpoint
from ..models.denoiser import NULL
from ..models.reward_names import named_reward
from ..models.rewards import Reward, checked
from ..samplers import cfg
from ..samplers.chain import per_sample
from .data import Data
from .draws import Draws
from .parallel import ALONE, Ranks
from .players import Batch
from .progress import track
from .student import Student

CHOICES = ("extremes", "random")
NOISES = ("none", "bradley_terry")
AT_ONCE = 512  # samples, of models without a codec


class Pairs(NamedTuple):
    """Winners and losers (N, *shape), their scores (N, 2) and their labels (N,); of a batch, too.

    ``span`` (2,): the least and the most of all scores, which rows of them no longer know.
    """

    winner: torch.Tensor
    loser: torch.Tensor
    scores: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    span: torch.Tensor | None = None

    def rows(self, which: torch.Tensor) -> Pairs:
        """The pairs ``which`` (n,)."""
        return Pairs(*(None if v is None else v[which] for v in self[:4]), self.span)


@dataclass
class Groups:
    """Pairs from a reward: ``count`` groups of ``size`` samples of the base model, each group under one condition.

    ``choose``: ``extremes``, the best of a group against its worst; ``random``, the group in pairs as it comes.
    ``noise``: ``bradley_terry`` lets the worse one of a pair win now and then (see there), none never.
    ``guidance``: the scale of classifier-free guidance that they are made with.
    """

    count: int = 256
    size: int = 8
    choose: str = "extremes"
    noise: str = "none"
    temperature: float = 0.4
    guidance: float = 1.0

    def __post_init__(self):
        if self.count < 1 or self.size < 2:
            raise ValueError(
                f"groups.count must be 1 or more and groups.size 2 or more, got {self.count} and {self.size}"
            )
        if self.choose not in CHOICES:
            raise ValueError(f"groups.choose must be one of {', '.join(CHOICES)}, got {self.choose!r}")
        if self.noise not in NOISES:
            raise ValueError(f"groups.noise must be one of {', '.join(NOISES)}, got {self.noise!r}")
        if not self.temperature > 0:
            raise ValueError(f"groups.temperature must be above 0, got {self.temperature}")


# --- made from a reward ---------------------------------------------------------------------------------------------


def make_pairs(
    base: Student, reward: Reward, data: Data, groups: Groups, seed: int = 0, ranks: Ranks = ALONE
) -> Pairs:
    """Pairs out of groups of the base model's samples; ranks share the groups and all have the pairs.

    ``data`` draws the conditions. Pairs of equal scores say nothing and are left out; ValueError where none is left.
    """
    size = groups.size
    step = max(1, (AT_ONCE if base.d.codec is None else 8) // size)  # groups at once
    pieces = range(0, groups.count, step)
    mine = [pieces[k] for k in share(len(pieces), ranks)]
    made = []
    for index, say in track(len(mine), "pairs", quiet=not ranks.first):
        first = mine[index]
        draws = Draws(seed ^ 0xBA15, 0, first, min(step, groups.count - first), groups.count, ranks.device)
        x, scores, labels = _group(base, reward, data, groups, draws)
        made.append(_paired(x, scores, labels, groups))
        say(reward=float(scores.mean()))
    columns = zip(*(pairs[:4] for pairs in made), strict=True) if made else [()] * 4
    gathered = [gather_rows(torch.cat(parts) if parts else None, ranks) for parts in columns]
    pairs = Pairs(*(v.cpu() for v in gathered if v is not None))
    differ = pairs.scores[:, 0] != pairs.scores[:, 1]
    if not bool(differ.any()):
        raise ValueError(
            f"the reward is the same for all samples of every group of {size}: there is nothing to prefer"
        )
    pairs = pairs.rows(differ.nonzero()[:, 0])
    return pairs if groups.noise == "none" else bradley_terry(pairs, groups.temperature, seed)


def _group(
    base: Student, reward: Reward, data: Data, groups: Groups, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples (n, size, ...), scores (n, size) and labels (n,) of n groups."""
    size, count = groups.size, draws.count
    drawn = draws._replace(device="cpu").uniform("data")
    labels = data.labels[0] + (drawn * len(data.labels)).long()
    batch_cond = data.cond(labels, draws.device)
    each = torch.arange(count).repeat_interleave(size)
    cond = per_sample(batch_cond, each, count)
    student = base
    if groups.guidance != 1:
        student = base._replace(d=cfg(base.d, groups.guidance))
        if base.d.codec is not None:
            cond[NULL] = data.null(batch_cond)
    noise = draws._replace(first=draws.first * size, count=count * size, total=draws.total * size)
    x = student.sample(noise.normal("start", data.shape), cond, draws.seed, noise.ids)
    with torch.no_grad():
        scores = reward(x).to(x.device, torch.float32)
    return x.reshape(count, size, *data.shape), scores.reshape(count, size), labels


def _paired(x: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, groups: Groups) -> Pairs:
    """The pairs of n groups, the better one first."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    if groups.choose == "extremes":
        a, b = scores.argmax(1, keepdim=True), scores.argmin(1, keepdim=True)
    else:
        beside = torch.arange(groups.size // 2 * 2, device=x.device).reshape(-1, 2)
        a, b = (places.expand(len(x), -1) for places in beside.unbind(1))
    wins = scores[rows, a] >= scores[rows, b]
    winner, loser = torch.where(wins, a, b), torch.where(wins, b, a)
    both = torch.stack([scores[rows, winner], scores[rows, loser]], -1).flatten(0, 1)
    return Pairs(
        x[rows, winner].flatten(0, 1),
        x[rows, loser].flatten(0, 1),
        both,
        labels.repeat_interleave(a.shape[1]),
    )


def bradley_terry(pairs: Pairs, temperature: float, seed: int) -> Pairs:
    """Pairs of which the better one wins with probability sigmoid(gap / (temperature x root of the mean gap squared)).

    What DPO makes of them has an end, the base's density times exp(r / beta'): of pairs that the reward is never wrong
    about there is none, and any model can be told apart from the base a little further.
    """
    gap = (pairs.scores[:, 0] - pairs.scores[:, 1]).double()  # type: ignore[index]
    scale = temperature * gap.square().mean().sqrt()
    drawn = Draws(seed ^ 0xBA15, 1, 0, len(gap), len(gap)).uniform("user")
    keep = drawn < (gap / scale).sigmoid()
    wins = keep.reshape(-1, *[1] * (pairs.winner.ndim - 1))
    return pairs._replace(
        winner=torch.where(wins, pairs.winner, pairs.loser),
        loser=torch.where(wins, pairs.loser, pairs.winner),
        scores=torch.where(keep[:, None], pairs.scores, pairs.scores.flip(1)),  # type: ignore[union-attr]
    )


# --- files ----------------------------------------------------------------------------------------------------------


def write_pairs(path: str | os.PathLike, pairs: Pairs, about: Mapping[str, Any] | None = None) -> None:
    """Write pairs, and what they are made of, into a .safetensors."""
    tensors = {name: value for name, value in zip(Pairs._fields[:4], pairs) if value is not None}
    checkpoint.write(path, tensors, {"kind": "pairs", **(about or {})})


def read_pairs(path: str | os.PathLike, shape: tuple[int, ...] | None = None) -> Pairs:
    """The pairs of a .safetensors, checked; ``shape``: that of the teacher's samples."""
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"pairs = {path} is no file")
    try:
        with safe_open(str(path), framework="pt") as file:
            there = set(file.keys())
            found = {name: file.get_tensor(name) for name in there & set(Pairs._fields[:4])}
    except SafetensorError as error:
        raise ValueError(f"pairs = {path} is not a safetensors file: {error}") from error
    for name in ("winner", "loser"):
        if name not in found:
            raise ValueError(
                f"pairs = {path} must hold {name}, it has {', '.join(sorted(there)) or 'nothing'}"
            )
    return check_pairs(Pairs(**found), shape, f"pairs = {path}")


def check_pairs(pairs: Pairs, shape: tuple[int, ...] | None = None, name: str = "pairs") -> Pairs:
    """The pairs, or ValueError for what no method can learn from."""
    winner, loser = pairs.winner, pairs.loser
    if len(winner) != len(loser):
        raise ValueError(f"{name} holds {len(winner)} winners and {len(loser)} losers")
    if winner.shape != loser.shape:
        shapes = f"{tuple(winner.shape[1:])} and {tuple(loser.shape[1:])}"
        raise ValueError(f"{name}: winners and losers must be of one shape, got {shapes}")
    if not len(winner):
        raise ValueError(f"{name} is empty")
    if shape is not None and tuple(winner.shape[1:]) != tuple(shape):
        raise ValueError(
            f"{name} holds samples of shape {tuple(winner.shape[1:])}, and the teacher makes {tuple(shape)}"
        )
    for field, wanted in (("scores", (len(winner), 2)), ("labels", (len(winner),))):
        value = getattr(pairs, field)
        if value is not None and tuple(value.shape) != wanted:
            raise ValueError(f"{name}: {field} must have shape {wanted}, got {tuple(value.shape)}")
    for field in ("winner", "loser", "scores"):
        value = getattr(pairs, field)
        if value is None:
            continue
        if not value.is_floating_point():
            raise ValueError(f"{name}: {field} must be floating-point, got {value.dtype}")
        for first in range(0, len(value), 1024):  # a large file is not in memory at once
            good = value[first : first + 1024].isfinite().flatten(1).all(1)
            if not bool(good.all()):
                raise ValueError(
                    f"{name}: {field} holds NaN or infinity, first in pair {first + int(good.float().argmin())}"
                )
    if pairs.labels is not None and pairs.labels.is_floating_point():
        raise ValueError(f"{name}: labels must be integers, got {pairs.labels.dtype}")
    return pairs


# --- as data --------------------------------------------------------------------------------------------------------


class PairedData(NamedTuple):
    """Batches of pairs, drawn at random with replacement; ``data`` knows what their labels mean."""

    data: Data
    pairs: Pairs

    @property
    def shape(self) -> tuple[int, ...]:
        """That of a sample."""
        return self.data.shape

    def batch(self, draws: Draws) -> Batch:
        """The batch of a turn."""
        which = (draws._replace(device="cpu").uniform("data") * len(self.pairs.winner)).long()
        pairs = self.pairs.rows(which)
        cond = self.data.cond(pairs.labels, draws.device)
        pairs = Pairs(*(None if v is None else v.to(draws.device, non_blocking=True) for v in pairs))
        pairs = pairs._replace(winner=pairs.winner.float(), loser=pairs.loser.float())
        return Batch(draws, self.shape, cond, self.data.null(cond), pairs=pairs)


def paired(data: Data, pairs: Pairs) -> PairedData:
    """Data of pairs; ValueError where the pairs' labels are none of the data's."""
    known, count = data.labels, len(pairs.winner)
    if pairs.scores is not None:
        pairs = pairs._replace(span=torch.stack(pairs.scores.aminmax()))
    if len(known) == 1:  # one condition for all: what the labels say is of no concern
        return PairedData(data, pairs._replace(labels=torch.full((count,), known[0])))
    if pairs.labels is None:
        raise ValueError(
            f"pairs have no labels, and the model has {len(known)} conditions: add labels (N,), or say "
            "data.path=unconditional"
        )
    least, most = int(pairs.labels.min()), int(pairs.labels.max())
    if least < known[0] or most > known[-1]:
        raise ValueError(
            f"labels of pairs must lie in {known[0]} .. {known[-1]}, got {least if least < known[0] else most}"
        )
    return PairedData(data, pairs)


def open_pairs(
    method: Any, base: Student, data: Data, kept: Path, seed: int = 0, ranks: Ranks = ALONE
) -> PairedData:
    """The pairs of a method: of the file that it names, or those made of its reward, now or before, in ``kept``."""
    if method.pairs is not None:
        return paired(data, read_pairs(method.pairs, data.shape))
    if method.reward is None:
        raise ValueError(
            "pairs come from a file or from a reward: give pairs=FILE.safetensors or reward=NAME"
        )
    there = kept.is_file()
    ranks.wait()  # all have looked before one writes
    if not there:
        make_file(kept, method.reward, base, data, method.groups, seed, ranks)
    return paired(data, read_pairs(kept, data.shape))


def make_file(
    path: Path, reward: str, base: Student, data: Data, groups: Groups, seed: int = 0, ranks: Ranks = ALONE
) -> None:
    """Make pairs from a reward by its name, and a file of them."""
    pairs = make_pairs(base, checked(named_reward(reward), base.d.codec), data, groups, seed, ranks)
    if ranks.first:
        write_pairs(path, pairs, about(reward, groups, base, seed))
    ranks.wait()


def about(reward: str, groups: Groups, base: Student, seed: int) -> dict[str, Any]:
    """What is known of pairs that were made; ``passes``: what they cost, in network calls of one sample."""
    calls = base.calls * (1 if groups.guidance == 1 else 2)
    return {
        "reward": reward, "groups": asdict(groups), "seed": seed, "solver": base.table.solver,
        "passes": groups.count * groups.size * calls,
    }  # fmt: skip
