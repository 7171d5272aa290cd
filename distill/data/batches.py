"""What training sees of data: a real batch, its conditions, and the null condition, for given random numbers.

``data.path`` says where from:

    digits                          8x8, ten classes, inside scikit-learn
    mixture                         25 Gaussians in the plane, exact
    labels                          conditions alone, classes drawn uniformly: for methods that need no data
    images.npz                      arrays of images, or of latents, and labels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...models.denoiser import Denoiser
from ...models.image_data import image_batches
from ..draws import Draws
from ..players import Batch
from .mixture import mixture
from .source import Items, Source, of_items


@dataclass
class DataRecipe:
    """Where samples come from (``path``, see the module) and what is done to them.

    ``flip``: mirror half of them; ``crop``: a square of so many pixels at a random place of each.
    """

    path: str = "digits"
    flip: bool = False
    crop: int | None = None


class Data(NamedTuple):
    """``real(draws)`` -> (samples or None, cond); ``null(cond)`` -> its null, or None."""

    shape: tuple[int, ...]
    real: Callable[[Draws], tuple[torch.Tensor | None, dict[str, Any]]]
    null: Callable[[dict[str, Any]], dict[str, Any] | None]

    def batch(self, draws: Draws) -> Batch:
        """The batch of a turn."""
        real, cond = self.real(draws)
        return Batch(draws, self.shape, cond, self.null(cond), real)


def open_source(recipe: DataRecipe) -> Source:
    """The source that a recipe names, before any teacher is asked."""
    if recipe.path == "mixture":
        return mixture()
    return of_items(_in_memory(recipe.path), recipe.crop, recipe.flip)


def open_data(recipe: DataRecipe, teacher: Denoiser, source: Source | None = None) -> Data:
    """The data of a recipe, in the form that the teacher takes; ``source``: what it names, if it is open already."""
    null_label = getattr(teacher.net, "null_label", None)

    def null(cond: dict[str, Any]) -> dict[str, Any] | None:
        if null_label is None or "label" not in cond:
            return None
        return {"label": torch.full_like(cond["label"], null_label)}

    if recipe.path == "labels":
        if teacher.shape is None:
            raise ValueError("data.path = labels needs a teacher that knows its shape")

        def conditions(draws: Draws):
            if null_label is None:
                return None, {}
            return None, {"label": (draws.uniform("data") * null_label).long()}

        return Data(teacher.shape, conditions, null)
    source = open_source(recipe) if source is None else source
    _check(source, teacher, null_label)

    def real(draws: Draws):
        x, labels = source.read(draws)
        x = as_float(x.to(draws.device, non_blocking=True))
        return x, {} if null_label is None else {"label": labels.to(draws.device, non_blocking=True)}

    return Data(source.shape, real, null)


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


def _in_memory(path: str) -> Items:
    parts = list(image_batches(path))
    if not parts:
        raise ValueError(f"data.path = {path} holds no images")
    images = torch.cat([x for x, _ in parts])
    labels = None if parts[0][1] is None else torch.cat([label for _, label in parts])
    return Items(Path(path).name, len(images), tuple(images.shape[1:]), lambda rows: images[rows], labels)
