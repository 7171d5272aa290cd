"""Resampling: which particles live on, given their log-weights; groups of particles among themselves.

With normalised weights w_k every scheme answers K indices in which k is expected K w_k times. They differ in variance,
and in who moves:

    systematic      one uniform u, points (u + j) / K on the cumulative weights: k stands floor or ceil(K w_k) times
    stratified      the same with a uniform a point
    multinomial     K independent draws
    residual        floor(K w_k) copies, the rest drawn
    birth_death     k dies with probability max(0, 1 - K w_k), and one drawn from max(0, K w_j - 1) takes its place

The last is the jump process of 2503.02819 (proposition 4.1) over one step: their rates are its probabilities to first
order in the log-weights; as written here the expectation is exact, however uneven the weights. Survivors stay in place.

Log-weights are (groups, K), any float type; uniforms come from outside, so a scheme is a function without a state, of
fixed shapes, that nobody waits for on a GPU. ``resample`` draws them, counted by (seed, group id, row).

>>> L = torch.tensor([[0.1, 0.2, 0.7, 0.0]]).log()
>>> systematic(L, torch.tensor([[0.5]])), ess(L).round(decimals=2)
(tensor([[1, 2, 2, 2]]), tensor([1.8500], dtype=torch.float64))
>>> resample(L, torch.tensor([7]), row=3, seed=0, scheme="birth_death").shape
torch.Size([1, 4])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .noise import Seed, uniform

STREAM = 4  # of resampling, beside the noise of steps, openings, users and the read-outs of trees


class Scheme(NamedTuple):
    """A function (log_weights, u) -> index and how many uniforms it wants for K particles."""

    index: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    uniforms: Callable[[int], int]


def ess(log_weights: torch.Tensor) -> torch.Tensor:
    """The effective sample size of each group, (sum w)^2 / sum w^2, from 1 to K; NaN where no weight is left."""
    log_weights = log_weights.double()
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def log_mean_exp(log_weights: torch.Tensor) -> torch.Tensor:
    """log of the mean weight of each group, in float64."""
    return log_weights.double().logsumexp(-1) - math.log(log_weights.shape[-1])


def systematic(log_weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One uniform a group, u (groups, 1)."""
    return stratified(log_weights, u)


def stratified(log_weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """A uniform a particle, u (groups, K), each in its K-th of the unit interval."""
    count = log_weights.shape[-1]
    strata = torch.arange(count, device=u.device)
    return _inverse((u + strata) / count, log_weights.double().softmax(-1))


def multinomial(log_weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """K independent draws, u (groups, K)."""
    return _inverse(u, log_weights.double().softmax(-1))


def residual(log_weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """floor(K w_k) copies of each, then draws from what is left of the weights; u (groups, K)."""
    count = log_weights.shape[-1]
    expected = count * log_weights.double().softmax(-1)
    copies = (expected + 1e-12 * count).floor()  # K (1 / K) may have been rounded below 1
    upto = copies.cumsum(-1)
    place = torch.arange(count, device=u.device, dtype=upto.dtype).expand_as(upto).contiguous()
    kept = torch.searchsorted(upto, place, right=True).clamp_max(count - 1)
    drawn = _inverse(u, (expected - copies).clamp_min(0))
    return torch.where(place < upto[..., -1:], kept, drawn)


def birth_death(log_weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Deaths and their replacements, u (groups, 2 K); who lives on stays where it is."""
    count = log_weights.shape[-1]
    expected = count * log_weights.double().softmax(-1)
    dies, place = u.split(count, -1)
    heirs = _inverse(place, (expected - 1).clamp_min(0))
    # no less than 1 but for rounding: nobody is drawn from nothing
    lives = (dies < expected) | (expected >= 1 - 1e-12 * count)
    return torch.where(lives, torch.arange(count, device=u.device), heirs)


SCHEMES = {
    "systematic": Scheme(systematic, lambda count: 1),
    "stratified": Scheme(stratified, lambda count: count),
    "multinomial": Scheme(multinomial, lambda count: count),
    "residual": Scheme(residual, lambda count: count),
    "birth_death": Scheme(birth_death, lambda count: 2 * count),
}


def resample(
    log_weights: torch.Tensor,
    ids: torch.Tensor,
    row: int = 0,
    seed: Seed = 0,
    scheme: str = "systematic",
    u: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices (groups, K) into each group's K particles, for log-weights (groups, K) of groups ``ids`` (groups,).

    ``u``: this row's of ``uniforms``, for whoever has drawn them all at once.
    """
    check_scheme(scheme)
    if log_weights.ndim != 2:
        raise ValueError(f"log_weights must have shape (groups, particles), got {tuple(log_weights.shape)}")
    if u is None:
        u = uniforms(ids, log_weights.shape[-1], range(row, row + 1), seed, scheme)[0]
    return SCHEMES[scheme].index(log_weights, u)


def uniforms(
    ids: torch.Tensor, count: int, rows: range, seed: Seed = 0, scheme: str = "systematic"
) -> torch.Tensor:
    """What ``resample`` draws at each of many rows for groups of ``count`` particles: (rows, groups, a scheme's)."""
    wanted = SCHEMES[check_scheme(scheme)].uniforms(count)
    # made on the device: a copy from here would be waited for
    row = torch.arange(rows.start, rows.stop, device=ids.device).repeat_interleave(len(ids))
    return uniform(seed, ids.repeat(len(rows)), wanted, row, STREAM).reshape(len(rows), len(ids), wanted)


def check_scheme(scheme: str) -> str:
    """A name in ``SCHEMES``; else ``ValueError``."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    return scheme


def _inverse(points: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative share lies above each point in (0, 1); one without weight is never met."""
    upto = weights.cumsum(-1)
    index = torch.searchsorted(
        upto / upto[..., -1:], points.expand(*weights.shape[:-1], -1).contiguous(), right=True
    )
    return index.clamp_max(weights.shape[-1] - 1)
