"""Images as tokens: a pixel a token, a grey level an entry of the vocabulary; and image networks that read them so.

>>> image = torch.tensor([[-1.0, 0.0], [0.5, 1.0]])[None, None]
>>> tokens = to_tokens(image, levels=17)
>>> tokens.tolist(), bool((to_images(tokens, (1, 2, 2), 17) == image).all())
([[0, 8, 12, 16]], True)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def to_tokens(images: torch.Tensor, levels: int) -> torch.Tensor:
    """The nearest of ``levels`` even levels of each number in [-1, 1], as int64 (B, L)."""
    if levels < 2:
        raise ValueError(f"levels must be 2 or more, got {levels}")
    return ((images.clamp(-1, 1) + 1) * (0.5 * (levels - 1))).round().long().flatten(1)


def to_images(tokens: torch.Tensor, shape: tuple[int, ...], levels: int) -> torch.Tensor:
    """The way back: float32 (B, *shape) in [-1, 1]."""
    return (tokens.float() * (2 / (levels - 1)) - 1).reshape(len(tokens), *shape)


class PixelTokens(nn.Module):
    """A ``UNet`` or a ``DiT`` over tokens: one-hot channels in, a logit a level out.

    One channel for each level and one for the mask. ``config``: ``type`` (``unet`` or ``dit``), ``sample_size``, and
    what else that network takes. With ``patch_size: 1`` a DiT is a transformer over the tokens themselves.
    """

    def __init__(self, config: Mapping[str, Any], levels: int, attention: str = "sdpa"):
        super().__init__()
        from .load import NETS

        options = dict(config)
        kind = options.pop("type", None)
        if kind not in ("unet", "dit"):
            raise ValueError(f"net.type must be unet or dit, got {kind!r}")
        self.levels, self.side = levels, options["sample_size"]
        self.net = NETS[kind]({**options, "in_channels": levels + 1, "out_channels": levels}, attention)

    @property
    def null_label(self) -> int | None:
        """The index that stands for no label."""
        return self.net.null_label

    def forward(
        self, tokens: torch.Tensor, t: torch.Tensor | None = None, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        """tokens (B, L), t (B,) in 0 .. 1 or None, label (B,) or None -> logits (B, L, levels)."""
        weight = next(self.parameters())
        seen = functional.one_hot(tokens, self.levels + 1).to(weight.dtype)
        x = seen.transpose(1, 2).unflatten(-1, (self.side, self.side))
        t = x.new_zeros(len(x)) if t is None else 1000 * t.to(x.dtype)
        return self.net(x, t, label).flatten(2).transpose(1, 2)
