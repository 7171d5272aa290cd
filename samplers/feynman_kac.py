"""Feynman-Kac correctors (2503.02819): particles whose weighted law is a given combination of models at every level.

Blended scores are the scores of no noised density, so a sampler that walks along them ends off the density they aim at.
With a drift  v = u + (z^2 / 2) S,  S = sum_i b_i s_i  the target's score and z any noise, a particle's log-weight grows
at a rate in which z does not appear. Written in eps and the log-SNR, and for all paths and predictions alike,

    d log w / d lam  =  - (1/B) sum_{i<j} b_i b_j |e_i - e_j|^2  +  (1 - 1/B) { |E|^2          drift="target"
                                                                              { sigma div E     drift="transport"

with E = sum_i b_i e_i, B = sum_i b_i, lam = log(alpha / sigma). ``"target"`` is the paper's  u = -f + (g^2 / 2) S:
no further network passes, but weights whose spread grows with the root of the dimension, for a single Gaussian
already. ``"transport"`` is  u = -f + (g^2 / 2) S / B,  the probability flow of the normalised blend, with all noise
scaled by 1 / sqrt(B): for one Gaussian its weights are equal, and what they measure is how little the densities are
Gaussians; it needs a divergence. ``"tempered"`` is the paper's other proposal for annealing, tempered noise: the target
drift's weights, with z = g / sqrt(B) in the place of z = g; for B > 1 its particles are too narrow (of one Gaussian,
variance v / B^2 where v / B is wanted), and weights that must widen a cloud spread most. Where B = 1 (cfg, geometric
means, rlg) all are one. A table may draw any noise. The target drift is stiff: at high noise it contracts B times as
fast (the tempered (1 + B) / 2 times), and steps of more than about 1 / B in lam, or multistep rows, make it swing.

>>> from fewstep.models import GaussianMixture, paths
>>> from fewstep.samplers import ddim, grids, starting_noise, targets
>>> p = GaussianMixture([0.3, 0.7], [[-2.0], [1.5]], [0.16, 0.49])
>>> d, noise = p.denoiser(paths.edm()), starting_noise(0, 1, (1,), torch.float64)
>>> table = ddim(d.path, grids.logsnr(d.path, 60), eta=1.0)
>>> x, info = feynman_kac(d, noise, table, target=targets.anneal(beta=2.0), particles=500, drift="transport")
>>> left = (info.weights * (info.particles[..., 0] < 0)).sum(-1)
>>> x.shape, bool((left - 0.244).abs() < 0.06)                    # p^2 has that much there; p has 0.3
(torch.Size([1, 1]), True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ..models.denoiser import Denoiser
from . import loop, smc
from .feynman_kac_rates import is_one
from .feynman_kac_walk import Drift, Quadrature, Walk, check_tempered, drift_denoiser
from .noise import START, Seed, check_ids, normal, seed_on, words
from .plan import Plan
from .powers import Powers, scaled
from .resampling import uniforms
from .table import Table
from .targets import Target, own

SEEDS = 7  # the stream of the seeds that particles draw under


class Info(NamedTuple):
    """What the particles did. ``particles`` (groups, K, ...) and their normalised ``weights`` (groups, K); ``index``
    (groups,): which of them was drawn; ``ancestors`` (groups, K): the opening particle that each stems from, and how
    many are left, ``distinct``; ``ess`` and ``resampled`` (steps, groups); ``log_normaliser`` (groups,): of the
    integral of the product of powers; ``calls``: network calls for a sample; ``passes``: differentiated ones."""

    particles: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor
    ancestors: torch.Tensor
    distinct: torch.Tensor
    ess: torch.Tensor
    resampled: torch.Tensor
    log_normaliser: torch.Tensor
    calls: int
    passes: int


def feynman_kac(
    d: Denoiser | Sequence[Denoiser],
    noise: torch.Tensor,
    table: Table | Plan,
    *,
    target: Target | None = None,
    particles: int = 8,
    drift: Drift = "target",
    divergence: Literal["exact", "hutchinson"] | int = "hutchinson",
    quadrature: Quadrature = "trapezoid",
    batch: int | None = None,
    when: smc.When = 0.5,
    scheme: str = "systematic",
    interval: tuple[float, float] | None = None,
    clip: float | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    ids: torch.Tensor | None = None,
    callback: Callable[[loop.Info], None] | None = None,
    progress: bool = False,
    check: Literal["end", "off"] = "end",
) -> tuple[torch.Tensor, Info]:
    """One draw (B, ...) from the target for each row of standard normal ``noise`` (B, ...), out of ``particles`` each.

    Args:
        d: a model, or the models of a product.
        table: any table on their path whose steps can be told apart; how much noise it draws is free.
        target: of ``targets`` (a reward is waited for, nothing else is); by default what d stands for: the density that
            a guided model aims at.
        particles: how many stand for one row of noise. The first of them opens with it and draws as ``sample`` does;
            where all weights are equal (exponent 1, no reward) it is the sample, bit for bit.
        drift: the tempered wants a table with the reverse SDE's own noise, ``ddim(eta=1.0)`` or ``sde_dpmpp``.
        divergence: ``"exact"`` (a pass a dimension) or ``"hutchinson"`` with one probe, or the number of probes. Of two
            or more the weights are of second order; what one leaves is of first order in the step.
        quadrature: of a step's log-weight: ``"trapezoid"``, of second order, or ``"left"``, the paper's.
        batch: so many particles at a time go through the network, its derivative and the reward; by default all.
            What comes out does not depend on it, as far as the network's rows do not depend on one another's number.
        when, scheme: when a group resamples and how, see ``smc.step``.
        interval: noise levels lo < sigma/alpha <= hi in which it may; weights are collected everywhere.
        clip: how far a step's log-weight may lie from its group's mean, as released code has it: no longer exact.
        cond: conditions with a row a sample, or one for all.
        seed, ids: key all noise; a group's particles differ in a seed made of ``seed`` and their number.
        callback: gets a ``loop.Info`` after every call, of all particles.

    >>> from fewstep.models import load
    >>> from fewstep.samplers import ddim, grids, sample, starting_noise, targets
    >>> d, noise, cond = load("digits"), starting_noise(0, 2, (1, 8, 8)), {"label": torch.tensor([3, 7])}
    >>> table = ddim(d.path, grids.vp(d.path, 6), eta=0.5)
    >>> x, info = feynman_kac(d, noise, table, target=targets.cfg(scale=2.0), particles=4, cond=cond)
    >>> x.shape, info.particles.shape, info.calls                # 6 steps, with and without the label, 4 particles
    (torch.Size([2, 1, 8, 8]), torch.Size([2, 4, 1, 8, 8]), 48)
    """
    probes = _check(drift, divergence, quadrature, particles, batch, interval, clip, check)
    target = own() if target is None else target
    if not isinstance(target, Target):
        raise TypeError(
            f"target must be one of targets, e.g. targets.anneal(2.0), got {type(target).__name__}"
        )
    if not isinstance(noise, torch.Tensor) or noise.ndim < 2 or not noise.is_floating_point():
        raise ValueError(
            "noise must be a floating-point tensor (batch, ...) of standard normals, a row a group"
        )
    groups, device = len(noise), noise.device
    densities = target.bind(tuple(d) if isinstance(d, (list, tuple)) else (d,), _spreader(groups, particles))
    target.check_branches(densities, cond or {})
    plan = _plan(densities, table, drift, noise)
    walk = Walk(densities, plan, drift, probes, target.tilt, clip, quadrature, particles, batch)
    ids = torch.arange(groups, device=device) if ids is None else check_ids(ids, groups).to(device)
    cond = _spreader(groups, particles)(cond or {})
    seen, totals = [], []
    with torch.no_grad():
        state, seeds = _opening(plan, noise, ids, particles, seed)
        cloud, pending = walk.start(state)
        swarm = smc.init(cloud, particles, ids)
        draws = None  # all at once where they are few: a draw costs many small operations
        if scheme == "systematic":
            draws = uniforms(ids, particles, range(len(walk.steps)), seed)
        for row in loop._bar(plan.table.calls, progress):
            moved, gain, info = walk(swarm.state, row, cond, seeds)
            pending = pending + gain
            swarm = swarm._replace(state=moved)
            totals.append(loop._total(info.outputs))
            if callback is not None:
                callback(info)
            if row + 1 in walk.closing:
                inside = row + 1 < plan.table.calls and _inside(interval, walk.rho[walk.steps[row + 1]])
                u = None if draws is None else draws[swarm.row]
                swarm, happened = smc.step(
                    swarm, pending, when=when, scheme=scheme, seed=seed, active=inside, u=u
                )
                seen.append(happened)
                pending = torch.zeros_like(pending)
    history = smc.stacked(seen)
    if check == "end":
        loop._raise_unless_finite(totals, plan, 0, 0)
        smc.check_alive(history)
    return _answer(swarm, walk, history, seed)


def _spreader(groups: int, particles: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Makes of a condition with a row a group one with a row a particle; what has another first axis is kept."""

    def wide(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: wide(inner) for key, inner in value.items()}
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == groups:
            return value.repeat_interleave(particles, 0)
        return value

    return wide


def _plan(densities: Powers, table: Table | Plan, drift: Drift, noise: torch.Tensor) -> Plan:
    """The table at the target's scale, on the drift's denoiser."""
    table = table.table if isinstance(table, Plan) else table
    if not isinstance(table, Table):
        raise TypeError(
            f"table must be a Table, e.g. ddim(d.path, times, eta=1.0), got {type(table).__name__}"
        )
    shape = densities.shape
    if shape is not None and tuple(noise.shape[1:]) != shape:
        raise ValueError(
            f"noise must have shape (batch, {', '.join(map(str, shape))}) for this model, got {tuple(noise.shape)}"
        )
    root = math.sqrt(densities.total)
    if not is_one(densities.total):
        if drift != "transport" and densities.path.alpha(float(table.times.flat[0])) == 0:
            raise ValueError(
                f"drift={drift!r} cannot open at alpha = 0, where its drift is infinite: build the table on a grid "
                "that begins later (t_max=0.99), or take drift='transport'"
            )
        if drift == "tempered":
            check_tempered(table, densities)
    table = scaled(table, 1 / root, 1.0 if drift == "target" else 1 / root)
    return table.on(drift_denoiser(densities, drift), noise.device)


def _opening(
    plan: Plan, noise: torch.Tensor, ids: torch.Tensor, particles: int, seed: Seed
) -> tuple[loop.State, torch.Tensor]:
    """The opening state of groups * K particles, each group's first from its own noise, and a seed a particle."""
    noise = noise if noise.dtype == torch.float64 else noise.float()
    own_seed = seed_on(seed, ids.device)
    high, low, _, _ = words(own_seed, torch.arange(particles, device=ids.device), 1, 0, SEEDS)
    seeds = torch.cat([own_seed.expand(1), (high << 32 | low).flatten()[1:]]).repeat(len(ids))
    each = ids.repeat_interleave(particles)
    drawn = normal(seeds, each, noise.shape[1:], 0, START, noise.dtype).reshape(
        len(ids), particles, *noise.shape[1:]
    )
    drawn[:, 0] = noise
    return loop.init(plan.table, drawn.flatten(0, 1), each, seed=seeds), seeds  # type: ignore[arg-type]


def _answer(cloud: smc.Particles, walk: Walk, history: smc.Info, seed: Seed) -> tuple[torch.Tensor, Info]:
    x, (groups, particles) = cloud.state.sampler.x, cloud.log_weights.shape
    index, total = smc.pick(cloud, seed), walk.densities.total
    # the opening's own normaliser: Gaussians of standard deviation rho, beside which the data's is nothing
    variance = 2 * math.log(float(walk.rho[walk.first]))
    opening = 0.5 * x[0].numel() * ((1 - total) * (math.log(2 * math.pi) + variance) - math.log(total))
    info = Info(
        x.reshape(groups, particles, *x.shape[1:]),
        cloud.log_weights.softmax(-1),
        index % particles,
        cloud.ancestors,
        cloud.distinct,
        history.ess,
        history.resampled,
        cloud.log_z + opening,
        walk.calls * particles,
        walk.passes * particles,
    )
    return x[index], info


def _inside(interval: tuple[float, float] | None, level: float) -> bool:
    return interval is None or interval[0] < level <= interval[1]


def _check(drift, divergence, quadrature, particles, batch, interval, clip, check) -> int | None:
    """The number of probes, None for all axes; else ``ValueError``."""
    for name, value, known in (
        ("drift", drift, ("target", "tempered", "transport")),
        ("quadrature", quadrature, ("trapezoid", "left")),
        ("check", check, ("end", "off")),
    ):
        if value not in known:
            said = ", ".join(map(repr, known[:-1]))
            raise ValueError(f"{name} must be {said} or {known[-1]!r}, got {value!r}")
    for name, value in (("particles", particles), ("batch", 1 if batch is None else batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise ValueError(f"interval must be (lo, hi) with 0 <= lo < hi, as sigma/alpha, got {interval!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip!r}")
    if divergence in ("exact", "hutchinson"):
        return None if divergence == "exact" else 1
    if isinstance(divergence, bool) or not isinstance(divergence, int) or divergence < 1:
        raise ValueError(
            f"divergence must be 'exact', 'hutchinson' or a number of probes, got {divergence!r}"
        )
    return divergence
