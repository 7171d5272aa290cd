"""Images in [-1, 1] to bytes, labelled grids and files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .checks import whole_number
from .files import written_aside

if TYPE_CHECKING:
    from PIL import Image

PAPER, INK = (255, 255, 255), (32, 32, 32)
SMALLEST_SIDE = 64  # grids magnify images smaller than this, by a whole factor


def to_uint8(x, outside: str = "clamp") -> torch.Tensor:
    """Floats in [-1, 1] of any shape to bytes: round((x + 1) * 127.5), clamped to [0, 255].

    Rounded, not truncated, which would darken by half a level. outside: "clamp" what overshoots
    [-1, 1], as samples do; "refuse" it. NaN and infinity are always refused. Bytes pass unchanged.

    >>> to_uint8(torch.tensor([-1.0, 0.0, 0.999, 1.0, 1.3])).tolist()
    [0, 128, 255, 255, 255]
    """
    if outside not in ("clamp", "refuse"):
        raise ValueError(f"outside is {outside!r}; expected 'clamp' or 'refuse'")
    x = torch.as_tensor(x).detach()
    if x.dtype == torch.uint8:
        return x
    if not x.dtype.is_floating_point:
        raise TypeError(f"x has dtype {x.dtype}; expected floats in [-1, 1], or uint8")
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"x has NaN or infinity in {bad} of {x.numel()} values; expected floats in [-1, 1]")
    if outside == "refuse" and x.numel() and float(x.abs().max()) > 1:
        low, high = float(x.min()), float(x.max())
        raise ValueError(f"x spans [{low:.4g}, {high:.4g}]; expected [-1, 1], or outside='clamp'")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def tile(images, columns: int | None = None) -> torch.Tensor:
    """Images (N, C, H, W) side by side without gaps as one (C, rows H, columns W), in bytes, row by row.

    columns None: about square. What is left of the last row is black.

    >>> tile(torch.zeros(6, 1, 8, 8), columns=3).shape
    torch.Size([1, 16, 24])
    """
    images = _batch(images, "images")
    n, c, h, w = images.shape
    columns = math.ceil(n**0.5) if columns is None else whole_number(columns, "columns")
    rows = math.ceil(n / columns)
    sheet = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    sheet[:n] = images
    return sheet.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def grid(
    images,
    columns: int | None = None,
    labels_rows: Sequence[str] | None = None,
    labels_columns: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Images (N, C, H, W), C of 1 or 3, as one PIL picture, row by row, labels on the left and on top.

    columns None: as many as there are column labels, else about square. scale: each pixel becomes
    scale x scale (nearest neighbour); None magnifies until the shorter side has 64 pixels or more. A cell
    can hold several images: see `tile`. Floats are read as [-1, 1] and clamped.

    >>> grid(torch.zeros(4, 1, 8, 8), labels_rows=["ddim", "deis"], labels_columns=["5", "10"]).mode
    'RGB'
    """
    from PIL import Image, ImageDraw, ImageFont

    images = _batch(images, "images")
    n, c, h, w = images.shape
    if columns is None:
        columns = len(labels_columns) if labels_columns else math.ceil(n**0.5)
    columns = whole_number(columns, "columns")
    rows = math.ceil(n / columns)
    above = _labels(labels_columns, "labels_columns", columns)
    beside = _labels(labels_rows, "labels_rows", rows)
    scale = max(1, math.ceil(SMALLEST_SIDE / min(h, w))) if scale is None else whole_number(scale, "scale")
    h, w = h * scale, w * scale
    size = min(28, max(12, round(min(h, w) / 6)))
    font, gap = ImageFont.load_default(size=size), max(4, size // 3)

    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), text, font=font) for text in beside]
    left = math.ceil(max((box[2] for box in boxes), default=0)) + (2 * gap if boxes else 0)
    heads = [ruler.multiline_textbbox((0, 0), text, font=font) for text in above]
    top = math.ceil(max((box[3] for box in heads), default=0)) + (gap if heads else 0)
    # A column is as wide as its label needs, so that neighbours never run into each other.
    step_x = max([w, *(math.ceil(box[2] - box[0]) + gap for box in heads)]) + gap
    step_y = max([h, *(math.ceil(box[3] - box[1]) + gap for box in boxes)]) + gap
    picture = Image.new("RGB", (left + columns * step_x + gap, top + rows * step_y + gap), PAPER)
    pen = ImageDraw.Draw(picture)
    # The anchor "mm" centres on the font's own middle, so labels with and without descenders line up.
    for j, text in enumerate(above):
        middle = (left + gap + j * step_x + (step_x - gap) / 2, (top + gap) / 2)
        pen.text(middle, text, INK, font, "mm", align="center")
    for i, text in enumerate(beside):
        middle = (left - gap / 2, top + gap + i * step_y + (step_y - gap) / 2)
        pen.text(middle, text, INK, font, "rm", align="right")
    for index in range(n):
        i, j = divmod(index, columns)
        cell = _picture(images[index]).convert("RGB").resize((w, h), Image.Resampling.NEAREST)
        x = left + gap + j * step_x + (step_x - gap - w) // 2
        y = top + gap + i * step_y + (step_y - gap - h) // 2
        picture.paste(cell, (x, y))
    return picture


def save_png(path: str | os.PathLike, image) -> None:
    """Writes a PIL picture, one image (C, H, W), or a batch (N, C, H, W) tiled about square, as PNG.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     save_png(os.path.join(tmp, "a.png"), torch.zeros(4, 3, 8, 8))
    ...     os.listdir(tmp)
    ['a.png']
    """
    if not hasattr(image, "save"):
        image = torch.as_tensor(image)
        image = _picture(_batch(image[None], "image")[0] if image.ndim == 3 else tile(image))
    with written_aside(path) as aside:
        image.save(aside, format="PNG")


def save_npz(path: str | os.PathLike, images, labels=None) -> None:
    """Writes images (N, C, H, W) as `arr_0`, uint8 (N, H, W, C), and labels (N,), if any, as `arr_1`.

    That is the layout which the common FID tools read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     save_npz(os.path.join(tmp, "a.npz"), torch.ones(4, 1, 8, 8))
    ...     np.load(os.path.join(tmp, "a.npz"))["arr_0"].shape
    (4, 8, 8, 1)
    """
    arrays = {"arr_0": np.ascontiguousarray(_batch(images, "images").permute(0, 2, 3, 1).numpy())}
    if labels is not None:
        arrays["arr_1"] = torch.as_tensor(labels).detach().cpu().numpy()
        if arrays["arr_1"].shape != arrays["arr_0"].shape[:1]:
            raise ValueError(f"labels has shape {arrays['arr_1'].shape}; expected ({len(arrays['arr_0'])},)")
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def save_folder(path: str | os.PathLike, images) -> None:
    """Writes images (N, C, H, W) as 000000.png, 000001.png, ... into a new folder; whole or not at all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     save_folder(os.path.join(tmp, "samples"), torch.zeros(2, 1, 8, 8))
    ...     sorted(os.listdir(os.path.join(tmp, "samples")))
    ['000000.png', '000001.png']
    """
    images = _batch(images, "images")
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise FileExistsError(f"path {os.fspath(path)!r} exists; expected a new or an empty folder")
    digits = max(6, len(str(len(images) - 1)))
    with written_aside(path) as aside:
        aside.mkdir()
        for index, image in enumerate(images):
            _picture(image).save(aside / f"{index:0{digits}d}.png")


def _batch(images, name: str) -> torch.Tensor:
    """(N, C, H, W) in bytes on the CPU, N >= 1, C of 1 or 3."""
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name} has shape {tuple(images.shape)}; expected (N, C, H, W), C 1 or 3")
    return to_uint8(images).cpu()


def _picture(image: torch.Tensor) -> Image.Image:
    from PIL import Image

    array = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _labels(labels: Sequence[str] | None, name: str, count: int) -> list[str]:
    if labels is None:
        return []
    if isinstance(labels, str) or len(labels) != count:
        raise ValueError(f"{name} is {labels!r}; expected {count} labels")
    return [str(label) for label in labels]
