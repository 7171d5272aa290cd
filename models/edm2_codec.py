"""The latents of EDM2's models of 512 x 512 images (2312.02696, appendix B): standardised, of images in 0 .. 1.

    y = scale z + bias, a channel at a time,      z the autoencoder's answer to (image + 1) / 2

Checkpoints hold scale and bias and the name of the autoencoder, not its weights:

    d = load("edm2-img512-s.pkl")
    d.codec.vae = AutoencoderKL.from_pretrained(d.codec.name)
    images = d.codec.decode(x)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .codec import Codec


class EDM2Codec(Codec):
    """Between images in [-1, 1] and latents, once it has an autoencoder.

    >>> codec = EDM2Codec("stabilityai/sd-vae-ft-mse", scale=[0.1] * 4, bias=[0.0] * 4)
    >>> codec.decode(torch.zeros(1, 4, 8, 8))
    Traceback (most recent call last):
    ValueError: codec.vae must be set first: AutoencoderKL.from_pretrained('stabilityai/sd-vae-ft-mse')
    """

    def __init__(
        self,
        name: str,
        scale: Sequence[float],
        bias: Sequence[float],
        null: dict[str, Any] | None = None,
        vae: nn.Module | None = None,
    ):
        super().__init__(vae, null=null)
        self.name, self.scale, self.bias = name, tuple(scale), tuple(bias)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents, the mode of the autoencoder's posterior."""
        return self._pieces(self._encode, self._ready(images))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, about -1 to 1, in float32; gradients flow where ``latents`` want them."""
        return self._pieces(self._decode, self._ready(latents))

    @property
    def decodes(self) -> bool:
        """Whether the autoencoder was given."""
        return self.vae is not None

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        scale, bias = self._affine()
        half = ((images + 1) / 2).to(self._device, self._dtype)
        return self.vae.encode(half, return_dict=False)[0].mode().float() * scale + bias

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        scale, bias = self._affine()
        z = (latents.to(self._device, torch.float32) - bias) / scale
        return 2 * self.vae.decode(z.to(self._dtype), return_dict=False)[0].float() - 1

    def _ready(self, x: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            raise ValueError(f"codec.vae must be set first: AutoencoderKL.from_pretrained({self.name!r})")
        return x

    def _affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale, bias = (
            torch.tensor(v, device=self._device).reshape(-1, 1, 1) for v in (self.scale, self.bias)
        )
        return scale, bias

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype
