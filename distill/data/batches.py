"""What training sees of data: a real batch, its conditions, and the null condition, for given random numbers.

``data.path`` says where from:

    digits                          8x8, ten classes, inside scikit-learn
    mixture                         25 Gaussians in the plane, exact
    labels                          conditions alone, classes drawn uniformly: for methods that need no data
    unconditional                   the null condition alone, of a teacher of classes
    glyphs, glyphs:0123456789       letters of many fonts, 32x32 in colour, drawn without end
    folder or .zip of pictures      classes by EDM's dataset.json, or by folders
    folder of tars, a-{00..63}.tar  shards as WebDataset writes them
    torchvision:CIFAR10             with data.root; fetched only where data.download=true
    images.npz                      arrays of images and labels
    latents.safetensors             what ``fewstep latents`` made of any of these
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...models.denoiser import Denoiser
from ...models.image_data import image_batches
from ...models.latent_codec import LatentCodec
from ..draws import Draws
from ..players import Batch
from .ahead import ReadAhead
from .folder import folder
from .glyphs import PREFIX, glyphs
from .latents import encoded, latents
from .mixture import mixture
from .shards import is_shards, shards
from .source import Items, Source, of_items
from .vision import vision

NAMES = ("digits", "mixture", "labels", "unconditional", "glyphs")


@dataclass
class DataRecipe:
    """Where samples come from (``path``, see the module) and what is done to them.

    ``size``: pictures are scaled and cut to squares of so many pixels; ``crop``: then to a square at a random place of
    each; ``flip``: half of them are mirrored. ``labels`` false: none are used. ``root`` and ``download`` are
    torchvision's. ``ahead``: batches that are read before they are asked for, each on a thread.
    """

    path: str = "digits"
    size: int | None = None
    crop: int | None = None
    flip: bool = False
    labels: bool = True
    root: str = "data"
    download: bool = False
    ahead: int = 4


class Data(NamedTuple):
    """``real(draws)`` -> (samples or None, cond); ``null(cond)`` -> its null, or None.

    ``cond(labels, device)`` is the condition of given ``labels``: classes, or the numbers of prompts.
    """

    shape: tuple[int, ...]
    real: Callable[[Draws], tuple[torch.Tensor | None, dict[str, Any]]]
    null: Callable[[dict[str, Any]], dict[str, Any] | None]
    cond: Callable[[torch.Tensor, Any], dict[str, Any]] = lambda labels, device: {}
    labels: range = range(1)

    def batch(self, draws: Draws) -> Batch:
        """The batch of a turn."""
        real, cond = self.real(draws)
        return Batch(draws, self.shape, cond, self.null(cond), real)


def open_source(recipe: DataRecipe, codec: LatentCodec | None = None) -> Source:
    """The source that a recipe names, before any teacher is asked; ``codec``: pictures are encoded by it on the way."""
    path = os.path.expanduser(recipe.path)
    endless = path == "mixture" or path.partition(":")[0] == PREFIX
    if endless and (recipe.size or recipe.crop or recipe.flip):
        raise ValueError(f"data.size, data.crop and data.flip are for pictures on disk, not for {path}")
    if endless:
        source = mixture() if path == "mixture" else glyphs(path)
    else:
        items = open_items(recipe)
        if codec is not None and items.latents is None:
            items = encoded(items, codec)
        source = of_items(items, recipe.crop, recipe.flip)
    if source.slow and recipe.ahead:
        source = source._replace(read=ReadAhead(source.read, recipe.ahead))
    if not recipe.labels:
        read = source.read
        source = source._replace(classes=None, read=lambda draws: (read(draws)[0], None))
    return source


def open_items(recipe: DataRecipe) -> Items:
    """The items on disk that a recipe names, uncropped and unflipped."""
    path = os.path.expanduser(recipe.path)
    there = os.path.exists(path)
    if path.startswith("torchvision:"):
        return vision(path, os.path.expanduser(recipe.root), recipe.download, recipe.size)
    if is_shards(path):
        return shards(path, recipe.size)
    if os.path.isdir(path) or (there and path.endswith(".zip")):
        return folder(Path(path), recipe.size)
    if recipe.size is not None:
        raise ValueError(f"data.size is for pictures on disk, not for {path}")
    if there and path.endswith(".safetensors"):
        return latents(Path(path))
    if path == "digits" or (there and path.endswith(".npz")):
        return _arrays(path)
    raise ValueError(
        f"data.path must be {', '.join(NAMES)}, torchvision:NAME, a folder or .zip of pictures, tar shards, an .npz, "
        f"or latents (.safetensors); got {recipe.path!r}, which is {'none of these' if there else 'not there'}"
    )


def open_data(recipe: DataRecipe, teacher: Denoiser, source: Source | None = None) -> Data:
    """The data of a recipe, in the form that the teacher takes; ``source``: what it names, if it is open already."""
    null_label = _null_label(teacher)

    def null(cond: dict[str, Any]) -> dict[str, Any] | None:
        if null_label is None or "label" not in cond:
            return None
        return {"label": torch.full_like(cond["label"], null_label)}

    def cond(labels: torch.Tensor, device: Any) -> dict[str, Any]:
        return {} if null_label is None else {"label": labels.to(device)}

    if recipe.path in ("labels", "unconditional"):
        if teacher.shape is None:
            raise ValueError(f"data.path = {recipe.path} needs a teacher that knows its shape")

        def conditions(draws: Draws):
            if null_label is None:
                return None, {}
            if recipe.path == "unconditional":
                return None, {"label": torch.full((draws.count,), null_label, device=draws.device)}
            return None, {"label": (draws.uniform("data") * null_label).long()}

        alone = recipe.path == "unconditional" and null_label is not None
        known = range(null_label, null_label + 1) if alone else range(null_label or 1)
        return Data(teacher.shape, conditions, null, cond, known)
    codec = teacher.codec if isinstance(getattr(teacher, "codec", None), LatentCodec) else None
    source = open_source(recipe, codec) if source is None else source
    _check(source, teacher, null_label)
    if codec is not None and source.latents and source.latents["sha256"] != codec.about["sha256"]:
        raise ValueError(
            f"data.path = {source.name} holds latents of the autoencoder {source.latents['name']!r}, and the teacher "
            f"was trained in those of {codec.about['name']!r}: the hashes of their weights differ"
        )

    def real(draws: Draws):
        x, labels = source.read(draws)
        x = as_float(x.to(draws.device, non_blocking=True))
        return x, {} if null_label is None else {"label": labels.to(draws.device, non_blocking=True)}

    return Data(source.shape, real, null, cond, range(null_label or 1))


def _null_label(teacher: Denoiser) -> int | None:
    """The label that stands for no class: the number of classes, of networks of ours and of DiT's pipeline."""
    null = getattr(teacher.codec, "null", None) or {}
    return null.get("label", getattr(teacher.net, "null_label", None))


def as_float(x: torch.Tensor) -> torch.Tensor:
    """Bytes as float32 in [-1, 1]; floats as they are, in float32."""
    return x.float() if x.is_floating_point() else x.float() / 127.5 - 1.0


def _check(source: Source, teacher: Denoiser, null_label: int | None) -> None:
    if teacher.shape is not None and source.shape != teacher.shape:
        raise ValueError(
            f"data.path = {source.name} holds samples of shape {source.shape}, and the teacher makes {teacher.shape}"
        )
    if null_label is None:
        return
    if source.classes is None:
        raise ValueError(
            f"data.path = {source.name} has no labels, and the teacher knows {null_label} classes"
        )
    if source.classes > null_label:
        raise ValueError(
            f"data.path = {source.name} has labels up to {source.classes - 1}, and the teacher knows {null_label} "
            f"classes: 0 .. {null_label - 1}"
        )


def _arrays(path: str) -> Items:
    parts = list(image_batches(path))
    if not parts:
        raise ValueError(f"data.path = {path} holds no images")
    images = torch.cat([x for x, _ in parts])
    labels = None if parts[0][1] is None else torch.cat([label for _, label in parts])
    return Items(Path(path).name, len(images), tuple(images.shape[1:]), lambda rows: images[rows], labels)
