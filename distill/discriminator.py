"""Discriminators on a network's own features: a head a tapped layer, one logit a head (DMD2, 2405.14867).

The features come from the same forward that gives the estimate of x0 (``Denoiser.tap``), so a GAN costs its heads only.
Whose features they are, the critic's (DMD2) or the frozen teacher's (FastGen), is the method's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.denoiser import Denoiser
from ..models.paths import Times


class Head(nn.Module):
    """Features of one layer to one logit (B,): images (B, C, H, W) are convolved away, tokens (B, N, C) averaged.

    >>> Head((8, 4, 4))(torch.zeros(3, 8, 4, 4)).shape, Head((5, 8))(torch.zeros(3, 5, 8)).shape
    (torch.Size([3]), torch.Size([3]))
    """

    def __init__(self, shape: Sequence[int], width: int | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        if len(shape) == 3:
            channels, size = shape[0], min(shape[1:])
            width = width or channels
            while size >= 8:
                layers += [nn.Conv2d(channels, width, 4, 2, 1), _norm(width), nn.SiLU()]
                channels, size = width, size // 2
            layers += [
                nn.Conv2d(channels, width, min(size, 4)),
                _norm(width),
                nn.SiLU(),
                nn.Conv2d(width, 1, 1),
            ]
        elif len(shape) in (1, 2):
            channels = shape[-1]
            width = width or channels
            layers += [nn.LayerNorm(channels), nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, 1)]
        else:
            raise ValueError(f"shape must be (C,), (N, C) or (C, H, W), got {tuple(shape)}")
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, ...) -> (B,)."""
        return self.layers(features.float()).flatten(1).mean(1)


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(g for g in (1, 2, 4, 8, 16, 32) if channels % g == 0), channels)


class Discriminator(nn.Module):
    """A head for each of ``names``, submodules of the network whose features it reads."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], width: int | None = None):
        super().__init__()
        self.names = list(shapes)
        self.heads = nn.ModuleList([Head(shape, width) for shape in shapes.values()])

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits (B, heads)."""
        pairs = zip(self.heads, self.names, strict=True)
        return torch.stack([head(features[name]) for head, name in pairs], dim=1)


def discriminator_on(
    d: Denoiser,
    names: Sequence[str],
    example: torch.Tensor,
    cond: Mapping[str, Any],
    width: int | None = None,
) -> Discriminator:
    """A discriminator on d's layers ``names``; their shapes are found by one call on ``example`` (B, ...)."""
    if not names:
        raise ValueError("names must be one or more submodules of the network")
    with torch.no_grad(), d.tap(names) as features:
        d(example, d.path.t_max, **cond)
    silent = [name for name in names if name not in features]
    if silent:
        raise ValueError(
            f"names must be submodules that a forward passes through: {', '.join(silent)} gave nothing"
        )
    return Discriminator({name: features[name].shape[1:] for name in names}, width)


def estimate_and_logits(
    d: Denoiser, discriminator: Discriminator, x: torch.Tensor, t: Times, cond: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """d's estimate of x0 and the logits (B, heads) on its features, from one forward."""
    with d.tap(discriminator.names) as features:
        x0 = d(x, t, **cond)
    gathered_again(d.net, features)
    return x0, discriminator(features)


def gathered_again(net: nn.Module | None, features: Mapping[str, torch.Tensor]) -> None:
    """Where ``net`` is sharded: its root's weights are gathered when a gradient comes back to its features.

    FSDP gathers a module's weights when a gradient comes to its *output*. Where a loss reads features alone none comes
    to the root's, and what it holds itself, before the blocks, would still be scattered.
    """
    if not hasattr(net, "unshard"):
        return

    def gather(_gradient: torch.Tensor) -> None:
        net.unshard()  # type: ignore[union-attr, operator]

    for value in features.values():
        if value.requires_grad:
            value.register_hook(gather)
