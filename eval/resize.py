"""How images come to the size of a network's input: the ways of the common tools, which do not agree.

=============  ==========================================================================================
"tensorflow"   bilinear, corner to corner origin, no antialiasing, as TensorFlow 1 has it: torch-fidelity,
               EDM, ADM, StyleGAN; clean-fid's "legacy_tensorflow"
"pytorch"      bilinear, half-pixel centres, no antialiasing: pytorch-fid; clean-fid's "legacy_pytorch"
"clean"        Pillow's bicubic with antialiasing, in float, a channel at a time, not rounded: clean-fid
"bicubic"      torch's bicubic with antialiasing, not rounded: EDM2's for DINOv2
"pillow"       Pillow's bicubic of bytes, so rounded: dgm-eval for DINOv2, and what CLIP was trained with
"none"         refused unless the images have the size
=============  ==========================================================================================

All take bytes (n, C, H, W) and give floats in [0, 255], or bytes' values as floats. (arXiv:2104.11222 shows what
the differences do to FID.)

>>> x = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 1, 4) * 60
>>> [resize(x, 1, 8, method)[0, 0, 0, 5].item() for method in ("tensorflow", "pytorch")]
[150.0, 135.0]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F


def resize(images: torch.Tensor, height: int, width: int, method: str) -> torch.Tensor:
    """Bytes (n, C, H, W) as float32 (n, C, height, width), values 0 to 255."""
    if method not in METHODS:
        raise ValueError(f"resize must be one of {', '.join(METHODS)}, got {method!r}")
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be bytes (n, C, H, W), got {images.dtype} {tuple(images.shape)}")
    return METHODS[method](images, height, width)


def _tensorflow(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Row i lies at i H / height between two rows of the image, the last of which is repeated."""
    x = images.float()
    top, bottom, down = _between(x.shape[2], height, x.device)
    left, right, across = _between(x.shape[3], width, x.device)
    # First along a row, then between rows: the order of torch-fidelity, so that features are equal bit by bit.
    upper, lower = x[:, :, top], x[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


def _between(size: int, wanted: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    at = torch.arange(wanted, dtype=torch.float32, device=device) * torch.tensor(
        size / wanted, dtype=torch.float32
    )
    low = at.long()
    return low, (low + 1).clamp_max(size - 1), at - low.float()


def _pytorch(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(images.float(), size=(height, width), mode="bilinear", align_corners=False)


def _bicubic(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(images.float(), size=(height, width), mode="bicubic", antialias=True)


def _clean(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    from PIL import Image

    def channel(plane: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(plane.astype(np.float32))
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 255)

    planes = [channel(plane) for plane in images.flatten(0, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(planes)).reshape(*images.shape[:2], height, width).to(images.device)


def _pillow(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    from PIL import Image

    # A channel at a time is the same for bytes, and serves one channel and three.
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))
        for plane in images.flatten(0, 1).cpu().numpy()
    ]
    stacked = torch.from_numpy(np.stack(planes)).reshape(*images.shape[:2], height, width)
    return stacked.to(images.device).float()


def _none(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if tuple(images.shape[2:]) != (height, width):
        raise ValueError(
            f"images are {images.shape[2]} x {images.shape[3]}, the network takes {height} x {width}, and resize is "
            f"'none'; expected one of {', '.join(name for name in METHODS if name != 'none')}"
        )
    return images.float()


METHODS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "tensorflow": _tensorflow,
    "pytorch": _pytorch,
    "clean": _clean,
    "bicubic": _bicubic,
    "pillow": _pillow,
    "none": _none,
}
