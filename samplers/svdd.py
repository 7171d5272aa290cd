"""SVDD (2408.08252): at every step several proposals, of which the one goes on whose denoised estimate is worth most.

Each particle draws ``width`` children from the sampler's own kernel, looks at the reward of what each would become,
v = r(x0_hat(x_t)), and keeps

    draw    one with probability softmax(scale v): the paper's, which aims at p exp(scale r)
    best    the best of its own
    beam    of all particles' children the best ones, as in beam search

A nested importance sampling without weights: a bias of order 1 / width remains, whatever the estimate.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids, starting_noise
    >>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
    >>> table = ddim(d.path, grids.karras(d.path, 8), eta=1.0)
    >>> x, drawn = svdd(d, starting_noise(0, 2, (1,)), table, reward=lambda x: x[:, 0], width=4, keep="best")
    >>> bool((x > 1).all()), drawn.calls                            # the first step looks once, the others four times
    (True, 29)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from ..models.denoiser import Denoiser
from ..models.rewards import Reward, Space, checked
from .best_of_n import Drawn, _kept, check_count
from .chain import Diffusion, Ids, groups_of
from .guidance import number
from .noise import uniform
from .table import Table
from .together import Walk, look, move, score, start, together

CHOOSE = 6  # the stream of choices among nodes
KEEP = ("draw", "best", "beam")


def svdd(
    d: Denoiser,
    noise: torch.Tensor,
    table: Table,
    *,
    reward: Reward,
    width: int = 4,
    particles: int = 1,
    scale: float = 1.0,
    keep: Literal["draw", "best", "beam"] = "draw",
    levels: int | Sequence[int] | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    reward_space: Space = "image",
    rows: int = 64,
) -> tuple[torch.Tensor, Drawn]:
    """The best of ``particles`` (with ``keep="draw"`` the first) for each row of ``noise``, by ``width`` proposals.

    Proposals for different rows of noise share a network call up to ``rows``.
    """
    check_count("width", width)
    check_count("particles", particles)
    number("scale", scale)
    if keep not in KEEP:
        raise ValueError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
    judge = checked(reward, getattr(d, "codec", None), reward_space)
    chains = groups_of(d, noise, table, cond, ids, seed=seed, levels=levels)
    options = (judge, width, particles, scale, keep, seed)
    found = together((_beam(*one, *options) for one in chains), check_count("rows", rows))
    x, rewards = (torch.stack(parts) for parts in zip(*found))
    chain = chains[0][0]
    looked = chain.depth - 1 + sum(n - 1 for n in chain.calls)
    calls = particles * (chain.opening + 1 + width * looked)
    index = rewards.argmax(-1) if keep != "draw" else torch.zeros(len(rewards), dtype=torch.long)
    equal = torch.zeros_like(rewards)
    return _kept(Drawn(x, rewards, equal, index, equal[:, 0], calls), index)


def _beam(
    chain: Diffusion, own: Ids, judge: Reward, width: int, count: int, scale: float, keep: str, seed: int
) -> Walk[tuple[torch.Tensor, torch.Tensor]]:
    many = count * width
    tags = own.some(many)
    u = uniform(seed, torch.tensor([own.first]), count * (chain.depth + 1), stream=CHOOSE)[0].reshape(
        -1, count
    )
    node = yield start(chain, tags[:count])
    seen, _ = yield look(chain, node, 0)
    for depth in range(chain.depth):
        # a particle's first child draws under its own id, so that with one proposal this is plain sampling
        wide = torch.arange(count).repeat(width).to(node[0].device)
        node, seen = (tuple(t[wide] for t in part) for part in (node, seen))
        node = yield move(chain, node, seen, depth, tags)
        last = depth + 1 == chain.depth
        if last:
            x0, seen = node[0], ()
        else:
            seen, x0 = yield look(chain, node, depth + 1)
        value = (yield score(judge, x0, depth + 1)).double().cpu()
        chosen = _chosen(value.reshape(width, count), scale, keep, u[depth]).to(node[0].device)
        node, seen = (tuple(t[chosen] for t in part) for part in (node, seen))
    return node[0], value[chosen.cpu()]


def _chosen(value: torch.Tensor, scale: float, keep: str, u: torch.Tensor) -> torch.Tensor:
    """Rows (count,) of the children (width, count), laid out proposal by proposal."""
    width, count = value.shape
    if keep == "beam":
        return value.flatten().argsort(descending=True, stable=True)[:count]
    if keep == "best":
        which = value.argmax(0)
    else:
        upto = (scale * value).softmax(0).cumsum(0).T.contiguous()
        which = torch.searchsorted(upto, (u * upto[:, -1])[:, None]).clamp_max(width - 1)[:, 0]
    return which * count + torch.arange(count)
