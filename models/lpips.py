"""LPIPS (1801.03924): a distance of images as people see it, from weights that you have as files.

With f_l the channel-normalised features of a VGG16 after its l-th block and w_l >= 0 one weight a channel,

    d(a, b) = sum_l mean_{h,w} sum_c w_lc (f_l(a) - f_l(b))_c^2

No weights come with this package and none are fetched. They are those of torchvision's ``vgg16`` (keys
``features.0.weight`` ..) and of the LPIPS heads, version 0.1 (``lin0.model.1.weight`` ..), as safetensors; a ``.pth``
becomes one by ``safetensors.torch.save_file(torch.load(old, weights_only=True), new)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

BLOCKS = (
    (0, 2),
    (5, 7),
    (10, 12, 14),
    (17, 19, 21),
    (24, 26, 28),
)  # where vgg16.features has its convolutions
# Images in [-1, 1] to what the VGG was trained on
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST = 2 ** (len(BLOCKS) - 1)


def lpips(
    vgg: str | os.PathLike, heads: str | os.PathLike, device: torch.device | str = "cpu"
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The distance (B, C, H, W), (B, C, H, W) -> (B,) of images in [-1, 1] with 3 channels, or 1 that is repeated.

    Args:
        vgg, heads: two safetensors files, or twice the same that holds both.
    """
    convolutions = [f"features.{k}.{part}" for block in BLOCKS for k in block for part in ("weight", "bias")]
    names = [f"lin{level}.model.1.weight" for level in range(len(BLOCKS))]
    weights = {**_read("vgg", vgg, convolutions), **_read("heads", heads, names)}
    weights = {name: value.to(device, torch.float32) for name, value in weights.items()}
    shift, scale = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (SHIFT, SCALE))

    def features(images: torch.Tensor) -> list[torch.Tensor]:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < SMALLEST:
            raise ValueError(f"images must be (B, 3 or 1, H, W) with sides of {SMALLEST} and more, got "
                             f"{tuple(images.shape)}")  # fmt: skip
        x, found = (images.float().expand(-1, 3, -1, -1) - shift) / scale, []
        for level, block in enumerate(BLOCKS):
            x = functional.max_pool2d(x, 2) if level else x
            for k in block:
                x = functional.conv2d(
                    x, weights[f"features.{k}.weight"], weights[f"features.{k}.bias"], padding=1
                )
                x = functional.relu(x)
            found.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return found

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape != b.shape:
            raise ValueError(f"a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
        total = torch.zeros(len(a), device=a.device)
        for name, one, two in zip(names, features(a), features(b), strict=True):
            total = total + functional.conv2d((one - two).square(), weights[name]).mean((1, 2, 3))
        return total

    return distance


def _read(argument: str, file: str | os.PathLike, names: list[str]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise FileNotFoundError(f"{argument} must be a safetensors file, {os.fspath(file)} is none")
    try:
        held = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{argument} must be a safetensors file, {os.fspath(file)} is none ({error}); from a .pth make one with "
            "safetensors.torch.save_file(torch.load(old, weights_only=True), new)"
        ) from None
    if missing := [name for name in names if name not in held]:
        raise ValueError(
            f"{argument} must hold {missing[0]} and {len(missing) - 1} more that {os.fspath(file)} lacks"
        )
    return {name: held[name] for name in names}
