"""Features of images, by which distributions are compared: one call from bytes to a matrix.

"digits" is the classifier that ships with the package and needs nothing else. "inception" (and its earlier layers
"inception-64", "-192", "-768"), "dinov2" and "clip" are torch-fidelity's networks: see ``features_fidelity``.

>>> digits_extractor = extractor("digits")
>>> seen = digits_extractor(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
>>> seen.values.shape, seen.logits.shape, digits_extractor.protocol.resize
(torch.Size([5, 64]), torch.Size([5, 10]), 'none')
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..models import checkpoint
from ..models.classifier import load_classifier
from .protocol import Protocol
from .resize import METHODS, resize
from .statistics_files import file_hash

NAMES = ("digits", "inception", "inception-64", "inception-192", "inception-768", "dinov2", "clip")


class Features(NamedTuple):
    """values (n, D); logits (n, K) where the network is a classifier too, as the Inception score needs."""

    values: torch.Tensor
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A network with its way of resizing: bytes (n, C, H, W) to ``Features``.

    network takes floats (n, channels, size, size) in [0, 255] and does its own scaling. weights is the sha256 of
    its file, and published whether that is the one everybody uses.
    """

    name: str
    network: Callable[[torch.Tensor], Features]
    size: int
    channels: int
    weights: str
    resize: str
    device: torch.device
    published: bool = True

    @property
    def protocol(self) -> Protocol:
        """What is known before there are images."""
        return Protocol(features=self.name, weights=self.weights, resize=self.resize)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        images = _channels(images, self.channels).to(self.device)
        seen = self.network(resize(images, self.size, self.size, self.resize))
        bad = ~torch.isfinite(seen.values).all(dim=1)
        if bool(bad.any()):
            raise ValueError(
                f"{self.name} features have NaN or infinity in {int(bad.sum())} of {len(bad)} images; are these the "
                f"network's weights (sha256 {self.weights[:12]})?"
            )
        return seen


def extractor(
    name: str = "digits",
    weights: str | os.PathLike | None = None,
    resize: str | None = None,
    device: str | torch.device = "cpu",
    download: bool = True,
) -> Extractor:
    """The extractor of that name.

    Args:
        weights: a file; None looks into the environment, torch's cache, and then downloads (``weights``).
        resize: one of ``resize.METHODS``; None is what the network's users agree on: "tensorflow" for Inception,
            "bicubic" for DINOv2 (as EDM2) and CLIP, "none" for digits.
    """
    if name not in NAMES:
        raise ValueError(f"features must be one of {', '.join(NAMES)}, got {name!r}")
    if resize is not None and resize not in METHODS:
        raise ValueError(f"resize must be one of {', '.join(METHODS)}, got {resize!r}")
    device = torch.device(device)
    if name == "digits":
        path = checkpoint.DATA / "digits-classifier.safetensors" if weights is None else weights
        judge = load_classifier(path).to(device)
        network = lambda x: Features(*judge(x / 127.5 - 1.0))  # noqa: E731
        return Extractor(name, network, 8, 1, file_hash(path), resize or "none", device, weights is None)
    from . import features_fidelity

    return features_fidelity.build(name, weights, resize, device, download)


def _channels(images: torch.Tensor, wanted: int) -> torch.Tensor:
    """Grey repeated to colour; colour that is grey in every pixel taken as grey."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be bytes (n, C, H, W), C 1 or 3, got {images.dtype} {tuple(images.shape)}"
        )
    if images.shape[1] == wanted:
        return images
    if wanted == 3:
        return images.expand(-1, 3, -1, -1)
    if not bool((images == images[:, :1]).all()):
        raise ValueError("images are in colour, and the features are of grey ones; expected one channel")
    return images[:, :1]
