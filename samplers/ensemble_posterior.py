"""Posterior samples of inverse problems without approximating the likelihood of noised samples (2506.03979).

Given y = A x0 + noise_std n, the law wanted is  p(x0) N(y; A x0, noise_std^2) / Z.  p(y | x_t) is not known at noise
levels above 0, and guidance by a guess of it is off. But any guess will do as a target on the way, exp(h_t(x_t)), if
particles are weighted by what the guess leaves out and h_0 is the true likelihood. Two ways:

``"twisted"``, the default: the guess is  exp(h_t) = N(y; A x0_hat(x_t), R_t)  with R_t from a Gaussian of the data
(``likelihood_guess``); each step N(m, c^2) of the sampler is drawn towards it, and the log-weight is

    h_next - h + log N(x'; m, c^2) - log (the density that x' was drawn from)

No gradients, no stiffness, and no error of discretisation: for any table the weighted particles follow the sampler's
own law times the likelihood, exactly as their number grows.

``"paper"``: h = beta_t log N(y; A x, noise_std^2), the fixed likelihood, its strength beta rising with the log of
the noise level; particles follow the SDE with drift  (s + grad h) g^2  and  d log w = [d_t h + g^2 <grad h, s>
+ (g^2/2) (|grad h|^2 + lap h)] dt,  in Euler-Maruyama steps at the table's times. A may be any differentiable function.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids, starting_noise
    >>> from fewstep.samplers.operators import dense
    >>> prior = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], 0.1)
    >>> d, noise = prior.denoiser(paths.edm()), starting_noise(0, 1, (2,), torch.float64)
    >>> table = ddim(d.path, grids.karras(d.path, 40, t_max=20.0), eta=1.0)
    >>> x, info = ensemble_posterior(d, noise, table, operator=dense(torch.tensor([[1.0, 1.0]]), (2,)),
    ...     observation=torch.tensor([[0.8]]), noise_std=0.3, particles=200)
    >>> x.shape, bool((info.mean[0, 0] - 0.9).abs() < 0.1)                   # at the right mode
    (torch.Size([1, 2]), True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.gaussian_stats import GaussianStats
from ..models.paths import coefficient
from . import smc
from .chain import Ids, per_sample
from .guidance import check_denoiser, number
from .likelihood_guess import Full, Isotropic
from .loop import Info, apply, init
from .noise import STEP, check_ids, normal, starting_noise
from .operators import Operator
from .table import Table

RAMP = 3.0  # noise levels above so many of the data's standard deviations: the fixed likelihood is off there


class Posterior(NamedTuple):
    """``particles`` (groups, K, ...), their ``weights`` (groups, K); ``mean`` and ``std`` (groups, ...) under them;
    ``index`` (groups,): which was drawn; ``ess`` and ``resampled`` (rows, groups); ``distinct`` (groups,): opening
    particles with descendants; ``log_evidence`` (groups,): log p(y); ``calls``: network calls a group."""

    particles: torch.Tensor
    weights: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    index: torch.Tensor
    ess: torch.Tensor
    resampled: torch.Tensor
    distinct: torch.Tensor
    log_evidence: torch.Tensor
    calls: int


def ensemble_posterior(
    d: Denoiser,
    noise: torch.Tensor,
    table: Table,
    *,
    operator: Operator | Callable[[torch.Tensor], torch.Tensor],
    observation: torch.Tensor,
    noise_std: float,
    particles: int = 64,
    weighting: Literal["twisted", "paper"] = "twisted",
    data: GaussianStats | float = 1.0,
    when: smc.When = 0.5,
    scheme: str = "systematic",
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Posterior]:
    """One draw from the posterior for each row of ``noise`` and of ``observation``, out of ``particles`` each.

    Args:
        table: ``"twisted"``: of a stochastic solver of one call a step; ``"paper"`` uses its times alone.
        operator: of ``operators`` (``dense`` makes one of your linear function); for ``"paper"`` any function.
        observation: (groups, *observed), or one row for all.
        noise_std: of the observation.
        data: their standard deviation, roughly, or for samples of up to a few thousand numbers their Gaussian,
            ``models.gaussian(images)``. A guess that is off costs particles, not correctness.
        when, scheme: when and how a group resamples, see ``smc.step``.
    """
    check_denoiser("d", d)
    if weighting not in ("twisted", "paper"):
        raise ValueError(f"weighting must be 'twisted' or 'paper', got {weighting!r}")
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 1:
        raise ValueError(f"particles must be a positive integer, got {particles!r}")
    if not number("noise_std", noise_std) > 0:
        raise ValueError(f"noise_std must be positive, got {noise_std}")
    if not isinstance(data, GaussianStats) and not number("data", data) > 0:
        raise ValueError(f"data must be a positive standard deviation or GaussianStats, got {data!r}")
    if not isinstance(noise, torch.Tensor) or noise.ndim < 2 or not noise.is_floating_point():
        raise ValueError("noise must be standard normals, a floating-point tensor (groups, ...)")
    if not isinstance(table, Table) or table.lanes != 1:
        raise TypeError(f"table must be a Table of one lane, got {type(table).__name__}")
    noise = noise if noise.dtype == torch.float64 else noise.float()
    groups = len(noise)
    y = torch.as_tensor(observation).to(noise)
    if isinstance(operator, Operator):
        if (
            operator.shape != tuple(noise.shape[1:])
            or tuple(y.shape[1:]) != operator.observed
            or len(y) not in (1, groups)
        ):
            wanted = f"({groups}, {', '.join(map(str, operator.observed))}) for samples {operator.shape}"
            raise ValueError(
                f"observation must have shape {wanted}, got {tuple(y.shape)} for {tuple(noise.shape[1:])}"
            )
    elif weighting == "twisted":
        raise TypeError("operator must be one of operators for weighting='twisted'; operators.dense(f, shape) makes "
                        "one of a linear function, and weighting='paper' takes any")  # fmt: skip
    if not bool(torch.isfinite(y).all()):
        raise ValueError("observation must be finite")
    y = y.expand(groups, *y.shape[1:]).repeat_interleave(particles, 0)
    ids = torch.arange(groups) if ids is None else check_ids(ids, groups).cpu()
    top = int(ids.max()) + 1
    tags = torch.cat([Ids(int(i), top + g, groups).some(particles) for g, i in enumerate(ids)]).to(
        noise.device
    )
    opening = starting_noise(seed, tags, noise.shape[1:], noise.dtype)
    opening[::particles] = noise
    index = torch.arange(groups).repeat_interleave(particles)
    cond = per_sample(cond or {}, index, groups) if groups > 1 else per_sample(cond or {}, 0 * index, 1)
    swarm = smc.init((opening,), particles, ids.to(noise.device))
    run = _twisted if weighting == "twisted" else _paper
    with torch.no_grad():
        swarm, history = run(
            d,
            table,
            swarm,
            operator,
            y,
            noise_std,
            data,
            dict(when=when, scheme=scheme, seed=seed),
            cond,
            seed,
            tags,
        )
    smc.check_alive(history)
    x = swarm.state[0]
    chosen = smc.pick(swarm, seed)
    every = x.reshape(groups, particles, *x.shape[1:])
    weights = swarm.log_weights.softmax(-1)
    wide = coefficient(weights.to(x.dtype), every)
    centre = (wide * every).sum(1)
    spread = (wide * (every - centre[:, None]) ** 2).sum(1).sqrt()
    calls = particles * (table.calls if weighting == "twisted" else len(table.times) - 1)
    return x[chosen], Posterior(
        every, weights, centre, spread, chosen % particles, history.ess, history.resampled, swarm.distinct,
        swarm.log_z, calls,
    )  # fmt: skip


def _twisted(d, table: Table, swarm, operator, y, noise_std, data, options, cond, seed, tags):
    plan = table.on(d, y.device)
    if not plan.joined.all():
        raise ValueError(
            f"table must have one call a step, y = x throughout, for this weighting; {table.solver} has not"
        )
    if isinstance(data, GaussianStats):
        guess: Full | Isotropic = Full(operator, y, noise_std, data.covariance())
    else:
        guess = Isotropic(operator, y, noise_std, data)
    path, seen = d.path, []
    state = init(table, swarm.state[0], tags, seed=seed)
    nothing = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    swarm = swarm._replace(state=(state, nothing, nothing))
    for call in range(table.calls + 1):
        state, paid, ratio = swarm.state
        last = call == table.calls
        if last:
            raw, x0, t = (), state.x, float(table.times[-1])
        else:
            row = plan.row(call)
            raw = d.raw(state.y, row.t, **cond) if plan.affine else (d(state.y, row.t, **cond),)
            x0, t = Info(call, row.t, state.y, tuple(raw), d).x0, row.t
        # what the estimate says now, and what was said before; a step's own density over that of its proposal
        now = guess.log(guess.gap(x0), path, t)
        swarm = swarm._replace(state=(state, now, nothing, x0, tuple(raw)))
        swarm, info = smc.step(
            swarm, now - paid + ratio, **{**options, "when": 0.0 if last else options["when"]}
        )
        seen.append(info)
        state, paid, ratio, x0, raw = swarm.state
        if not last:
            z = torch.zeros_like(state.x) if row.draws else None
            state, c = apply(row, state, raw, z), float(table.c[call + 1, 0, 0])
            if c > 0:
                n = normal(seed, tags, state.x.shape[1:], call + 1, STEP, state.x.dtype)
                x, ratio = guess.step(state.x, guess.gap(x0), path, _time_after(table, call), c, n)
                state = state._replace(x=x, y=x)
        swarm = swarm._replace(state=(state, paid, ratio))
    return swarm._replace(state=(swarm.state[0].x,)), smc.stacked(seen)


def _time_after(table: Table, call: int) -> float:
    """The time at which the state stands after a call."""
    return float(table.t[call + 1, 0]) if call + 1 < table.calls else float(table.times[-1])


def _paper(d, table: Table, swarm, operator, y, noise_std, data, options, cond, seed, tags):
    path, times = d.path, np.asarray(table.times, dtype=np.float64)
    levels = [path.rho(float(t)) for t in times]
    if not math.isfinite(levels[0]):
        raise ValueError(
            "table must begin where alpha > 0 for weighting='paper', e.g. on a grid with t_max=0.99"
        )
    floor = min(level for level in levels if level > 0)
    top = RAMP * (
        float(data.covariance().diagonal().mean().sqrt()) if isinstance(data, GaussianStats) else data
    )

    def strength(level: float) -> float:
        return (
            float(np.clip(math.log(top / max(level, floor)) / math.log(top / floor), 0, 1))
            if floor < top
            else 1.0
        )

    def likelihood(x: torch.Tensor, seed_: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log N(y; A x), its gradient and its Laplacian (by one probe where A is no ``Operator``)."""
        constant = 0.5 * y[0].numel() * math.log(2 * math.pi * noise_std**2)
        if isinstance(operator, Operator):
            gap = y - operator(x)
            constant *= float((operator.values > 0).sum()) / y[0].numel()  # what is not seen has no density
            value = -0.5 * gap.double().square().flatten(1).sum(1) / noise_std**2 - constant
            trace = -float(operator.values.square().sum()) / noise_std**2
            return value, operator.adjoint(gap) / noise_std**2, value.new_full((len(x),), trace)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = -0.5 * (y - operator(point)).double().square().flatten(1).sum(1) / noise_std**2 - constant
            (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)
            probe = normal(seed, tags, x.shape[1:], seed_, 2, x.dtype).sign()
            (bent,) = torch.autograd.grad((slope * probe).sum(), point)
        return value.detach(), slope.detach(), (bent * probe).double().flatten(1).sum(1)

    # in x / alpha, the sigma of EDM: every path is one there
    z, seen = swarm.state[0] * levels[0], []
    swarm = swarm._replace(state=(z,))
    for call in range(len(times) - 1):
        (z,), level, after = swarm.state, levels[call], levels[call + 1]
        beta, now = strength(level), strength(after)
        alpha = path.alpha(float(times[call]))
        x0 = d(alpha * z, float(times[call]), **cond)
        value, slope, bend = likelihood(z, call)
        score, dv = (x0 - z) / level**2, level**2 - after**2
        inner = (slope * score).double().flatten(1).sum(1)
        gain = beta * dv * inner + 0.5 * dv * (
            beta**2 * slope.double().square().flatten(1).sum(1) + beta * bend
        )
        n = normal(seed, tags, z.shape[1:], call + 1, STEP, z.dtype) if after > 0 else torch.zeros_like(z)
        if after > 0:
            z = z + dv * (score + beta * slope) + math.sqrt(dv) * n
        else:
            z, gain = x0, torch.zeros_like(gain)  # the last step of a denoiser: its own estimate
        gain = gain + (now - beta) * likelihood(z, call)[0]
        last = call + 2 == len(levels)
        swarm, info = smc.step(
            swarm._replace(state=(z,)), gain, **{**options, "when": 0.0 if last else options["when"]}
        )
        seen.append(info)
    return swarm, smc.stacked(seen)
