"""Denoising of one place after another: the backbone of an autoregressive model with a small head that sees x_t.

    v_i = head(h_i, x_t,i, t_i),    h_i = backbone(class, places before i)

With clean places before i it is an autoregressive diffusion model (2406.11838), the critic of Distilled Decoding 2
(2510.21003). With noise z at all places, before i too, and t = 1 it is that paper's one-step generator: every place of
a sample from one call. ``ARConfig`` makes it, and it can take over the backbone of an ``Autoregressive``.

>>> net = TokenFlow(ARConfig(shape=(1, 4, 4), codes=5, width=8, depth=1, heads=2))
>>> net(torch.randn(2, 1, 4, 4), torch.ones(2)).shape
torch.Size([2, 1, 4, 4])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .autoregressive import ARConfig, Autoregressive, Backbone
from .codebook import Codebook
from .unet import time_features


class TokenFlow(nn.Module):
    """The net; it predicts dx/dt of the straight path at every place."""

    def __init__(self, config: ARConfig | Mapping[str, Any], attention: str = "sdpa"):
        super().__init__()
        config = config if isinstance(config, ARConfig) else ARConfig.from_dict(config)
        self.config = config
        self.book = Codebook(config.codes, config.shape, config.patch)
        width, dim = config.width, self.book.dim
        self.body = Backbone(config, self.book.places, dim)
        self.noisy, self.time = nn.Linear(dim, 2 * width), nn.Linear(width, 2 * width)
        self.feature = nn.Linear(width, 2 * width)
        self.head = nn.Sequential(
            nn.SiLU(),
            nn.Linear(2 * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, dim),
        )

    @property
    def null_label(self) -> int:
        """The index that stands for no label."""
        return self.body.null_label

    def take_over(self, teacher: Autoregressive) -> None:
        """The teacher's codebook and backbone, copied; the head stays as it is."""
        self.book.load_state_dict(teacher.book.state_dict())
        self.body.load_state_dict(teacher.body.state_dict())

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        label: torch.Tensor | None = None,
        prefix: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x samples or places (B, n, d), t (B,) or (B, n); ``prefix``: clean samples or places (None: x itself)."""
        places = self.book.split(x)
        before = places if prefix is None else self.book.split(prefix)
        if before.shape != places.shape:
            raise ValueError(f"prefix must be as many places as x, {len(x)} samples, got {len(before)}")
        t = t.to(places.dtype)
        t = t.expand(places.shape[:2]) if t.ndim == 2 else t.reshape(-1, 1).expand(places.shape[:2])
        waves = time_features(1000 * t.flatten(), self.config.width).to(places.dtype)
        u = self.feature(self.body(before, label)) + self.noisy(places)
        v = self.head(u + self.time(waves).unflatten(0, t.shape))
        return v if places is x else self.book.join(v)
