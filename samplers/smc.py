"""Sequential Monte Carlo over any chain: particles move, are weighed, and now and then resampled.

Groups of K particles stand for one sample each (a prompt); they share nothing but the batch. A move takes particles
from row to row and answers the logarithm of the potential of each; the weighted cloud then follows the chain's law
times the product of potentials (Del Moral, 2004):

    log w += log G(x)          ESS < when K:   x <- x[index],   log Z += log mean w,   log w = 0

State and info are named tuples, and ``init`` and ``step`` all there is; ``run`` folds them. Nothing waits for a GPU:
whether to resample is decided there, and a group that does not gets its own particles back; the systematic scheme is
one kernel there. A particle's id belongs to its slot, so clones draw different noise from the next row on.

>>> import torch
>>> start = torch.zeros(1 * 4, 2)                                   # one group of four particles in two dimensions
>>> def move(x, row): return x + torch.arange(4.0)[:, None], -x[:, 0]
>>> end, seen = run(move, start, 3, particles=4, when=0.6)
>>> end.state.shape, end.log_weights.shape, seen.ess.shape, seen.resampled[:, 0].tolist()
(torch.Size([4, 2]), torch.Size([1, 4]), torch.Size([3, 1]), [False, True, False])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from ..kernels import resample as kernel
from ..kernels.dispatch import choose, idle
from . import loop
from .noise import Seed, check_ids, uniform
from .resampling import check_scheme, ess, log_mean_exp, multinomial, resample, uniforms

PICK = 5  # the stream of the one draw a group, after the last row
When = float | Collection[int]


class Particles(NamedTuple):
    """``state``: whatever ``take`` permutes, groups * K rows, a group's side by side. ``log_weights`` (groups, K) in
    float64, since the group's last resampling; ``ancestors`` (groups, K): which opening particle each stems from;
    ``log_normaliser`` (groups,): up to the last resampling; ``ids`` (groups,); ``row`` counts steps."""

    state: Any
    log_weights: torch.Tensor
    ancestors: torch.Tensor
    log_normaliser: torch.Tensor
    ids: torch.Tensor
    row: int

    @property
    def log_z(self) -> torch.Tensor:
        """(groups,): log of the estimate of the normaliser up to now; its exponential is unbiased."""
        return self.log_normaliser + log_mean_exp(self.log_weights)

    @property
    def distinct(self) -> torch.Tensor:
        """(groups,): how many of the opening particles have descendants."""
        return (self.ancestors.sort(-1).values.diff(dim=-1) != 0).sum(-1) + 1


class Info(NamedTuple):
    """Of one step, before its resampling: ``ess`` (groups,); ``resampled`` (groups,) bools; ``index`` (groups, K):
    where each particle came from. Of a run: the same with an axis of rows in front."""

    ess: torch.Tensor
    resampled: torch.Tensor
    index: torch.Tensor


def init(state: Any, particles: int, ids: torch.Tensor | None = None) -> Particles:
    """Particles of equal weight; ``state`` holds groups * particles rows, ``ids`` are the groups' (0, 1, .. unless
    given)."""
    rows, device = _rows(state)
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 1:
        raise ValueError(f"particles must be a positive integer, got {particles!r}")
    if rows % particles:
        raise ValueError(f"state must hold a multiple of {particles} particles, got {rows}")
    groups = rows // particles
    ids = torch.arange(groups, device=device) if ids is None else check_ids(ids, groups).to(device)
    weights = torch.zeros(groups, particles, dtype=torch.float64, device=device)
    ancestors = torch.arange(particles, device=device).repeat(groups, 1)
    return Particles(state, weights, ancestors, weights.new_zeros(groups), ids, 0)


def step(
    particles: Particles,
    log_potentials: torch.Tensor,
    *,
    when: When = 0.5,
    scheme: str = "systematic",
    seed: Seed = 0,
    active: bool = True,
    u: torch.Tensor | None = None,
) -> tuple[Particles, Info]:
    """Weigh the particles by ``log_potentials`` (groups * K,) or (groups, K), and resample where it is time.

    Args:
        when: resample a group whose ESS is below this share of K (0: never, 1: whenever weights differ); or the rows
            after which all groups do.
        scheme: of ``resampling``.
        active: False keeps the weights for later: outside the interval in which resampling is on.
        u: the row's of ``resampling.uniforms``; drawn here unless given.
    """
    check_scheme(scheme)
    groups, count = particles.log_weights.shape
    weights = particles.log_weights + _potentials(log_potentials, groups, count)
    moved = particles._replace(log_weights=weights, row=particles.row + 1)
    if active and scheme == "systematic" and _takes(weights):
        u = uniforms(particles.ids, count, range(particles.row, moved.row), seed)[0] if u is None else u
        # its ESS is a float32: what lies within these digits of K is no difference of weights
        limit = torch.full((1,), _limit(when, particles.row, count) * (1 - 1e-6), device=weights.device)
        index, size, mean, now = kernel.resample(weights, u, limit)
    else:
        size = ess(weights)
        limit = _limit(when, particles.row, count) if active else 0.0
        now, index = size < limit, torch.arange(count, device=size.device).expand(groups, count)
        if not active or (size.device.type == "cpu" and not bool(now.any())):  # a CPU may look
            return moved, Info(size, now, index)
        chosen = resample(weights, particles.ids, particles.row, seed, scheme, u)
        index, mean = torch.where(now[:, None], chosen, index), log_mean_exp(weights)
    moved = moved._replace(
        state=take(
            particles.state, (index + count * torch.arange(groups, device=index.device)[:, None]).flatten()
        ),
        log_weights=torch.where(now[:, None], 0.0, weights),
        ancestors=particles.ancestors.gather(-1, index),
        log_normaliser=particles.log_normaliser + torch.where(now, mean, 0.0),
    )
    return moved, Info(size, now, index)


def run(
    move: Callable[[Any, int], tuple[Any, torch.Tensor]],
    state: Any,
    steps: int,
    *,
    particles: int,
    ids: torch.Tensor | None = None,
    when: When = 0.5,
    scheme: str = "systematic",
    seed: Seed = 0,
    active: Callable[[int], bool] = lambda row: True,
) -> tuple[Particles, Info]:
    """``steps`` times ``move(state, row) -> (state, log_potentials)`` and ``step``."""
    cloud, seen = init(state, particles, ids), []
    for row in range(steps):
        state, potentials = move(cloud.state, row)
        cloud, info = step(
            cloud._replace(state=state), potentials, when=when, scheme=scheme, seed=seed, active=active(row)
        )
        seen.append(info)
    history = stacked(seen)
    check_alive(history)
    return cloud, history


def take(state: Any, index: torch.Tensor) -> Any:
    """The rows at ``index`` of every tensor in a state: of a sampler's state all but the ids, which stay with their
    slots, and of tuples, lists and mappings of states. What is no tensor is kept."""
    if isinstance(state, loop.State):
        return loop.take(state, index)._replace(ids=state.ids)
    if isinstance(state, torch.Tensor):
        return state[index]
    if isinstance(state, Mapping):
        return {key: take(value, index) for key, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(take(value, index) for value in state))
    if isinstance(state, (tuple, list)):
        return type(state)(take(value, index) for value in state)
    return state


def pick(particles: Particles, seed: Seed = 0) -> torch.Tensor:
    """(groups,): for each group the row of one particle drawn by weight, in the state's numbering; the group's first
    where all weights are equal, as good a draw as any."""
    weights = particles.log_weights
    drawn = multinomial(weights, uniform(seed, particles.ids, 1, particles.row, PICK))[:, 0]
    drawn = torch.where((weights == weights[:, :1]).all(-1), 0, drawn)
    return drawn + weights.shape[1] * torch.arange(len(weights), device=weights.device)


def stacked(seen: list[Info]) -> Info:
    """The infos of many steps as one, with an axis of rows in front."""
    return Info(*(torch.stack(values) for values in zip(*seen, strict=True)))


def check_alive(history: Info) -> None:
    """``ValueError`` if at some row a group had no weight left, or one that is no number: one wait, at the end."""
    dead = history.ess.isnan()
    if bool(dead.any()):
        row, group = dead.nonzero()[0].tolist()
        raise ValueError(
            f"log_potentials left group {group} without any weight at step {row}: all its particles have weight 0 "
            "(log-weight -inf) or one that is no number"
        )


def _potentials(values: torch.Tensor, groups: int, count: int) -> torch.Tensor:
    if not isinstance(values, torch.Tensor) or values.shape not in ((groups * count,), (groups, count)):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(
            f"log_potentials must be one number a particle, ({groups * count},) or ({groups}, {count}), got {got}"
        )
    return values.detach().double().reshape(groups, count)


def _takes(weights: torch.Tensor) -> bool:
    """Whether the resampling kernel does this step: by default on a GPU."""
    return not idle(weights) and choose("resample", None, [weights], kernel.unsupported(weights)) == "triton"


def _limit(when: When, row: int, count: int) -> float:
    """The ESS below which a group is resampled."""
    if isinstance(when, Collection):
        return math.inf if row in when else 0.0
    if isinstance(when, bool) or not isinstance(when, (int, float)) or not 0 <= when <= 1:
        raise ValueError(
            f"when must be a share of the particles, 0 .. 1, or a collection of rows, got {when!r}"
        )
    return when * count * (1 - 1e-12)  # a rounding below K is no difference of weights


def _rows(state: Any) -> tuple[int, torch.device]:
    """How many rows the first tensor in a state has, and where it lies."""
    if isinstance(state, loop.State):
        state = state.x
    if isinstance(state, torch.Tensor):
        return len(state), state.device
    if isinstance(state, Mapping):
        state = list(state.values())
    for value in state if isinstance(state, (tuple, list)) else ():
        try:
            return _rows(value)
        except TypeError:
            continue
    raise TypeError(f"state must hold a tensor with a row a particle, got {type(state).__name__}")
