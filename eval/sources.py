"""Images to be measured, as bytes, from where they lie: a folder, a zip, an .npz, shards, a tensor, the digits.

Nothing is resized or guessed here. All images must be of one size; one that cannot be read is named, and refused unless
the caller says to leave such out, and then they are counted.

>>> images = open_images("digits:held_out")
>>> images.count, images.read(0).shape, images.read(0).dtype
(360, torch.Size([1, 8, 8]), torch.uint8)
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..models.digits import SPLITS, digits
from ..models.image_data import SUFFIXES
from .checks import whole_number
from .images import to_uint8
from .shards import PLAN, read_plan, shard_file

THREADS, AHEAD = 4, 256  # pictures are decoded by so many threads, at most so many before they are wanted
NAMED = 5  # files that an error names before it says how many there are


class Images(NamedTuple):
    """`count` images: read(i) gives the i-th, bytes (C, H, W) of C 1 or 3, or raises ``ValueError`` if it is broken.

    called(i) names it in messages; labels (count,) where there are any. rounding: how values came
    to bytes, None where they came as bytes; seeds: what samples were drawn by, None where that is not known.
    """

    name: str
    count: int
    read: Callable[[int], torch.Tensor]
    called: Callable[[int], str]
    labels: torch.Tensor | None = None
    rounding: str | None = None
    seeds: str | None = None


class Batch(NamedTuple):
    """Bytes (n, C, H, W), and which images of the source they are."""

    images: torch.Tensor
    rows: list[int]


def open_images(source) -> Images:
    """The images of a folder (with its subfolders), a .zip, an .npz, a tensor (N, C, H, W), the digits, or shards.

    .npz: ``arr_0`` or ``images``, bytes (N, H, W, C) or floats (N, C, H, W) in [-1, 1], labels as ``arr_1`` or
    ``labels``. Folders and zips may hold EDM's dataset.json with labels. "digits" is all of them, "digits:train" and
    "digits:held_out" their parts. What is an ``Images`` already is handed through.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, (torch.Tensor, np.ndarray)):
        return from_tensor(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source is a {type(source).__name__}; expected a path, a tensor or 'digits'")
    head, _, split = str(source).partition(":")
    if head == "digits" and not Path(source).exists():
        if (split or "all") not in SPLITS:
            raise ValueError(f"digits come as {', '.join(SPLITS)}, got {split!r}")
        images, labels = digits(split or "all")
        return from_tensor(torch.as_tensor(images), torch.as_tensor(labels), str(source))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: expected a folder, a .zip, an .npz, or digits")
    if path.is_dir():
        return _shards(path) if (path / PLAN).is_file() else _folder(path)
    if path.suffix == ".zip":
        return _zip(path)
    if path.suffix == ".npz":
        return _npz(path)
    raise ValueError(f"source must be a folder, a .zip, an .npz, or digits, got {str(source)!r}")


def from_tensor(images, labels=None, name: str = "tensor") -> Images:
    """Images (N, C, H, W) that are in memory: bytes, or floats in [-1, 1], rounded.

    >>> from_tensor(torch.ones(2, 1, 4, 4)).read(1).max()
    tensor(255, dtype=torch.uint8)
    """
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name} has shape {tuple(images.shape)}; expected (N, C, H, W), C 1 or 3")
    rounding = None if images.dtype == torch.uint8 else "nearest"
    known = None if labels is None else _checked(torch.as_tensor(labels), len(images), name)
    return Images(
        name, len(images), lambda i: to_uint8(images[i]).cpu(), lambda i: f"{name}[{i}]", known, rounding
    )


def batches(images: Images, rows: Sequence[int], size: int, skip_bad: bool = False) -> Iterator[Batch]:
    """The images of `rows`, in order, `size` at once, all of one shape.

    A broken image ends it with an error that names it and counts all that are broken, for which the rest is read
    through; with skip_bad they are left out, and the rows of each batch tell which.
    """
    size = whole_number(size, "size")
    shape: tuple[int, ...] | None = None
    first = ""
    rows = list(rows)
    held: list[torch.Tensor] = []
    kept: list[int] = []
    for place, (row, image) in enumerate(_ahead(images.read, rows)):
        if isinstance(image, ValueError):
            if skip_bad:
                continue
            raise ValueError(_broken(images, row, image, rows[place + 1 :], len(rows))) from image
        if shape is None:
            shape, first = tuple(image.shape), images.called(row)
        if tuple(image.shape) != shape:
            raise ValueError(
                f"{images.called(row)} is {_size(image.shape)} and {first} {_size(shape)}: images of one size are "
                "expected; resize or crop them first, since how that is done changes the number"
            )
        held.append(image)
        kept.append(row)
        if len(held) == size:
            yield Batch(torch.stack(held), kept)
            held, kept = [], []
    if held:
        yield Batch(torch.stack(held), kept)


def _ahead(
    read: Callable[[int], torch.Tensor], rows: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor | ValueError]]:
    """Each row and its image, or what was wrong with it, in order; threads read some ahead of where the network is."""

    def attempt(row: int) -> torch.Tensor | ValueError:
        try:
            return read(row)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[tuple[int, Future]] = deque()
        for row in rows:
            waiting.append((row, pool.submit(attempt, row)))
            if len(waiting) > AHEAD:
                first, image = waiting.popleft()
                yield first, image.result()
        for row, image in waiting:
            yield row, image.result()


def _broken(images: Images, row: int, error: ValueError, rest: Sequence[int], total: int) -> str:
    bad = [row]
    for other in rest:
        try:
            images.read(other)
        except ValueError:
            bad.append(other)
    named = ", ".join(images.called(i) for i in bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
    return (
        f"{len(bad)} of {total} images of {images.name} cannot be read: {named} ({error}); "
        "mend or remove them, or say that they be skipped"
    )


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[2]} of {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def _decode(content: bytes | Path, name: str) -> torch.Tensor:
    """A picture's bytes (C, H, W): one channel where it is grey, else three; what it has of transparency is dropped."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
            array = np.array(picture.convert("L" if picture.mode in ("L", "1") else "RGB"))
    # Broken files raise all of these, depending on where they break.
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: {error}") from error
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _folder(path: Path) -> Images:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    names = [file.relative_to(path).as_posix() for file in files]
    index = path / "dataset.json"
    labels = _edm_labels(index.read_bytes(), names, str(index)) if index.exists() else None
    return Images(
        path.name, len(files), lambda i: _decode(files[i], str(files[i])), lambda i: str(files[i]), labels
    )


def _shards(path: Path) -> Images:
    plan = read_plan(path)
    missing = [k for k in range(plan.shards) if not shard_file(path, k).is_file()]
    if missing:
        raise ValueError(
            f"{path} has {plan.shards - len(missing)} of {plan.shards} shards; make the others first"
        )

    @lru_cache(maxsize=2)
    def held(shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        file = shard_file(path, shard)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays.files else None
        except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{file}: {error}") from error

    def read(i: int) -> torch.Tensor:
        return torch.from_numpy(held(i // plan.per_shard)[0][i % plan.per_shard]).permute(2, 0, 1)

    labels = None if held(0)[1] is None else np.concatenate([held(k)[1] for k in range(plan.shards)])
    return Images(
        path.name,
        plan.num,
        read,
        lambda i: f"{shard_file(path, i // plan.per_shard)}[{i % plan.per_shard}]",
        None if labels is None else torch.from_numpy(labels).long(),
        "nearest",
        f"{plan.told.get('seed', '?')}: 0-{plan.num - 1}",
    )


def _zip(path: Path) -> Images:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip: {error}") from error
    names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES)
    if not names:
        raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    labels = None
    if "dataset.json" in archive.namelist():
        labels = _edm_labels(archive.read("dataset.json"), names, f"{path}/dataset.json")

    def read(i: int) -> torch.Tensor:
        try:
            content = archive.read(names[i])
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}/{names[i]}: {error}") from error
        return _decode(content, f"{path}/{names[i]}")

    return Images(path.name, len(names), read, lambda i: f"{path}/{names[i]}", labels)


def _npz(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as file:
            key = next((name for name in ("arr_0", "images") if name in file.files), None)
            if key is None:
                found = ", ".join(sorted(file.files)) or "nothing"
                raise ValueError(f"it must hold images as arr_0 or images, it has {found}")
            array = file[key]
            labels = next((file[name] for name in ("arr_1", "labels") if name in file.files), None)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if array.ndim != 4 or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(
            f"{key} of {path} must be bytes (N, H, W, C) or floats (N, C, H, W), got {array.dtype} {array.shape}"
        )
    images = torch.from_numpy(array)
    return from_tensor(images.permute(0, 3, 1, 2) if array.dtype == np.uint8 else images, labels, path.name)


def _edm_labels(content: bytes, names: list[str], where: str) -> torch.Tensor | None:
    """The labels of EDM's dataset.json, {"labels": [[name, label], ...]}, in the order of names."""
    try:
        listed = json.loads(content).get("labels")
        if listed is None:
            return None
        known = {name.replace("\\", "/"): label for name, label in listed}
        return _checked(torch.tensor([known[name] for name in names]), len(names), where)
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{where} does not label every picture: {error!r}") from error


def _checked(labels: torch.Tensor, count: int, name: str) -> torch.Tensor:
    if tuple(labels.shape) != (count,) or labels.dtype.is_floating_point:
        raise ValueError(
            f"labels of {name} have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected ({count},) integers"
        )
    return labels.long()
