"""Best of n, and self-normalised importance sampling: n rollouts, of which one is kept.

    best_of_n    the rollout of highest reward: its law is within log n - (n - 1)/n nats of the model's
    importance   one drawn with probability  softmax(scale r):  as n grows, from  p exp(scale r) / Z

What every other way of spending network calls on a reward has to beat.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids, starting_noise
    >>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.flow())
    >>> table, noise = ddim(d.path, grids.uniform(d.path, 8)), starting_noise(0, 3, (1,))
    >>> x, drawn = best_of_n(d, noise, table, reward=lambda x: x[:, 0], n=50)
    >>> x.shape, bool((x > 1).all()), drawn.x.shape, drawn.calls
    (torch.Size([3, 1]), True, torch.Size([3, 50, 1]), 400)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..models.denoiser import Denoiser
from ..models.rewards import Reward, Space, checked
from .chain import Diffusion, Ids, groups_of
from .noise import uniform
from .table import Table
from .together import Walk, look, move, score, start, together

PICK = 5  # the stream of the one draw a group, after the last row


class Drawn(NamedTuple):
    """``x`` (groups, n, ...), ``rewards`` and ``log_weights`` (groups, n); ``index`` (groups,): which was kept;
    ``log_z`` (groups,): log of the estimate of E[exp(scale r)]; ``calls``: network calls a group."""

    x: torch.Tensor
    rewards: torch.Tensor
    log_weights: torch.Tensor
    index: torch.Tensor
    log_z: torch.Tensor
    calls: int


def best_of_n(
    d: Denoiser,
    noise: torch.Tensor,
    table: Table,
    *,
    reward: Reward,
    n: int = 16,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    reward_space: Space = "image",
    batch: int = 256,
) -> tuple[torch.Tensor, Drawn]:
    """The best of n samples for each row of ``noise``, the first of them being the row's own."""
    drawn = _draw(d, noise, table, reward, n, 0.0, cond, seed, ids, reward_space, batch)
    return _kept(drawn, drawn.rewards.argmax(-1))


def importance(
    d: Denoiser,
    noise: torch.Tensor,
    table: Table,
    *,
    reward: Reward,
    n: int = 16,
    scale: float = 1.0,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    reward_space: Space = "image",
    batch: int = 256,
) -> tuple[torch.Tensor, Drawn]:
    """One of n samples for each row of ``noise``, drawn by softmax(scale r)."""
    drawn = _draw(d, noise, table, reward, n, scale, cond, seed, ids, reward_space, batch)
    return _kept(drawn, pick(drawn.log_weights, seed, ids))


def pick(log_weights: torch.Tensor, seed: int, ids: torch.Tensor | None = None) -> torch.Tensor:
    """(groups,): one of each group's particles by weight; the first where all weights are equal."""
    groups = len(log_weights)
    u = uniform(seed, torch.arange(groups) if ids is None else ids.cpu(), 1, stream=PICK)
    upto = log_weights.double().softmax(-1).cumsum(-1)
    index = torch.searchsorted(upto, u * upto[:, -1:]).clamp_max(log_weights.shape[1] - 1)[:, 0]
    return torch.where((log_weights == log_weights[:, :1]).all(-1), 0, index)


def check_count(name: str, value: Any) -> int:
    """A positive int; else ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _draw(d, noise, table, reward, n, scale, cond, seed, ids, space, batch) -> Drawn:
    judge = checked(reward, getattr(d, "codec", None), space)
    check_count("n", n)
    check_count("batch", batch)
    chains = groups_of(d, noise, table, cond, ids, seed=seed, levels=None)
    made, rewards = zip(*together((rollouts(*one, judge, n, batch) for one in chains), batch))
    values = torch.stack(rewards)
    weights = scale * values
    log_z = weights.logsumexp(-1) - torch.tensor(float(n)).log()
    return Drawn(torch.stack(made), values, weights, values.argmax(-1), log_z, n * table.calls)


def rollouts(
    chain: Diffusion, own: Ids, judge: Reward, n: int, batch: int
) -> Walk[tuple[torch.Tensor, torch.Tensor]]:
    """Draws 0 .. n - 1 of a chain, from noise to x0 (n, ...), and their rewards (n,)."""
    made, rewards = [], []
    for begin in range(0, n, batch):
        tags = own.some(min(batch, n - begin), begin)
        node = yield start(chain, tags)
        for depth in range(chain.depth):
            seen, _ = yield look(chain, node, depth)
            node = yield move(chain, node, seen, depth, tags)
        rewards.append((yield score(judge, node[0], chain.depth)).double().cpu())
        made.append(node[0])
    return torch.cat(made), torch.cat(rewards)


def _kept(drawn: Drawn, index: torch.Tensor) -> tuple[torch.Tensor, Drawn]:
    rows = torch.arange(len(index), device=drawn.x.device)
    return drawn.x[rows, index.to(drawn.x.device)], drawn._replace(index=index)
