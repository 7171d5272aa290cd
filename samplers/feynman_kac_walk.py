"""The moves of Feynman-Kac correctors (2503.02819): a table's rows on a drift, and what each step adds to a log-weight.

Between grid points the rate of ``log_rate`` is integrated over lam = log(alpha / sigma) by a rule of its own, from the
calls that open the steps: "left" (the paper's) is first order; "adams" takes the rate before this one into account,

    d log w = h_k R_k                  d log w = h_k (R_k + (h_k / 2 h_k-1) (R_k - R_k-1))

and is second order, as are the particles where the table is. A reward moves with them: see ``Walk``.

>>> from fewstep.models import GaussianMixture, paths
>>> one, two = (GaussianMixture([1.0], [[m]], 1.0).denoiser(paths.edm(), "eps") for m in (0.0, 2.0))
>>> y = torch.ones(1, 1, dtype=torch.float64)                                 # eps: (1 - 0) / 2 and (1 - 2) / 2
>>> outputs = [d.raw(y, 1.0)[0] for d in (one, two)]
>>> log_rate(y, outputs, (one, two), (-1.0, 2.0), 1.0), log_rate(y, outputs, (one, two), (1.0, 1.0), 1.0)
(tensor([2.], dtype=torch.float64), tensor([-0.5000], dtype=torch.float64))
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from . import loop
from .blend import Blend, is_zero
from .divergence import with_divergence
from .noise import STEP, normal, uniform
from .openings import openings
from .plan import Plan
from .powers import Powers, exponents_of
from .targets import Tilt

PROBES = 6  # the stream of Hutchinson's signs
Drift = Literal["target", "transport"]
Quadrature = Literal["adams", "left"]


class Cloud(NamedTuple):
    """What moves with a particle: the sampler's state, the last rate of its log-weight, the reward and its slope."""

    sampler: loop.State
    rate: torch.Tensor
    reward: torch.Tensor
    slope: torch.Tensor | None


def log_rate(
    y: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    leaves: Sequence[Denoiser],
    exponents: Sequence[float],
    t: float,
    divergence: torch.Tensor | None = None,
) -> torch.Tensor:
    """d log w / d lam, (B,) in float64: with the divergence (B,) of E for the transport drift, else the target's.

    All inner products of the weights stand here. Experts are subtracted before they are squared: where they all but
    agree, the difference of two squares would have no digits left.
    """
    active = [k for k, b in enumerate(exponents) if not is_zero(b)]
    total = sum(float(exponents[k]) for k in active)
    rate = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    for i, j in itertools.combinations(active, 2):
        (p, (q,)), (r, (s,)) = _eps(leaves[i], t), _eps(leaves[j], t)
        if (p, q) == (r, s):
            gap, factor = outputs[i].to(y.dtype) - outputs[j].to(y.dtype), q * q
        else:
            gap, factor = q * outputs[i].to(y.dtype) - s * outputs[j].to(y.dtype) + (p - r) * y, 1.0
        rate = rate - (float(exponents[i]) * float(exponents[j]) / total * factor) * _dot(gap, gap)
    if _is_one(total):
        return rate
    if divergence is not None:
        return rate + ((1 - 1 / total) * leaves[0].path.sigma(t)) * divergence
    blend = _summed(y, outputs, leaves, exponents, t)
    return rate + (1 - 1 / total) * _dot(blend, blend)


def _eps(leaf: Denoiser, t: float) -> tuple[float, tuple[float]]:
    """(P, (Q,)) with  eps = P y + Q F."""
    return leaf.affine(t, "eps")  # type: ignore[return-value]


def _summed(
    y: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    leaves: Sequence[Denoiser],
    powers: Sequence[float],
    t: float,
) -> torch.Tensor:
    """sum_i b_i e_i."""
    found = [
        (b, *_eps(leaf, t), out)
        for b, leaf, out in zip(powers, leaves, outputs, strict=True)
        if not is_zero(b)
    ]
    total = sum(b * p for b, p, _, _ in found) * y
    for b, _, (q,), output in found:
        total = total + (b * q) * output.to(y.dtype)
    return total


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B,) in float64."""
    return (a * b).flatten(1).sum(1).double()


def _is_one(total: float) -> bool:
    return abs(total - 1) < 1e-12


class Walk:
    """The particles' moves. With a reward, whose part of the target is exp(beta_t r(x / alpha)),

        none    d log w = beta' r(y') - beta r(y)
        half    y' += c^2/2 beta grad r,    d log w = (beta' - beta) r(y) + beta grad r . (rho' - rho) E_k
        full    y' += c^2 beta' grad r,     d log w = beta' r(y') - beta r(y) - z.s/c - |s|^2 / 2 c^2     (s: the shift)

    in y = x / alpha with c the row's noise there and E_k the eps of the drift; "half" is proposition 3.4 of the paper,
    "full" the ratio of the two Gaussian steps, exact for any step size.
    """

    def __init__(
        self,
        densities: Powers,
        plan: Plan,
        drift: Drift,
        probes: int | None,
        tilt: Tilt | None,
        clip: float | None,
        quadrature: Quadrature,
        particles: int,
    ):
        path, table = densities.path, plan.table
        self.densities, self.plan, self.drift, self.tilt = densities, plan, drift, tilt
        self.probes, self.clip, self.quadrature, self.particles = probes, clip, quadrature, particles
        self.model, self.leaves = drift_denoiser(densities, drift), densities.parts()
        self.diverges = drift == "transport" and not _is_one(densities.total)
        opening = openings(table)
        self.steps = {row: k for k, row in enumerate(opening)}  # of the calls that open steps
        self.closing = {*opening[1:], table.calls}  # a step ends before each of these
        self.inside = (
            np.searchsorted(opening, np.arange(table.calls), side="right") - 1
        )  # which step a call is in
        with np.errstate(divide="ignore", invalid="ignore"):
            self.alpha, self.rho, lam = path.alpha(table.times), path.rho(table.times), path.lam(table.times)
            # lam is infinite at the clean end, but the score all but constant: |eps|^2 ~ rho^2, whose integral is half
            gaps = np.where(self.rho[1:] == 0, 0.5, np.diff(lam))
        self.gaps = np.where(np.isfinite(gaps), gaps, 0.0)  # from alpha = 0, where all experts agree
        self.first = int(self.alpha[0] == 0)  # the grid point whose density is the opening's
        self.beta = np.zeros(len(table.times)) if tilt is None else tilt.beta(path, table.times)
        self.reward = None if tilt is None else tilt.score(densities.codec)
        self.guided = tilt is not None and tilt.gradient != "none"
        if self.guided and not (table.stochastic and plan.joined[1:].all()):
            raise ValueError(
                f"table must draw noise and have steps of one call for a reward's gradient, and {table.solver} does "
                "not: take ddim(path, times, eta=1.0), or gradient='none'"
            )
        self.calls = self.passes = 0

    def start(self, state: loop.State) -> tuple[Cloud, torch.Tensor]:
        """The opening cloud and its log-weights."""
        zeros = torch.zeros(len(state.x), dtype=torch.float64, device=state.x.device)
        cloud = self._judged(Cloud(state, zeros, zeros, None), 0)
        return cloud, float(self.beta[0]) * cloud.reward

    def __call__(
        self, cloud: Cloud, row: int, cond: Mapping[str, Any], seeds: torch.Tensor
    ) -> tuple[Cloud, torch.Tensor, loop.Info]:
        """One network call and what follows it: the cloud, the log-weight that it gained, the call."""
        state, rule, step = cloud.sampler, self.plan.row(row), self.steps.get(row)
        exponents = exponents_of(self.densities, rule.t)
        weighed = step is not None and self.gaps[step] > 0
        probes = self._signs(state, seeds) if weighed and self.diverges and self.probes else None
        if weighed and self.diverges:
            outputs, divergence = with_divergence(self.model, state.y, rule.t, cond, "eps", probes)
            divergence = divergence * self.densities.total  # the drift's denoiser has E / B
            self.passes += probes is None and state.y[0].numel() or self.probes or 0
        else:
            outputs, divergence = self.model.raw(state.y, rule.t, **cond), None
        self.calls += sum(not is_zero(b) for b in exponents)
        gain = torch.zeros_like(cloud.rate)
        if weighed:
            rate = log_rate(state.y, outputs, self.leaves, exponents, rule.t, divergence)
            gain, cloud = self._integrated(rate, cloud.rate, step), cloud._replace(rate=rate)  # type: ignore[arg-type]
        z = None
        if rule.draws and self.guided:  # whose weights need it; else it is drawn where it is added
            z = normal(seeds, state.ids, state.x.shape[1:], row + 1, STEP, state.x.dtype)
        moved = cloud._replace(sampler=loop.apply(rule, state, outputs, z, seeds))
        if self.tilt is not None:
            moved, more = self._tilted(cloud, moved, row, outputs, exponents, z)
            gain = gain + more
        return moved, gain, loop.Info(row, rule.t, state.y, outputs, self.model)

    def _signs(self, state: loop.State, seeds: torch.Tensor) -> list[torch.Tensor]:
        """Hutchinson's probes."""
        size = state.y[0].numel()
        drawn = uniform(seeds, state.ids, size * self.probes, state.row, PROBES)  # type: ignore[operator, arg-type]
        signs = 2 * (drawn < 0.5).to(state.y.dtype) - 1
        return [part.reshape(state.y.shape) for part in signs.split(size, 1)]

    def _integrated(self, rate: torch.Tensor, before: torch.Tensor, step: int) -> torch.Tensor:
        """The log-weight of a step, less its group's mean where it is clipped."""
        gap, last = float(self.gaps[step]), self.rho[step + 1] == 0
        gain = gap * rate
        if self.quadrature == "adams" and step > self.first and not last:
            gain = gain + (0.5 * gap * gap / float(self.gaps[step - 1])) * (rate - before)
        if self.clip is None:
            return gain
        groups = gain.reshape(-1, self.particles)
        return (groups - groups.mean(-1, keepdim=True)).clamp(-self.clip, self.clip).flatten()

    def _judged(self, cloud: Cloud, point: int) -> Cloud:
        """The reward at x / alpha and its slope, at a grid point; nothing where it is still off."""
        x = cloud.sampler.x
        if not self.beta[point : point + 2].any() or self.alpha[point] == 0:
            return cloud._replace(slope=torch.zeros_like(x) if self.guided else None)
        y = x / float(self.alpha[point])
        if not self.guided or point == len(self.beta) - 1:
            return cloud._replace(reward=self.reward(y).double())  # type: ignore[misc]
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            value = self.reward(y)  # type: ignore[misc]
            if not value.requires_grad:
                raise ValueError(
                    "reward must be differentiable for gradient='half' or 'full': no gradient flows here"
                )
            (slope,) = torch.autograd.grad(value.sum(), y)
        if not bool(torch.isfinite(slope).all()):
            raise ValueError(
                f"reward must have a finite gradient, got another at noise level {self.rho[point]:g}"
            )
        return cloud._replace(reward=value.detach().double(), slope=slope)

    def _tilted(
        self, before: Cloud, after: Cloud, row: int, outputs, exponents, z
    ) -> tuple[Cloud, torch.Tensor]:
        """The cloud moved along the reward's slope, and the log-weight of reward and move."""
        step, gain = int(self.inside[row]), torch.zeros_like(before.rate)
        now, then = float(self.beta[step]), float(self.beta[step + 1])
        half = self.tilt.gradient == "half"  # type: ignore[union-attr]
        if self.guided:
            c, alpha = float(self.plan.table.c[row + 1, 0, 0]), float(self.alpha[step + 1])
            shift = (c * c / alpha * (0.5 * now if half else then)) * before.slope
            x = after.sampler.x + shift
            after = after._replace(sampler=after.sampler._replace(x=x, y=x))
            if not half and c:
                gain = gain - (_dot(z, shift) / c + _dot(shift, shift) / (2 * c * c))
        if half:
            way = now * float(self.rho[step + 1] - self.rho[step]) if now else 0.0
            powers = [
                float(b) / (self.densities.total if self.drift == "transport" else 1.0) for b in exponents
            ]
            blend = _summed(before.sampler.y, outputs, self.leaves, powers, self.plan.row(row).t)
            gain = gain + way * _dot(blend, before.slope) + (then - now) * before.reward
        if row + 1 in self.closing:
            after = self._judged(after, step + 1)
            if not half:
                gain = gain + then * after.reward - now * before.reward
        return after, gain


def drift_denoiser(densities: Powers, drift: Drift) -> Denoiser:
    """What the table runs on: eps = E for the target drift, E / B for the transport; a model alone is itself."""
    if len(densities.children) == 1 and (drift == "transport" or densities.powers == (1.0,)):
        return densities.children[0]
    if drift == "transport" or _is_one(densities.total):
        return Blend(densities.children, [b / densities.total for b in densities.powers])
    return densities
