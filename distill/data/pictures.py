"""Pictures from their files' bytes: decoded, checked against the first of their set, and named when they are no good.

>>> import io
>>> from PIL import Image
>>> file = io.BytesIO(); Image.new("L", (6, 4), 7).save(file, "PNG")
>>> decoded(file.getvalue(), "seven.png").shape
torch.Size([1, 4, 6])
>>> decoded(file.getvalue()[:40], "half.png")
Traceback (most recent call last):
ValueError: half.png is not a picture that can be read: ...
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .source import Items

PNG = b"\x89PNG"
GREY = ("L", "1", "LA")
COLOUR = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")


def decoded(content: bytes, name: str, channels: int | None = None, size: int | None = None) -> torch.Tensor:
    """A picture (C, H, W) in bytes, from a file's content; ``channels`` and ``size`` as in ``as_bytes``."""
    from PIL import Image

    try:
        if content.startswith(PNG):
            Image.open(io.BytesIO(content)).verify()  # its checksums, which load() passes by
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
    except Exception as error:  # PIL's decoders raise whatever broke in them
        raise ValueError(f"{name} is not a picture that can be read: {error}") from error
    return as_bytes(picture, name, channels, size)


def as_bytes(picture: Any, name: str, channels: int | None = None, size: int | None = None) -> torch.Tensor:
    """A PIL picture as (C, H, W) in bytes.

    ``channels`` 3 makes colours of grey, 1 refuses colours, None takes what there is. ``size``: the shorter side is
    scaled to so many pixels, and the middle square kept.
    """
    from PIL import Image, ImageOps

    if picture.mode not in GREY + COLOUR:
        raise ValueError(f"{name} has pixels of kind {picture.mode}; 8-bit grey and colour can be read")
    grey = picture.mode in GREY
    if channels == 1 and not grey:
        raise ValueError(f"{name} is in colour, and the pictures before it are grey")
    picture = picture.convert("L" if grey and channels != 3 else "RGB")
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def pictures(
    name: str,
    count: int,
    read: Callable[[int], tuple[bytes | Any, str]],
    labels: torch.Tensor | None = None,
    classes: int | None = None,
    size: int | None = None,
) -> Items:
    """``count`` pictures of the first one's shape; ``read(row)`` -> (a file's bytes or a PIL picture, its name)."""
    if size is not None and size < 1:
        raise ValueError(f"data.size must be 1 or more, got {size}")

    def one(row: int, channels: int | None = None) -> tuple[torch.Tensor, str]:
        content, called = read(row)
        make = decoded if isinstance(content, bytes) else as_bytes
        return make(content, called, channels, size), called

    if count < 1:
        raise ValueError(f"data.path = {name} holds no pictures")
    first, first_name = one(0)

    def get(rows: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(rows), *first.shape, dtype=torch.uint8)
        for place, row in enumerate(rows.tolist()):
            picture, called = one(row, len(first))
            if picture.shape != first.shape:
                raise ValueError(
                    f"{called} is {_sides(picture)} pixels, and {first_name} is {_sides(first)}: data.size = n scales "
                    "and cuts them all to n x n"
                )
            found[place] = picture
        return found

    return Items(name, count, tuple(first.shape), get, labels, classes, slow=True)


def _sides(picture: torch.Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"
