"""Images from where people keep them, in batches and in [-1, 1]: the digits, an .npz, or a folder.

>>> images, labels = next(image_batches("digits", size=100))
>>> images.shape, labels.shape
(torch.Size([100, 1, 8, 8]), torch.Size([100]))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from .digits import digits

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def image_batches(
    source: str | os.PathLike, size: int = 256
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Pairs of float32 images (n, C, H, W) and their labels (n,), None where there are none.

    ``source`` is "digits" (the training split), an .npz with images as ``arr_0`` or ``images`` (bytes (N, H, W, C), or
    floats in [-1, 1] of shape (N, C, H, W)) and labels, if any, as ``arr_1`` or ``labels``; or a folder of pictures of
    one size, searched with its subfolders.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    path = Path(source)
    if str(source) == "digits":
        images, labels = digits("train")
        yield from _cut(images, labels, size)
    elif path.suffix == ".npz":
        yield from _cut(*_from_npz(path), size)
    elif path.is_dir():
        yield from _from_folder(path, size)
    else:
        raise ValueError(f"data must be 'digits', an .npz or a folder of pictures, got {str(source)!r}")


def _cut(images: np.ndarray, labels: np.ndarray | None, size: int):
    for first in range(0, len(images), size):
        some = slice(first, first + size)
        yield _scaled(images[some]), None if labels is None else torch.as_tensor(labels[some]).long()


def _scaled(images: np.ndarray) -> torch.Tensor:
    """Bytes (n, H, W, C) or floats (n, C, H, W) as float32 (n, C, H, W) in [-1, 1]."""
    if images.dtype == np.uint8:
        return torch.as_tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1.0
    return torch.as_tensor(images).float()


def _from_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with np.load(path, allow_pickle=False) as content:
        names = set(content.files)
        key = next((name for name in ("arr_0", "images") if name in names), None)
        if key is None:
            raise ValueError(
                f"{path} must hold images as arr_0 or images, it has {', '.join(sorted(names)) or 'nothing'}"
            )
        images = content[key]
        labels = next((content[name] for name in ("arr_1", "labels") if name in names), None)
    if images.ndim != 4 or not (images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)):
        raise ValueError(
            f"{key} of {path} must be bytes (N, H, W, C) or floats (N, C, H, W), got {images.dtype} {images.shape}"
        )
    return images, labels


def _from_folder(path: Path, size: int):
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    shape = None
    for first in range(0, len(files), size):
        batch = []
        for file in files[first : first + size]:
            with Image.open(file) as picture:
                image = np.asarray(picture.convert("L" if picture.mode in ("L", "1") else "RGB"))
            image = image[..., None] if image.ndim == 2 else image
            shape = image.shape if shape is None else shape
            if image.shape != shape:
                raise ValueError(
                    f"{file} has shape {image.shape}, and the pictures before it {shape}: resize them first"
                )
            batch.append(image)
        yield _scaled(np.stack(batch)), None
