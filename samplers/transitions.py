"""The Gaussian steps of a stochastic table: what policy gradients and divergences between paths are made of.

A table without history whose two registers are one is a Markov chain. What follows call r is

    x' ~ N(keep x + gain D(x, t), std^2)

with D the estimate of x0, so the same point's step under another network is another D, and nothing else.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids
    >>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
    >>> steps = transitions(ddim(d.path, grids.karras(d.path, 4), eta=1.0).on(d))
    >>> [round(s.std, 2) for s in steps]                     # the last goes to x0: it draws nothing
    [9.65, 0.47, 0.0, 0.0]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .plan import HISTORY, Plan, X, Y, Z


class Transition(NamedTuple):
    """What follows call ``row``, at time ``t``."""

    row: int
    t: float
    keep: float
    gain: float
    std: float

    def mean(self, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """keep x + gain x0."""
        return self.keep * x + self.gain * x0

    def log_prob(self, after: torch.Tensor, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """log N(after; mean, std^2), summed over a sample's elements: (B,)."""
        if self.std == 0:
            raise ValueError(f"step {self.row} of the table draws no noise: what follows it has no density")
        z = (after - self.mean(x, x0)) / self.std
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -(0.5 * z.square() + constant).flatten(1).sum(1)

    def divergence(self, x0: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """KL between the steps that two estimates give at one point, (B,): gain^2 |x0 - other|^2 / (2 std^2)."""
        if self.std == 0:
            raise ValueError(f"step {self.row} of the table draws no noise: its divergence is not finite")
        return 0.5 * (self.gain / self.std) ** 2 * (x0 - other).square().flatten(1).sum(1)


def transitions(plan: Plan, lane: int = 0) -> list[Transition]:
    """Of every call; ValueError unless the table is a Markov chain that draws noise."""
    table = plan.table
    if plan.kept.any() or not plan.joined.all():
        raise ValueError(
            f"table must have no history, so that its steps are a Markov chain, and {table.solver} has one: take ddim "
            "with eta=1, ddpm, or another solver of one call a step and order 1"
        )
    if not plan.draws:
        raise ValueError(
            f"table must draw noise in its steps, and {table.solver}{table.options or ''} draws none: take ddim with "
            "eta=1, ddpm, or flow_sde"
        )
    found = []
    for row, weights in enumerate(plan.weights(from_x0=True).x[:, lane]):
        keep, gain = weights[X] + weights[Y], weights[HISTORY + table.slots]
        found.append(
            Transition(row, float(table.t[row, lane]), float(keep), float(gain), abs(float(weights[Z])))
        )
    return found
