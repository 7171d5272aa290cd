"""Tar shards as WebDataset writes them, read at random: members that share a name up to its first dot are one sample.

    train-000.tar:   000017.jpg  000017.cls  000018.jpg  000018.json ...     labels: a number, or {"label": a number}

Each shard is walked once; where its samples lie is kept beside it as ``train-000.tar.index.json`` (or in the user's
cache, where that folder cannot be written to). ``path`` is a folder of tars, one tar, or names with ``*`` or
``{000..015}`` in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...models.checkpoint import write_atomically
from ...models.image_data import SUFFIXES
from .pictures import pictures
from .source import Items

FORMAT = 1
BLOCK = 512


class Index(NamedTuple):
    """Where a shard's pictures lie, and their labels (None: it has none)."""

    offsets: list[int]
    sizes: list[int]
    labels: list[int] | None


def is_shards(path: str) -> bool:
    """Whether a data path means tar shards."""
    return path.endswith(".tar") or (os.path.isdir(path) and any(Path(path).glob("*.tar")))


def shards(path: str, size: int | None = None) -> Items:
    """All samples of the shards, in the order of the shards' names."""
    files = expanded(path)
    indices = [indexed(file) for file in files]
    counts = [len(index.offsets) for index in indices]
    with_labels = [file for file, index in zip(files, indices, strict=True) if index.labels is not None]
    if with_labels and len(with_labels) < len(files):
        without = next(file for file in files if file not in with_labels)
        raise ValueError(f"{with_labels[0]} has labels and {without} has none")
    shard = np.repeat(np.arange(len(files)), counts)
    offsets, sizes = (np.concatenate([getattr(i, name) for i in indices]) for name in ("offsets", "sizes"))
    labels = torch.tensor([k for index in indices for k in index.labels or ()]) if with_labels else None

    def read(row: int) -> tuple[bytes, str]:
        file, offset = files[shard[row]], int(offsets[row])
        with open(file, "rb") as tar:
            tar.seek(offset - BLOCK)
            header, content = tar.read(BLOCK), tar.read(int(sizes[row]))
        return content, f"{file}: {_member(header)}"

    return pictures(path, int(sum(counts)), read, labels, size=size)


def expanded(path: str) -> list[Path]:
    """The files of a folder of tars, or of a name with ``*`` or ``{000..015}``.

    >>> [p.name for p in expanded("train-{08..10}.tar")]
    ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    if os.path.isdir(path):
        return sorted(Path(path).glob("*.tar"))
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        low, high = braces.groups()
        numbers = range(int(low), int(high) + 1)
        return [Path(path.replace(braces[0], str(k).zfill(len(low)))) for k in numbers]
    if "*" in path:
        found = sorted(Path(path).parent.glob(Path(path).name))
        if not found:
            raise ValueError(f"data.path = {path} matches no file")
        return found
    return [Path(path)]


def indexed(file: Path) -> Index:
    """The index of a shard: the one kept, or else made now and kept; ValueError where the shard has changed since."""
    if not file.is_file():
        raise ValueError(f"data.path names {file}, which is not there")
    kept = next((place for place in _places(file) if place.is_file()), None)
    if kept is not None:
        try:
            found = json.loads(kept.read_text())
            index = Index(found["offsets"], found["sizes"], found["labels"])
            if found["format"] == FORMAT and found["stamp"] == _stamp(file, index.offsets):
                return index
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{kept} is not an index of shards ({error!r}): remove it, and it is made anew"
            ) from error
        raise ValueError(f"{file} has changed since its index was made: remove {kept}, and it is made anew")
    index = walked(file)
    content = json.dumps({"format": FORMAT, "stamp": _stamp(file, index.offsets), **index._asdict()})
    for place in _places(file):
        try:
            write_atomically(place, content)
            break
        except OSError:  # a folder that is not ours to write to
            continue
    return index


def walked(file: Path) -> Index:
    """Read a shard from end to end for where its samples lie."""
    samples: dict[str, dict[str, Any]] = {}
    length = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > length:
                    raise ValueError(f"{file} ends within {member.name}: it is cut short")
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}", {})
                if f".{ending.lower()}" in SUFFIXES:
                    sample["place"] = (member.offset_data, member.size)
                elif ending.lower() in ("cls", "json"):
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    sample["label"] = _label(content, ending.lower(), f"{file}: {member.name}")
    except tarfile.TarError as error:
        raise ValueError(f"{file} is not a tar that can be read without unpacking it: {error}") from error
    for key, sample in samples.items():
        if "place" not in sample:
            raise ValueError(f"{file}: sample {key.lstrip('/')} has no picture ({', '.join(SUFFIXES)})")
    labels = [sample.get("label") for sample in samples.values()]
    if all(label is None for label in labels):
        labels = None
    elif None in labels:
        raise ValueError(
            f"{file}: sample {[*samples][labels.index(None)].lstrip('/')} has no label, and others have"
        )
    places = [sample["place"] for sample in samples.values()]
    return Index([p[0] for p in places], [p[1] for p in places], labels)  # type: ignore[arg-type]


def _label(content: bytes, kind: str, name: str) -> int | None:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} must hold {'a number' if kind == 'cls' else 'JSON'}: {error}") from error
    label = found.get("label") if kind == "json" and isinstance(found, dict) else found
    if label is None and kind == "json":  # metadata without a label
        return None
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ValueError(f"{name} must hold a label, an integer from 0 on, got {label!r}")
    return label


def _stamp(file: Path, offsets: list[int]) -> str:
    """The file's length and the headers of its first and last picture, which have names, sizes and dates in them."""
    total = hashlib.sha256(str(file.stat().st_size).encode())
    with open(file, "rb") as tar:
        for offset in offsets[:1] + offsets[-1:]:
            tar.seek(offset - BLOCK)
            total.update(tar.read(BLOCK))
    return total.hexdigest()


def _places(file: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "shards"
    key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    return [file.with_name(f"{file.name}.index.json"), cache / f"{file.stem}-{key}.index.json"]


def _member(header: bytes) -> str:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.TarError:
        return "a member that is not where the index says"
