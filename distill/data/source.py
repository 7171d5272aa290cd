"""A source: what the samples of a turn are, given the turn's random numbers and nothing else.

Which item a sample takes follows from (seed, turn, place in the global batch), so nothing about a run's data needs
saving: a resumed run sees what the unbroken one would have, and ranks cut one batch between them.

>>> from fewstep.distill.draws import Draws
>>> bytes_ = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 4, 4)
>>> source = of_items(Items("tens", 10, (3, 4, 4), lambda rows: bytes_[rows], torch.arange(10)))
>>> x, label = source.read(Draws(seed=0, turn=5, first=0, count=64, total=64))
>>> x.dtype, bool((x[:, 0, 0, 0] == label).all()), source.classes
(torch.uint8, True, 10)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..draws import Draws

Read = Callable[[Draws], tuple[torch.Tensor, torch.Tensor | None]]


class Source(NamedTuple):
    """``read(draws)`` -> (samples (B, *shape), labels (B,) or None): bytes 0 .. 255, or floats as networks take them.

    ``slow``: worth reading ahead of time, on threads. ``latents``: where samples are an autoencoder's latents, what is
    known of it (see ``models.latent_codec``).
    """

    name: str
    shape: tuple[int, ...]
    classes: int | None
    read: Read
    slow: bool = False
    latents: dict[str, Any] | None = None


class Items(NamedTuple):
    """``count`` samples that can be got by their row: ``get(rows)`` -> (n, *shape).

    ``mirrored(rows)``: the same, mirrored, where that is not ``flip(-1)``: latents have theirs beside them.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    get: Callable[[torch.Tensor], torch.Tensor]
    labels: torch.Tensor | None = None
    classes: int | None = None
    mirrored: Callable[[torch.Tensor], torch.Tensor] | None = None
    slow: bool = False
    latents: dict[str, Any] | None = None


def of_items(items: Items, crop: int | None = None, flip: bool = False) -> Source:
    """A source that draws items with replacement; ``crop``: a random square of each; ``flip``: half are mirrored."""
    if items.count < 1:
        raise ValueError(f"data.path = {items.name} holds no samples")
    shape = items.shape
    if items.latents is not None and (crop is not None or (flip and items.mirrored is None)):
        raise ValueError(
            f"data.path = {items.name} holds latents: they are not cropped, and mirrored ones must be kept beside them "
            "(fewstep latents --flip)"
        )
    if crop is not None:
        if not 0 < crop <= min(shape[-2:]):
            raise ValueError(
                f"data.crop must lie in 1 .. {min(shape[-2:])}, the size of {items.name}, got {crop}"
            )
        shape = (*shape[:-2], crop, crop)

    def read(draws: Draws) -> tuple[torch.Tensor, torch.Tensor | None]:
        draws = draws._replace(device="cpu")
        rows = (draws.uniform("data") * items.count).long()
        x = _flipped(items, rows, draws.uniform("flip") < 0.5) if flip else items.get(rows)
        if crop is not None:
            x = _cropped(x, crop, draws.uniforms("crop", 2))
        return x, None if items.labels is None else items.labels[rows]

    return Source(items.name, shape, _classes(items), read, items.slow, items.latents)


def _flipped(items: Items, rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    if items.mirrored is None:
        x = items.get(rows)
        return torch.where(which.reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
    parts, order = [], []
    for mask, get in ((which, items.mirrored), (~which, items.get)):
        if mask.any():
            parts.append(get(rows[mask]))
            order.append(mask.nonzero()[:, 0])
    return torch.cat(parts)[torch.cat(order).argsort()]


def _cropped(x: torch.Tensor, side: int, share: torch.Tensor) -> torch.Tensor:
    room = torch.tensor([x.shape[-2] - side + 1, x.shape[-1] - side + 1])
    corners = (share * room).long().tolist()
    return torch.stack([
        one[..., top : top + side, left : left + side] for one, (top, left) in zip(x, corners, strict=True)
    ])  # fmt: skip


def _classes(items: Items) -> int | None:
    if items.labels is None:
        return None
    if len(items.labels) != items.count:
        raise ValueError(f"data.path = {items.name} has {items.count} samples and {len(items.labels)} labels")
    least, most = int(items.labels.min()), int(items.labels.max())
    classes = most + 1 if items.classes is None else items.classes
    if least < 0 or most >= classes:
        raise ValueError(
            f"labels of {items.name} must lie in 0 .. {classes - 1}, got {least if least < 0 else most}"
        )
    return classes
