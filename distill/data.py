"""What a distillation sees of data: a real batch, its conditions, and the null condition, for given random numbers.

``digits`` (8x8, ten classes), ``mixture`` (a 2-D mixture of 25 Gaussians, exact), ``labels`` (conditions alone: classes
drawn uniformly, for methods that need no data), or a path: a folder or .npz of images. Everything is drawn by the
turn's ``Draws``, so there is no position to save: a resumed run sees what the unbroken one would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..models.denoiser import Denoiser
from ..models.image_data import image_batches
from ..models.mixture import GaussianMixture
from .draws import Draws
from .players import Batch


@dataclass
class DataRecipe:
    """``path``: digits, mixture, labels, or images on disk; ``flip``: mirror images half of the time."""

    path: str = "digits"
    flip: bool = False


class Data(NamedTuple):
    """``real(draws)`` -> (samples or None, cond); ``null(cond)`` -> its null, or None."""

    shape: tuple[int, ...]
    real: Callable[[Draws], tuple[torch.Tensor | None, dict[str, Any]]]
    null: Callable[[dict[str, Any]], dict[str, Any] | None]

    def batch(self, draws: Draws) -> Batch:
        """The batch of a turn."""
        real, cond = self.real(draws)
        return Batch(draws, self.shape, cond, self.null(cond), real)


def open_data(recipe: DataRecipe, teacher: Denoiser) -> Data:
    """The data of a recipe, in the form that the teacher takes."""
    null_label = getattr(teacher.net, "null_label", None)

    def null(cond: dict[str, Any]) -> dict[str, Any] | None:
        if null_label is None or "label" not in cond:
            return None
        return {"label": torch.full_like(cond["label"], null_label)}

    if recipe.path == "mixture":
        return Data((2,), lambda draws: (mixture_samples(draws), {}), null)
    if recipe.path == "labels":
        if teacher.shape is None:
            raise ValueError("data.path = labels needs a teacher that knows its shape")

        def conditions(draws: Draws):
            if null_label is None:
                return None, {}
            return None, {"label": (draws.uniform("data") * null_label).long()}

        return Data(teacher.shape, conditions, null)
    images, labels = _images(recipe.path)
    if teacher.shape is not None and tuple(images.shape[1:]) != teacher.shape:
        raise ValueError(
            f"data.path = {recipe.path} holds images of shape {tuple(images.shape[1:])}, and the teacher makes "
            f"{teacher.shape}"
        )
    if null_label is not None and labels is None:
        raise ValueError(
            f"data.path = {recipe.path} has no labels, and the teacher knows {null_label} classes"
        )

    def real(draws: Draws):
        rows = (draws.uniform("data") * len(images)).long().cpu()
        x = images[rows]
        if recipe.flip:
            mirrored = draws.uniform("null").cpu() < 0.5
            x = torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(-1), x)
        cond = {} if null_label is None else {"label": labels[rows].to(draws.device)}
        return x.to(draws.device), cond

    return Data(tuple(images.shape[1:]), real, null)


def _images(path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    parts = list(image_batches(path))
    if not parts:
        raise ValueError(f"data.path = {path} holds no images")
    labels = None if parts[0][1] is None else torch.cat([label for _, label in parts])
    return torch.cat([x for x, _ in parts]), labels


SIDE, SPACING, STD = 5, 1.0, 0.05


def grid_means() -> torch.Tensor:
    """The 25 places of the mixture's modes, (25, 2), on a square grid about 0."""
    places = (torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2) * SPACING
    return torch.cartesian_prod(places, places)


def grid_mixture() -> GaussianMixture:
    """Equal Gaussians at ``grid_means``: modes to find or to lose, with exact scores on every path."""
    return GaussianMixture([1 / SIDE**2] * SIDE**2, grid_means(), STD**2)


def mixture_samples(draws: Draws) -> torch.Tensor:
    """Samples (B, 2) of the mixture from the turn's random numbers."""
    which = (draws.uniform("data") * SIDE**2).long()
    return (grid_means().to(draws.device)[which] + STD * draws.normal("user", (2,))).float()
