"""A folder or a zip of pictures, labelled by EDM's ``dataset.json`` or by the folders that they lie in, or not at all.

    pictures/dataset.json            {"labels": [["00000/img00000000.png", 6], ...]}, or {"labels": null}
    pictures/00000/img00000000.png

    pictures/cat/1.jpg               classes are the folders' names in order: cat 0, dog 1
    pictures/dog/2.jpg

A leading folder that all share, as zips often have one, is no class.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from ...models.image_data import SUFFIXES
from .pictures import pictures
from .source import Items

INDEX = "dataset.json"


class Files(NamedTuple):
    """Names with forward slashes, and how one is read."""

    names: list[str]
    read: Callable[[str], bytes]


def folder(path: Path, size: int | None = None) -> Items:
    """The pictures of a folder or a .zip, in the order of their names."""
    files = _zipped(path) if path.suffix == ".zip" else _lying(path)
    names = [n for n in files.names if PurePosixPath(n).suffix.lower() in SUFFIXES]
    if not names:
        raise ValueError(f"data.path = {path} holds no pictures ({', '.join(SUFFIXES)})")
    parents = {PurePosixPath(n).parts[:-1] for n in names}
    shared = _shared(list(parents))
    index = next((n for n in (INDEX, "/".join([*shared, INDEX])) if n in files.names), None)
    if index is not None:
        labels, classes = listed(files.read(index), index, names, path), None
    else:
        labels, classes = by_folder([PurePosixPath(n).parts[len(shared) :] for n in names], path)
    return pictures(
        str(path), len(names), lambda row: (files.read(names[row]), f"{path}: {names[row]}"), labels, classes, size
    )  # fmt: skip


def listed(content: bytes, index: str, names: Sequence[str], path: Path) -> torch.Tensor | None:
    """The labels (N,) that a ``dataset.json`` gives the pictures, None where it gives none."""
    try:
        pairs = json.loads(content)["labels"]
        if not pairs:
            return None
        inside = PurePosixPath(index).parent
        given = {str(inside / str(name).replace("\\", "/")): label for name, label in pairs}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: {index} must be {{"labels": [["name.png", 0], ...]}} or {{"labels": null}} ({error!r})'
        ) from error
    for name in names:
        if name not in given:
            raise ValueError(f"{path}: {index} has no label for {name}")
    if missing := given.keys() - set(names):
        raise ValueError(f"{path}: {index} labels {min(missing)}, which is not there")
    for name, label in given.items():
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f"{path}: labels must be integers from 0 on, {index} has {label!r} for {name}")
    return torch.tensor([given[name] for name in names])


def by_folder(parts: Sequence[tuple[str, ...]], path: Path) -> tuple[torch.Tensor | None, int | None]:
    """Labels by the first folder of each path, and how many there are; None where pictures lie in no folders."""
    deep = [len(p) > 1 for p in parts]
    if not any(deep):
        return None, None
    if not all(deep):
        loose = "/".join(parts[deep.index(False)])
        raise ValueError(
            f"{path} has pictures in folders, which would be their classes, and {loose} in none: put it into one, or "
            f"give all of them labels by a {INDEX}"
        )
    classes = sorted({p[0] for p in parts})
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number[p[0]] for p in parts]), len(classes)


def _shared(parents: list[tuple[str, ...]]) -> tuple[str, ...]:
    shared = parents[0]
    for parts in parents[1:]:
        same = [a == b for a, b in zip(shared, parts, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return shared


def _lying(path: Path) -> Files:
    found = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
    names = sorted(p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts))
    return Files(names, lambda name: (path / name).read_bytes())


def _zipped(path: Path) -> Files:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"data.path = {path} is not a zip that can be read: {error}") from error

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path}: {name} is damaged: {error}") from error

    names = [n for n in archive.namelist() if not n.endswith("/")]
    return Files(
        sorted(n for n in names if not any(p.startswith((".", "__MACOSX")) for p in n.split("/"))), read
    )
