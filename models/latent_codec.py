"""The autoencoder of diffusers that a latent model was trained in, kept inside the model's own checkpoint.

    y = (z - shift) scale,      z the mode of the autoencoder's posterior, shift and scale as its config says

What a checkpoint says of it is plain data (``described``): class, config, name, and the hash of its weights. The
weights themselves lie beside the network's under ``codec.``, so a checkpoint decodes wherever it is taken:

    d = load("runs/latent-flow.safetensors")
    images = d.codec.decode(x)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .codec import Codec

PREFIX = "codec."


class LatentCodec(Codec):
    """Between images in [-1, 1] and latents; made of what ``described`` says, and weights where they are at hand.

    >>> codec = LatentCodec({"class": "AutoencoderKL", "name": "tiny", "sha256": "0", "config": {}})
    >>> codec.decode(torch.zeros(1, 4, 8, 8))
    Traceback (most recent call last):
    ValueError: the weights of autoencoder 'tiny' are not here: codec.vae = ...from_pretrained(..) sets it
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        vae: nn.Module | None = None,
        null: Mapping[str, Any] | None = None,
        batch: int = 16,
    ):
        super().__init__(vae, null=null, batch=batch)
        self.about = dict(about)
        self._weights: dict[str, torch.Tensor] = {}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents, the mode of the autoencoder's posterior."""
        return super().encode(self._ready(images))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, about -1 to 1, in float32; gradients flow where ``latents`` want them."""
        return super().decode(self._ready(latents))

    @property
    def decodes(self) -> bool:
        """Whether the weights are here."""
        return self.vae is not None or bool(self._weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights under the names that a checkpoint has them by; none, if they are not here."""
        weights = self._weights if self.vae is None else self.vae.state_dict()
        return {f"{PREFIX}{name}": value for name, value in weights.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of a checkpoint; the autoencoder is built when something is to be encoded or decoded."""
        self._weights = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}

    def _ready(self, x: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            if not self._weights:
                raise ValueError(
                    f"the weights of autoencoder {self.about['name']!r} are not here: codec.vae = "
                    "...from_pretrained(..) sets it"
                )
            vae = _class(self.about["class"]).from_config(self.about["config"])
            vae.load_state_dict(self._weights)
            dtype = next(v.dtype for v in self._weights.values() if v.is_floating_point())
            vae = vae.to(x.device).eval().requires_grad_(False)
            self.vae = vae if dtype == torch.float32 else vae.to(dtype)
        return x


def open_vae(path: str, device: torch.device | str = "cpu") -> LatentCodec:
    """The codec of an autoencoder's folder, or of the ``vae`` in a pipeline's folder."""
    from json import loads

    folder = Path(path).expanduser()
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"latents.vae = {path} must be a folder that diffusers saved an autoencoder to")
    kind = loads(config.read_text()).get("_class_name", "AutoencoderKL")
    vae = _class(kind).from_pretrained(folder).to(device).eval().requires_grad_(False)
    name = folder.parent.name if folder.name == "vae" else folder.name
    return LatentCodec(described(vae, name), vae)


def described(vae: nn.Module, name: str) -> dict[str, Any]:
    """Class, config, name and the hash of the weights: what tells one autoencoder from another."""
    config = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    total = hashlib.sha256()
    for key, value in sorted(vae.state_dict().items()):
        total.update(key.encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"class": type(vae).__name__, "name": name, "sha256": total.hexdigest(), "config": config}


def _class(name: str):
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{name} is diffusers': pip install diffusers") from error
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config") or not name.startswith("Autoencoder"):
        raise ValueError(f"the autoencoder must be one of diffusers' Autoencoder classes, got {name!r}")
    return kind
