"""The moves of Feynman-Kac correctors (2503.02819): a table's rows on a drift, and what each step adds to a log-weight.

Between grid points the rate R of ``feynman_kac_rates`` is integrated over lam = log(alpha / sigma) from the calls that
open the steps. "left" is the paper's rule, of first order. "trapezoid" is of second order, as the particles are where
the table is: the call at the end of a step is the next step's own, and what it changes is added then,

    log w += h_k R_k                   log w += h_k R_k + (h_k-1 / 2) (R_k - R_k-1)

A divergence from random probes makes a rate noisy, and the mean of exp(noise) is above 1: by half the variance of
what a call adds in all, (h_k-1 + h_k)^2 / 4 times the rate's, a bias of first order however the rate is integrated.
Two probes or more tell that variance, and "trapezoid" takes it off. A reward moves with the particles: see ``Walk``.

>>> from fewstep.models import GaussianMixture, paths
>>> from fewstep.samplers import targets
>>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm(), "eps")
>>> squared = targets.anneal(2.0).bind((d,))
>>> [drift_denoiser(squared, drift).eps(torch.ones(1, 1), 1.0).item() for drift in ("target", "tempered", "transport")]
[1.0, 0.75, 0.5]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from . import fused, loop
from .blend import Blend, is_zero
from .chain import per_sample
from .divergence import Diverged, with_divergence
from .feynman_kac_rates import (
    Pair,
    combined,
    divergence_factor,
    dot,
    in_two,
    is_one,
    log_rate,
    squares,
    summed,
)
from .noise import STEP, normal, uniform
from .openings import openings
from .plan import HISTORY, Plan, Row, X, Y
from .powers import Powers, exponents_of
from .table import Table
from .targets import Tilt

PROBES = 6  # the stream of Hutchinson's signs
Drift = Literal["target", "tempered", "transport"]
Quadrature = Literal["trapezoid", "left"]


class Cloud(NamedTuple):
    """What moves with a particle: the sampler's state, the last rate of its log-weight, the reward and its slope."""

    sampler: loop.State
    rate: torch.Tensor
    reward: torch.Tensor
    slope: torch.Tensor | None


class Walk:
    """The particles' moves. With a reward, whose part of the target is exp(beta_t r(x / alpha)),

        none    d log w = beta' r(y') - beta r(y)
        half    y' += c^2/2 beta' grad r,   d log w = beta' r(y') - beta r(y) - z.s/c - |s|^2 / 2 c^2     (s: the shift)
        full    y' += c^2 beta' grad r,     the same

    in y = x / alpha with c the row's noise there: weighed by the ratio of the two Gaussian steps, exact for the table's
    own chain whatever the step. By the "left" rule "half" is proposition 3.4 of the paper, of first order,

        half    y' += c^2/2 beta grad r,    d log w = (beta' - beta) r(y) + beta grad r . (rho' - rho) E_k

    with E_k the eps of the drift. ``batch``: how many particles the network, and the reward, see at once.
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
        batch: int | None = None,
    ):
        path, table = densities.path, plan.table
        self.densities, self.plan, self.drift, self.tilt = densities, plan, drift, tilt
        self.probes, self.clip, self.quadrature, self.particles = probes, clip, quadrature, particles
        self.batch = batch
        self.model, self.leaves = drift_denoiser(densities, drift), densities.parts()
        self.diverges = drift == "transport" and not is_one(densities.total)
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
        self.half_left = self.guided and quadrature == "left" and tilt.gradient == "half"  # type: ignore[union-attr]
        if self.guided and not (table.stochastic and plan.joined[1:].all()):
            raise ValueError(
                f"table must draw noise and have steps of one call for a reward's gradient, and {table.solver} does "
                "not: take ddim(path, times, eta=1.0), or gradient='none'"
            )
        self.calls = self.passes = 0
        self._pairs: tuple[dict[int, Pair], fused.Rows] | None = None

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
        found = self._called(state.y, rule.t, cond, probes, weighed and self.diverges)
        self.calls += sum(not is_zero(b) for b in exponents)
        z = None
        if rule.draws and self.guided:  # whose weights need it; else it is drawn where it is added
            z = normal(seeds, state.ids, state.x.shape[1:], row + 1, STEP, state.x.dtype)
        after, rate = self._moved(rule, state, found, exponents, z, seeds, weighed)
        gain, moved = torch.zeros_like(cloud.rate), cloud._replace(sampler=after)
        if rate is not None:
            gain = self._integrated(rate, cloud.rate, found.variance, rule.t, exponents, step)  # type: ignore[arg-type]
            moved = moved._replace(rate=rate)
        if self.tilt is not None:
            moved, more = self._tilted(cloud, moved, row, found.outputs, exponents, z)
            gain = gain + more
        return moved, gain, loop.Info(row, rule.t, state.y, found.outputs, self.model)

    def _called(
        self,
        y: torch.Tensor,
        t: float,
        cond: Mapping[str, Any],
        probes: list[torch.Tensor] | None,
        diverges: bool,
    ) -> Diverged:
        """The network's outputs at all particles, a batch of them at a time, and the divergence of the drift's eps."""
        if diverges:
            self.passes += y[0].numel() if probes is None else len(probes)
        parts = []
        for at in _pieces(len(y), self.batch, y.device):
            here, given = (y, cond) if at is None else (y[at], per_sample(cond, at, len(y)))
            if diverges:
                signs = None if probes is None else [p if at is None else p[at] for p in probes]
                parts.append(with_divergence(self.model, here, t, given, "eps", signs))
            else:
                outputs = tuple(self.model.raw(here, t, **given))
                parts.append(Diverged(outputs, outputs[0].new_zeros(()), None))
        if len(parts) == 1:
            return parts[0]
        outputs = tuple(torch.cat(same) for same in zip(*(part.outputs for part in parts), strict=True))
        if not diverges:
            return parts[0]._replace(outputs=outputs)
        told = None if parts[0].variance is None else torch.cat([part.variance for part in parts])  # type: ignore[misc]
        return Diverged(outputs, torch.cat([part.divergence for part in parts]), told)

    def _signs(self, state: loop.State, seeds: torch.Tensor) -> list[torch.Tensor]:
        """Hutchinson's probes."""
        size = state.y[0].numel()
        drawn = uniform(seeds, state.ids, size * self.probes, state.row, PROBES)  # type: ignore[operator, arg-type]
        signs = 2 * (drawn < 0.5).to(state.y.dtype) - 1
        return [part.reshape(state.y.shape) for part in signs.split(size, 1)]

    def _moved(
        self, rule: Row, state: loop.State, found: Diverged, exponents, z, seeds: torch.Tensor, weighed: bool
    ) -> tuple[loop.State, torch.Tensor | None]:
        """The sampler's step, and the rate of the log-weights at its beginning where that is ``weighed``: by one pass
        over all tensors on a GPU, as far as two vectors hold the rate."""
        divergence = found.divergence * self.densities.total if weighed and self.diverges else None
        if weighed and fused.takes(state, found.outputs, z):
            pairs, rows = self._paired(state.x.device)
            if pair := pairs.get(rule.index):
                after, products = fused.stepped(
                    self.plan, rows, state, rule.index, rule.lane, found.outputs, z, seeds
                )
                uu, uv, vv = products.double().unbind(1)  # type: ignore[union-attr]
                rate = pair.uu * uu + pair.uv * uv + pair.vv * vv
                if divergence is not None:
                    rate = rate + divergence_factor(self.leaves, exponents, rule.t) * divergence
                return after, rate
        rate = None
        if weighed:
            rate = log_rate(state.y, found.outputs, self.leaves, exponents, rule.t, divergence)
        return loop.apply(rule, state, found.outputs, z, seeds), rate

    def _paired(self, device: torch.device) -> tuple[dict[int, Pair], fused.Rows]:
        """The rows whose rates two vectors hold, and all rows as the fused step reads them with these vectors."""
        if self._pairs is None:
            table, pairs = self.plan.table, {}
            weights = np.zeros((table.calls, table.lanes, 2, HISTORY + table.slots + self.plan.outputs))
            for row in self.steps:
                t = self.plan.row(row).t
                pair = in_two(squares(self.leaves, exponents_of(self.densities, t), t, self.diverges))
                if pair is not None:
                    pairs[row] = pair
                    for k, square in enumerate(pair[:2]):
                        weights[row, :, k, X if self.plan.joined[row] else Y] = square.y
                        weights[row, :, k, HISTORY + table.slots :] = square.outputs
            self._pairs = pairs, fused.rows(self.plan, device, "outputs", weights)
        return self._pairs

    def _integrated(
        self,
        rate: torch.Tensor,
        before: torch.Tensor,
        variance: torch.Tensor | None,
        t: float,
        exponents,
        step: int,
    ) -> torch.Tensor:
        """The log-weight that this call adds, less its group's mean where it is clipped."""
        gap, earlier = float(self.gaps[step]), float(self.gaps[step - 1]) if step > self.first else 0.0
        gain = gap * rate
        if self.quadrature == "trapezoid":
            if earlier:
                gain = gain + (0.5 * earlier) * (rate - before)
            if variance is not None:
                whole = 0.5 * earlier + gap * (1.0 if self.rho[step + 1] == 0 else 0.5)
                factor = whole * divergence_factor(self.leaves, exponents, t) * self.densities.total
                gain = gain - (0.5 * factor * factor) * variance
        if self.clip is None:
            return gain
        groups = gain.reshape(-1, self.particles)
        return (groups - groups.mean(-1, keepdim=True)).clamp(-self.clip, self.clip).flatten()

    def _judged(self, cloud: Cloud, point: int) -> Cloud:
        """The reward at x / alpha and its slope, at a grid point; nothing where it is still off."""
        x = cloud.sampler.x
        if not self.beta[point : point + 2].any() or self.alpha[point] == 0:
            return cloud._replace(slope=torch.zeros_like(x) if self.guided else None)
        y, sloped = x / float(self.alpha[point]), self.guided and point < len(self.beta) - 1
        parts = [
            self._scored(y if at is None else y[at], sloped) for at in _pieces(len(y), self.batch, y.device)
        ]
        rewards, slopes = zip(*parts, strict=True)
        if not sloped:
            return cloud._replace(reward=torch.cat(rewards))
        slope = torch.cat(slopes)
        if not bool(torch.isfinite(slope).all()):
            raise ValueError(
                f"reward must have a finite gradient, got another at noise level {self.rho[point]:g}"
            )
        return cloud._replace(reward=torch.cat(rewards), slope=slope)

    def _scored(self, y: torch.Tensor, sloped: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The reward, in float64, and its gradient where that is wanted."""
        if not sloped:
            return self.reward(y).double(), None  # type: ignore[misc]
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            value = self.reward(y)  # type: ignore[misc]
            if not value.requires_grad:
                raise ValueError(
                    "reward must be differentiable for gradient='half' or 'full': no gradient flows here"
                )
            (slope,) = torch.autograd.grad(value.sum(), y)
        return value.detach().double(), slope

    def _tilted(
        self, before: Cloud, after: Cloud, row: int, outputs, exponents, z
    ) -> tuple[Cloud, torch.Tensor]:
        """The cloud moved along the reward's slope, and the log-weight of reward and move."""
        step, gain = int(self.inside[row]), torch.zeros_like(before.rate)
        now, then = float(self.beta[step]), float(self.beta[step + 1])
        if self.guided:
            share = {"half": 0.5, "full": 1.0}[self.tilt.gradient]  # type: ignore[union-attr]
            c, alpha = float(self.plan.table.c[row + 1, 0, 0]), float(self.alpha[step + 1])
            shift = (c * c / alpha * share * (now if self.half_left else then)) * before.slope
            x = after.sampler.x + shift
            after = after._replace(sampler=after.sampler._replace(x=x, y=x))
            if c and not self.half_left:
                gain = gain - (dot(z, shift) / c + dot(shift, shift) / (2 * c * c))
        if self.half_left:
            way = now * float(self.rho[step + 1] - self.rho[step]) if now else 0.0
            powers = [
                float(b) / (self.densities.total if self.drift == "transport" else 1.0) for b in exponents
            ]
            blend = combined(summed(self.leaves, powers, self.plan.row(row).t), before.sampler.y, outputs)
            gain = gain + way * dot(blend, before.slope) + (then - now) * before.reward  # type: ignore[arg-type]
        if row + 1 in self.closing:
            after = self._judged(after, step + 1)
            if not self.half_left:
                gain = gain + then * after.reward - now * before.reward
        return after, gain


def _pieces(count: int, batch: int | None, device: torch.device) -> Sequence[torch.Tensor | None]:
    """Indices of ``batch`` particles at a time; None for all of them."""
    if batch is None or batch >= count:
        return [None]
    return torch.arange(count, device=device).split(batch)


def tempered_share(total: float) -> float:
    """kappa of the tempered drift kappa E, whose noise is 1 / sqrt(B) of the reverse SDE's: (1 + 1/B) / 2."""
    return 0.5 * (1 + 1 / total)


def drift_denoiser(densities: Powers, drift: Drift) -> Denoiser:
    """What the table runs on: eps = E for the target drift, (1 + 1/B) E / 2 for the tempered, E / B for the transport;
    a model alone is itself."""
    if is_one(densities.total):
        drift = "transport"  # where B = 1 all drifts are one
    if len(densities.children) == 1 and (drift == "transport" or densities.powers == (1.0,)):
        return densities.children[0]
    if drift == "transport":
        return Blend(densities.children, [b / densities.total for b in densities.powers])
    if drift == "tempered":
        share = tempered_share(densities.total)
        return Powers(densities.children, [share * b for b in densities.powers])
    return densities


def check_tempered(table: Table, densities: Powers) -> None:
    """``ValueError`` unless the table draws the reverse SDE's noise, whose share the tempered drift is made for."""
    path = densities.path
    rho, alpha = path.rho(table.times), path.alpha(table.times)
    wanted = alpha[1:] * rho[1:] * np.sqrt(1 - (rho[1:] / rho[:-1]) ** 2)
    drawn = table.c[1:, 0, 0]
    if drawn.shape != wanted.shape or not np.allclose(drawn, wanted, rtol=1e-6, atol=1e-12):
        raise ValueError(
            f"table must draw the reverse SDE's own noise for drift='tempered', and {table.solver} does not: take "
            "ddim(path, times, eta=1.0) or sde_dpmpp(path, times)"
        )
