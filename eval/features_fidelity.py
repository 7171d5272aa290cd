"""torch-fidelity's networks behind our resizing: InceptionV3 as FID defines it, DINOv2 ViT-L/14, CLIP ViT-L/14 at 336.

Their layers and their order of operations, so that features equal theirs bit by bit where the resize is theirs
("tensorflow"); weights are found by ``weights`` and read without unpickling. The network of DINOv2 is code in torch's
hub, as for torch-fidelity: the first use downloads facebookresearch/dinov2 into torch's cache, and runs it.

Scaling of [0, 255] for Inception: (x - 128) / 128 as TensorFlow's graph and clean-fid, or 2 x / 255 - 1 with the resize
"pytorch", as pytorch-fid.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import weights as files
from .features import Extractor, Features

# After which child of the network each layer of features is taken, averaged over what is left of the image.
LAYERS = {
    "inception-64": "MaxPool_1",
    "inception-192": "MaxPool_2",
    "inception-768": "Mixed_6e",
    "inception": "AvgPool",
}
DINO_SIZE = 224
# Mean and standard deviation of the training images, of values in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def build(
    name: str, weights: str | os.PathLike | None, resize: str | None, device: torch.device, download: bool
) -> Extractor:
    """The extractor of torch-fidelity's network `name`; ``ImportError`` with a hint where torch-fidelity is not."""
    published = {"dinov2": files.DINOV2, "clip": files.CLIP}.get(name, files.INCEPTION)
    if name in LAYERS:
        module = _module("feature_extractor_inceptionv3")
    elif name == "clip":
        module = _module("feature_extractor_clip")
    found = files.find_weights(published, weights, download)
    state = files.read_state(found.path)
    if name in LAYERS:
        network = _Inception(inception(module, state), LAYERS[name], resize == "pytorch")
        size, usual = module.FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE, "tensorflow"
    elif name == "clip":
        model = module.build_model(state, torch.float32)
        network, size, usual = _Normalised(model.visual, CLIP), model.visual.input_resolution, "bicubic"
    else:
        network, size, usual = _Normalised(dinov2(state, download), IMAGENET), DINO_SIZE, "bicubic"
    network = network.to(device).eval().requires_grad_(False)
    return Extractor(name, network, size, 3, found.sha256, resize or usual, device, found.published)


def inception(module: Any, state: dict[str, torch.Tensor]) -> nn.Module:
    """torch-fidelity's Inception with weights that are tensors already; they unpickle what they are given."""
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    try:
        return module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=content
        )
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of FID's InceptionV3: {_short(error)}") from error


def dinov2(state: dict[str, torch.Tensor], download: bool, name: str = "dinov2_vitl14") -> nn.Module:
    """The network from torch's hub, which torch-fidelity takes too, with these weights."""
    repository = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
    options: dict[str, Any] = {"pretrained": False, "verbose": False}
    try:
        if repository.is_dir():  # the code is here: nobody is asked whether there is newer
            network = torch.hub.load(str(repository), name, source="local", **options)
        elif not download or files.offline():
            raise FileNotFoundError("downloads are not allowed")
        else:
            network = torch.hub.load("facebookresearch/dinov2:main", name, trust_repo=True, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"the network of DINOv2 is code of facebookresearch/dinov2, which is not in {repository} and could not be "
            f"downloaded: {error}"
        ) from error
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of {name}: {_short(error)}") from error
    return network


class _Inception(nn.Module):
    """Up to one layer; logits without their bias, as torch-fidelity's score, where the last one is asked for."""

    def __init__(self, network: nn.Module, last: str, half_range: bool):
        super().__init__()
        self.network, self.last = network, last
        self.shift, self.scale = (127.5, 127.5) if half_range else (128.0, 128.0)

    def forward(self, x: torch.Tensor) -> Features:
        x = (x - self.shift) / self.scale
        # The children stand in the order in which the network runs them.
        for name, child in self.network.named_children():
            x = child(x)
            if name == self.last:
                break
        if self.last == "AvgPool":
            values = x.flatten(1)
            return Features(values, values.mm(self.network.fc.weight.T))
        return Features(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class _Normalised(nn.Module):
    """A network of images about a mean, in units of their spread."""

    def __init__(self, network: nn.Module, moments: tuple[tuple[float, ...], tuple[float, ...]]):
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(part).reshape(1, 3, 1, 1) * 255 for part in moments)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: torch.Tensor) -> Features:
        return Features(self.network((x - self.mean) / self.std))


def _short(error: Exception) -> str:
    """torch lists every key; the first few say enough."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."


def _module(name: str) -> Any:
    try:
        import importlib

        return importlib.import_module(f"torch_fidelity.{name}")
    except ImportError as error:
        raise ImportError(
            f"these features are torch-fidelity's: pip install torch-fidelity (or fewstep[eval]) ({error})"
        ) from error
    except RuntimeError as error:  # what a torchvision built for another torch raises
        raise ImportError(
            f"torch-fidelity imports torchvision, which does not fit this torch ({error}): install the one of the same "
            "index as torch"
        ) from error
