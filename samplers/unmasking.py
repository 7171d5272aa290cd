"""What samplers of masked diffusion models share: positions are revealed in groups, one network call a group.

When a token is revealed does not depend on the network (2409.02908): each of n hidden positions has a time of its own,
at which 1 - alpha(t) is uniform on (0, 1), and all are independent. So who is revealed, when, and with whom is known
before the first call (``Groups``), and a sampler is a way to group: one by one, so many at a time, or all that fall
into one step of a grid. Then ``unmask`` asks the network once a group and draws its tokens, by the Gumbel draw of
``kernels``, which is exact in the tail. Samples of a batch go through groups of their own side by side.

Randomness is counted by (seed, id of the sample, position), so it does not depend on the grouping either: samplers
that group more and more finely reach the very sample of the finest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..kernels.gumbel_draw import gumbel_draw
from ..models.masked import MaskedModel
from .noise import Seed, check_ids, seed_on, uniform

HITS = 10  # the noise stream of the times at which positions are revealed


class Info(NamedTuple):
    """How tokens were revealed. ``calls``: of the network; ``needed`` (B,): those that a sample was in need of;
    ``times`` (B, L): when each token was revealed, 1 for those that were given; ``log_probs`` (B, L): of each token
    when it was drawn, 0 for those that were given. (``log_probs.sum(1)`` is the log-probability of a sample and of the
    order of its groups' tokens under what was drawn from, temperature and all.)"""

    calls: int
    needed: torch.Tensor
    times: torch.Tensor
    log_probs: torch.Tensor


class Request(NamedTuple):
    """A checked call of a sampler."""

    tokens: torch.Tensor
    ids: torch.Tensor
    seed: torch.Tensor
    cond: dict[str, Any]
    temperature: float
    top_p: float


class Groups(NamedTuple):
    """``order`` (B, L): positions, those to be revealed first; ``times`` (B, L): when, in that order. The g-th group
    of a sample is ``order[start : start + count]``, its network is asked at time ``at``: (B, G) each. ``widest``: the
    largest count of each group over the batch, G ints."""

    order: torch.Tensor
    times: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    at: torch.Tensor
    widest: list[int]


def request(
    model: MaskedModel,
    prompt: torch.Tensor | int,
    seed: Seed,
    ids: torch.Tensor | None,
    cond: Mapping[str, Any] | None,
    temperature: float,
    top_p: float,
) -> Request:
    """What the samplers are asked for, checked."""
    if not isinstance(model, MaskedModel):
        raise TypeError(
            f"model must be a MaskedModel, e.g. load_masked('digits-masked'), got {type(model).__name__}"
        )
    if isinstance(prompt, int) and not isinstance(prompt, bool):
        if prompt < 0:
            raise ValueError(f"prompt must be tokens (B, {model.length}), or how many samples, got {prompt}")
        tokens = model.masks(prompt)
    else:
        tokens = model.check(prompt, "prompt").clone()
    batch = len(tokens)
    ids = torch.arange(batch) if ids is None else check_ids(ids, batch)
    for name, value in (cond or {}).items():
        if isinstance(value, torch.Tensor) and (value.ndim == 0 or len(value) != batch):
            raise ValueError(
                f"cond[{name!r}] must have a row for each of {batch} samples, got shape {tuple(value.shape)}"
            )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    return Request(
        tokens, ids.to(tokens.device), seed_on(seed, tokens.device), dict(cond or {}), temperature, top_p
    )


def hits(model: MaskedModel, asked: Request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order, share, n): positions in the order in which they are revealed, the share 1 - alpha that is hidden just
    then, falling along a row, both (B, L); and how many are hidden at all, (B,). The rest are at the end, at share 1.

    Sorted uniforms are the paper's recursion: the largest of n is u^(1/n) with u uniform, and so on below it.
    """
    hidden = asked.tokens == model.mask
    share = uniform(asked.seed, asked.ids, model.length, stream=HITS)
    share, order = torch.where(hidden, share, -1.0).sort(1, descending=True)
    return order, share.where(share >= 0, 1.0), hidden.sum(1)


@torch.no_grad()
def unmask(
    model: MaskedModel, asked: Request, groups: Groups, order: int = 1, progress: bool = False
) -> tuple[torch.Tensor, Info]:
    """The finished tokens (B, L), and how they came about.

    ``order`` 2: within a group, each position's probabilities are extrapolated in time, to its own, through those of
    this call and the one before.
    """
    tokens, ids, seed, cond, temperature, top_p = asked
    times = torch.ones(tokens.shape, dtype=torch.float64, device=tokens.device)
    log_probs = torch.zeros(tokens.shape, device=tokens.device)
    heat = torch.full((1,), temperature, device=tokens.device)
    seeds = seed if seed.numel() == 1 else seed[:, None]
    before, wrong = None, []
    for g, width in enumerate(bar(groups.widest, progress)):
        at = groups.at[:, g]
        logits = model(tokens, at, **cond)
        column = torch.arange(width, device=tokens.device)
        place = (groups.start[:, g, None] + column) % model.length  # all different, wanted or not
        wanted = column < groups.count[:, g, None]
        where, when = groups.order.gather(1, place), groups.times.gather(1, place)
        here = logits.gather(1, where[..., None].expand(-1, -1, model.vocabulary))
        if order == 2:
            chances = logits.softmax(-1)
            if before is not None:
                here = _extrapolated(before, (chances, at), where, when)
            before = chances, at
        if top_p < 1:
            here = nucleus(here / temperature, top_p) * temperature
        token, log_prob = gumbel_draw(
            here.flatten(0, 1),
            seeds if seed.numel() == 1 else seeds.expand_as(where).flatten(),
            ids[:, None].expand_as(where).flatten(),
            where.flatten(),
            mask=wanted.flatten(),
            temperature=heat,
        )
        token, log_prob = token.view_as(where), log_prob.view_as(where).float()
        wrong.append((~log_prob.isfinite() & wanted).any())
        tokens = tokens.scatter(1, where, token.where(wanted, tokens.gather(1, where)))
        times = times.scatter(1, where, when.where(wanted, times.gather(1, where)))
        log_probs = log_probs.scatter(1, where, log_prob.where(wanted, log_probs.gather(1, where)))
    if wrong and bool((bad := torch.stack(wrong)).any()):
        raise ValueError(
            f"the model's logits are NaN or leave no token at call {int(bad.int().argmax())} of {len(wrong)}: its "
            "output is not finite, or the prompt has probability 0"
        )
    return tokens, Info(len(groups.widest), (groups.count > 0).sum(1), times, log_probs)


def _extrapolated(
    before: tuple[torch.Tensor, torch.Tensor],
    now: tuple[torch.Tensor, torch.Tensor],
    where: torch.Tensor,
    when: torch.Tensor,
) -> torch.Tensor:
    """Log of the line through two calls' probabilities, at each position's own time; below 0 it is cut."""
    (old, old_at), (new, at) = before, now
    gap = (old_at - at)[:, None]
    ahead = torch.where(gap > 0, (at[:, None] - when) / gap.clamp_min(1e-12), 0.0).to(new.dtype)[..., None]
    index = where[..., None].expand(-1, -1, new.shape[-1])
    old, new = old.gather(1, index), new.gather(1, index)
    return (new + ahead * (new - old)).clamp_min(0).log()


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of tokens that has probability ``top_p`` or more (1904.09751); the others are -inf.

    >>> nucleus(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.6).isfinite().tolist()
    [[True, True, False]]
    """
    sorted_logits, index = logits.sort(-1, descending=True)
    chance = sorted_logits.softmax(-1)
    spare = chance.cumsum(-1) - chance >= top_p  # the tokens before it have enough
    return logits.masked_fill(torch.zeros_like(spare).scatter(-1, index, spare), -math.inf)


def bar(groups: list[int], progress: bool):
    """The groups, under a bar if one is wanted."""
    if not progress:
        return groups
    from tqdm.auto import tqdm

    return tqdm(groups, desc="unmasking", unit="call")
