"""A mixture of 25 equal Gaussians on a square grid in the plane: modes to find or to lose, with exact scores.

>>> from fewstep.distill.draws import Draws
>>> x = mixture_samples(Draws(0, 0, 0, 1000, 1000))
>>> bool((torch.cdist(x.double(), grid_means()).min(1).values < 6 * STD).all())
True
"""

from __future__ import annotations

import torch

from ...models.mixture import GaussianMixture
from ..draws import Draws
from .source import Source

SIDE, SPACING, STD = 5, 1.0, 0.05


def grid_means() -> torch.Tensor:
    """The 25 places of the mixture's modes, (25, 2), on a square grid about 0."""
    places = (torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2) * SPACING
    return torch.cartesian_prod(places, places)


def grid_mixture() -> GaussianMixture:
    """Equal Gaussians at ``grid_means``: exact scores on every path."""
    return GaussianMixture([1 / SIDE**2] * SIDE**2, grid_means(), STD**2)


def mixture_samples(draws: Draws) -> torch.Tensor:
    """Samples (B, 2) of the mixture from the turn's random numbers."""
    which = (draws.uniform("data") * SIDE**2).long()
    return (grid_means().to(draws.device)[which] + STD * draws.normal("user", (2,))).float()


def mixture() -> Source:
    """The mixture as a source without end."""
    return Source("mixture", (2,), None, lambda draws: (mixture_samples(draws), None))
