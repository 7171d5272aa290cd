"""A small residual MLP for points in a few dimensions: students and critics of mixtures whose scores are exact.

>>> net = MLP(MLPConfig(dim=2, hidden_size=16, depth=2, num_class_embeds=4))
>>> net(torch.randn(5, 2), torch.zeros(5), label=torch.zeros(5, dtype=torch.long)).shape
torch.Size([5, 2])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from .unet import GapMLP, time_features, with_gap


@dataclass(frozen=True)
class MLPConfig:
    """What makes an ``MLP``. ``num_class_embeds`` counts the null label, which is the last index.

    ``waves``: beside each coordinate x the network reads sin and cos of pi x, 2 pi x, 4 pi x .. (so many octaves). A
    network of plain coordinates learns what is sharp late or never (2006.10739); narrow modes need 3 or 4 octaves.
    ``second_time``: the network is also told how far a step leads (see ``jumps``).
    """

    dim: int = 2
    hidden_size: int = 128
    depth: int = 3
    waves: int = 0
    time_scale: float = 100.0
    num_class_embeds: int | None = None
    second_time: bool = False

    def __post_init__(self):
        for name in ("dim", "hidden_size", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.waves < 0:
            raise ValueError(f"waves must be 0 or more, got {self.waves}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MLPConfig:
        """From plain data; ValueError on a key that is not here."""
        known = {field.name for field in fields(cls)}
        if unknown := set(config) - known:
            raise ValueError(
                f"unknown key {', '.join(sorted(unknown))}; an MLP has {', '.join(sorted(known))}"
            )
        return cls(**config)


class Block(nn.Module):
    """x + W_2 silu(W_1 norm(x) + time)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.time = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(B, width), (B, width) -> (B, width)."""
        return x + self.down(nn.functional.silu(self.up(self.norm(x)) + self.time(time)))


class MLP(nn.Module):
    """``net(x, tau, label)``: (B, dim), (B,), (B,) -> (B, dim); a fresh one answers 0."""

    def __init__(self, config: MLPConfig | Mapping[str, Any], attention: str = "sdpa"):
        """``attention`` is there because the other networks take it."""
        super().__init__()
        config = config if isinstance(config, MLPConfig) else MLPConfig.from_dict(config)
        self.config, width = config, config.hidden_size
        self.inputs = nn.Linear(config.dim * (1 + 2 * config.waves), width)
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.gap_embedding = GapMLP(width, width) if config.second_time else None
        self.labels = nn.Embedding(config.num_class_embeds, width) if config.num_class_embeds else None
        self.blocks = nn.ModuleList([Block(width) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.Linear(width, config.dim)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.outputs.bias)

    @property
    def null_label(self) -> int | None:
        """The label that stands for none."""
        return None if self.labels is None else self.config.num_class_embeds - 1

    def forward(
        self,
        x: torch.Tensor,
        tau: torch.Tensor,
        label: torch.Tensor | None = None,
        gap: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the class; no label is the null label, and no ``gap`` (B,) one of 0."""
        features = time_features(tau * self.config.time_scale, self.config.hidden_size)
        time = with_gap(self.time_embedding(features.to(x.dtype)), self.gap_embedding, gap)
        if self.labels is not None:
            label = torch.full_like(tau, self.null_label, dtype=torch.long) if label is None else label
            time = time + self.labels(label)
        x = self.inputs(with_waves(x, self.config.waves))
        for block in self.blocks:
            x = block(x, time)
        return self.outputs(self.norm(x))

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""
        return asdict(self.config)


def with_waves(x: torch.Tensor, octaves: int) -> torch.Tensor:
    """(x, sin(pi 2^k x), cos(pi 2^k x)) for k < octaves: (B, dim) -> (B, dim (1 + 2 octaves)).

    >>> with_waves(torch.tensor([[0.5]]), 2).round().abs()
    tensor([[0., 1., 0., 0., 1.]])
    """
    if octaves == 0:
        return x
    turns = torch.cat([x * (math.pi * 2**k) for k in range(octaves)], dim=1)
    return torch.cat([x, turns.sin(), turns.cos()], dim=1)
