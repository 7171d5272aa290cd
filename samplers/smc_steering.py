"""Feynman-Kac steering (2501.06848): particles resampled on their way by the rewards of their denoised estimates.

K particles walk a stochastic chain. With r_t = r(x0_hat(x_t)), and r_0 the reward itself, potentials

    difference   G_t = exp(scale (r_t - r_before))
    max          G_t = exp(scale max_{s >= t} r_s)
    sum          G_t = exp(scale sum_{s >= t} r_s)

are collected, and the last one is such that their product is exp(scale r_0): the weighted particles follow
p exp(scale r) / Z as K grows, whatever the estimates are worth. How large K must be is what they decide.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids, starting_noise
    >>> d = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.1).denoiser(paths.edm())
    >>> table = ddim(d.path, grids.karras(d.path, 8), eta=1.0)
    >>> x, drawn = smc_steering(d, starting_noise(0, 4, (1,)), table, reward=lambda x: 4 * x[:, 0], particles=16)
    >>> x.shape, bool((x > 0).all()), drawn.calls
    (torch.Size([4, 1]), True, 128)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from ..models.denoiser import Denoiser
from ..models.rewards import Reward, Space, checked
from . import smc
from .best_of_n import Drawn, _kept, check_count, pick
from .chain import Diffusion, Ids, groups_of
from .guidance import number
from .table import Table
from .together import Walk, look, move, score, start, together

POTENTIALS = ("difference", "max", "sum")


def smc_steering(
    d: Denoiser,
    noise: torch.Tensor,
    table: Table,
    *,
    reward: Reward,
    particles: int = 16,
    scale: float = 1.0,
    potential: Literal["difference", "max", "sum"] = "difference",
    when: smc.When = 0.5,
    scheme: str = "systematic",
    levels: int | Sequence[int] | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    reward_space: Space = "image",
    rows: int = 64,
) -> tuple[torch.Tensor, Drawn]:
    """One sample for each row of ``noise``, out of ``particles`` each, the first of which opens with it.

    Args:
        when, scheme: when and how a group resamples, see ``smc.step``.
        levels: where rewards are asked for: every row that draws noise, so many of them, or those rows.
        rows: particles of different groups share a network call up to so many.
    """
    check_count("particles", particles)
    number("scale", scale)
    if potential not in POTENTIALS:
        raise ValueError(f"potential must be one of {', '.join(POTENTIALS)}, got {potential!r}")
    judge = checked(reward, getattr(d, "codec", None), reward_space)
    chains = groups_of(d, noise, table, cond, ids, seed=seed, levels=levels)
    options = (judge, particles, scale, potential, when, scheme, seed)
    found = together((_steered(*one, *options) for one in chains), check_count("rows", rows))
    x, rewards, weights, log_z = (torch.stack(parts) for parts in zip(*found))
    drawn = Drawn(x, rewards, weights, rewards.argmax(-1), log_z, particles * table.calls)
    return _kept(drawn, pick(weights, seed, ids))


def _steered(
    chain: Diffusion, own: Ids, judge: Reward, count: int, scale, potential, when, scheme, seed
) -> Walk[tuple[torch.Tensor, ...]]:
    tags = own.some(count)
    node = yield start(chain, tags)
    cloud = smc.init((node,), count, torch.tensor([own.first], device=node[0].device))
    nothing = torch.zeros(count, dtype=torch.float64, device=node[0].device)
    paid, kept = (
        nothing,
        None,
    )  # the sum of a particle's log-potentials so far; the reward before, the max or the sum
    seen_all = []
    for depth in range(chain.depth):
        seen, x0 = yield look(chain, node, depth)
        now = scale * (yield score(judge, x0, depth)).double().to(nothing.device)
        if potential == "difference":
            gain, kept = now - paid, now
        else:
            kept = now if kept is None else torch.maximum(kept, now) if potential == "max" else kept + now
            gain = kept
        cloud, info = smc.step(
            cloud._replace(state=(node, seen, paid + gain, kept)), gain, when=when, scheme=scheme, seed=seed
        )
        seen_all.append(info)
        node, seen, paid, kept = cloud.state
        node = yield move(chain, node, seen, depth, tags)
    rewards = (yield score(judge, node[0], chain.depth)).double().to(nothing.device)
    cloud, info = smc.step(cloud._replace(state=(node,)), scale * rewards - paid, when=0.0)
    smc.check_alive(smc.stacked([*seen_all, info]))
    return node[0], rewards.cpu(), cloud.log_weights[0].cpu(), cloud.log_z[0].cpu()
