"""A small diffusion transformer (2212.09748): patches as tokens, adaLN-zero, two-dimensional sines for positions.

Each block is switched off at the start, and so is the last layer: a fresh net answers exactly 0.

    >>> net = DiT(DiTConfig(sample_size=8, hidden_size=16, depth=2, num_heads=2, num_class_embeds=11))
    >>> bool((net(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0]), label=torch.tensor([3, 10])) == 0).all())
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .attention import attention, check_implementation
from .unet import GapMLP, time_features, with_gap


@dataclass(frozen=True)
class DiTConfig:
    """What makes a ``DiT``. ``num_class_embeds`` counts the null label, which is the last index.

    ``second_time``: the net is also told how far a step leads (see ``jumps``).
    """

    sample_size: int = 8
    in_channels: int = 1
    out_channels: int = 1
    patch_size: int = 2
    hidden_size: int = 64
    depth: int = 3
    num_heads: int = 4
    mlp_ratio: float = 4.0
    num_class_embeds: int | None = None
    second_time: bool = False

    def __post_init__(self):
        for name in (
            "sample_size",
            "in_channels",
            "out_channels",
            "patch_size",
            "hidden_size",
            "depth",
            "num_heads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sample_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} must divide sample_size {self.sample_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be divisible by 4 and by num_heads {self.num_heads}, got {self.hidden_size}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DiTConfig:
        """From plain data; ValueError on a key that is not here."""
        known = {field.name for field in fields(cls)}
        if unknown := set(config) - known:
            raise ValueError(
                f"unknown key {', '.join(sorted(unknown))}; a DiT's config has {', '.join(sorted(known))}"
            )
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def position_features(side: int, dim: int) -> torch.Tensor:
    """Sines of the row beside sines of the column: (side^2, dim)."""
    line = time_features(torch.arange(side), dim // 2)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class Block(nn.Module):
    """Attention and an MLP, steered by the condition: each is x + gate f((1 + scale) norm(x) + shift)."""

    def __init__(self, config: DiTConfig, impl: str):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.heads, self.impl = config.num_heads, impl
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)
        )
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(functional.silu(condition))[
            :, None
        ].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.proj(attention(q, k, v, self.impl).transpose(1, 2).flatten(2))
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


class DiT(nn.Module):
    """The net; ``attention`` is ``sdpa`` or ``xformers`` and no part of the config, since it changes no number."""

    def __init__(self, config: DiTConfig | Mapping[str, Any], attention: str = "sdpa"):
        super().__init__()
        config = config if isinstance(config, DiTConfig) else DiTConfig.from_dict(config)
        check_implementation(attention)
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patchify = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        positions = position_features(config.sample_size // patch, width)
        self.register_buffer("positions", positions, persistent=False)
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.gap_embedding = GapMLP(width, width) if config.second_time else None
        self.class_embedding = (
            nn.Embedding(config.num_class_embeds, width) if config.num_class_embeds else None
        )
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch * patch * config.out_channels)
        self._start()

    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        for module in (*(block.modulation for block in self.blocks), self.modulation_out, self.out):
            nn.init.zeros_(module.weight)
        if self.gap_embedding is not None:
            nn.init.zeros_(self.gap_embedding.linear_2.weight)

    @property
    def null_label(self) -> int | None:
        """The index that stands for no label: the last one. None for an unconditional net."""
        return self.config.num_class_embeds - 1 if self.config.num_class_embeds else None

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        label: torch.Tensor | None = None,
        gap: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, C, H, W) with H = W = sample_size, t (B,) as the net counts time, label (B,) or None.

        ``gap`` (B,): of a net with a second time, how far below t that lies; None is 0.
        """
        config = self.config
        if x.ndim != 4 or x.shape[1:] != (config.in_channels, config.sample_size, config.sample_size):
            wanted = f"(B, {config.in_channels}, {config.sample_size}, {config.sample_size})"
            raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
        t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        condition = self.time_embedding(time_features(t, config.hidden_size).to(x.dtype))
        condition = with_gap(condition, self.gap_embedding, gap)
        if self.class_embedding is not None:
            if label is None:
                label = torch.full((x.shape[0],), self.null_label, device=x.device)
            condition = condition + self.class_embedding(label)
        elif label is not None:
            raise ValueError("label was given to an unconditional net (num_class_embeds is None)")

        h = self.patchify(x).flatten(2).transpose(1, 2) + self.positions.to(x.dtype)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation_out(functional.silu(condition))[:, None].chunk(2, dim=-1)
        h = self.out(self.norm_out(h) * (1 + scale) + shift)
        return self._unpatchify(h)

    def _unpatchify(self, h: torch.Tensor) -> torch.Tensor:
        patch, side = self.config.patch_size, self.config.sample_size // self.config.patch_size
        # fold's layout: (channel, row, column) within a token
        size = (side * patch, side * patch)
        return functional.fold(h.transpose(1, 2), size, kernel_size=patch, stride=patch)
