"""Many samples of a model, made once, by as many processes as there are, and only what is missing of them.

A sample depends on its number alone, so killed and started again, on one rank or on eight, the same bytes come about:
batches are cut within a shard, always at the same places, since a network rounds by the size of its batch.

>>> import tempfile
>>> def make(ids): return (ids[:, None, None, None] % 2).expand(-1, 1, 4, 4) * 2.0 - 1, ids % 10
>>> with tempfile.TemporaryDirectory() as tmp:
...     images = generate(make, tmp, 25, {"model": "stripes"}, per_shard=10, batch=4)
...     images.count, images.read(13).unique().item(), images.labels[-1].item()
(25, 255, 4)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .checks import whole_number
from .images import to_uint8
from .ranks import ALONE, Ranks
from .shards import claim, shard_file, whole, write_shard
from .sources import Images, open_images

# Images (n, C, H, W), floats in [-1, 1], and labels (n,) or None, of the samples with these numbers (n,).
Make = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def generate(
    make: Make,
    folder: str | os.PathLike,
    num: int,
    told: Mapping[str, Any],
    *,
    per_shard: int = 500,
    batch: int = 64,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> Images:
    """``num`` samples in ``folder``, those that were there kept, as images to be measured; they lie as ``shards`` says.

    told: all that decides the samples' bytes, in plain words and numbers; a folder of others is refused. Shards that
    are not what their checksum says are made anew.
    """
    batch = whole_number(batch, "batch")
    told = {**told, "batch": batch}  # it decides how a network rounds
    failure, plan = None, None
    try:
        if ranks.first:
            plan = claim(folder, told, num, per_shard)
            for left in Path(folder).glob(".*.npz*"):  # what a kill left half-written, aside
                left.unlink()
    except ValueError as error:
        failure = str(error)
    plan, failure = _from_first((plan, failure), ranks)
    if plan is None:
        raise ValueError(failure)
    mine = [k for k in range(plan.shards) if k % ranks.world == ranks.rank and not whole(folder, plan, k)]
    todo = sum(len(plan.ids(k)) for k in mine)
    with _bar(todo, progress and ranks.first, ranks.world) as bar:
        for shard in mine:
            images, labels = [], []
            ids = plan.ids(shard)
            for first in range(ids.start, ids.stop, batch):
                now = torch.arange(first, min(first + batch, ids.stop))
                made, label = make(now.to(ranks.device))
                images.append(_bytes(made, now))
                labels.append(label)
                bar.update(len(now))
            known = None if labels[0] is None else torch.cat([torch.as_tensor(k).cpu() for k in labels])
            write_shard(shard_file(folder, shard), torch.cat(images), known)
    ranks.wait()
    return open_images(folder)


def _bytes(made: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if made.ndim != 4 or len(made) != len(ids) or made.shape[1] not in (1, 3):
        raise ValueError(
            f"make gave {tuple(made.shape)} for {len(ids)} samples; expected ({len(ids)}, C, H, W), C 1 or 3"
        )
    try:
        return to_uint8(made).cpu()
    except ValueError as error:
        raise ValueError(f"samples {int(ids[0])} to {int(ids[-1])}: {error}") from error


def _from_first(what: Any, ranks: Ranks) -> Any:
    """What the first rank has, on all."""
    if ranks.world == 1:
        return what
    held = [what]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _bar(total: int, shown: bool, world: int):
    from tqdm.auto import tqdm

    name = "" if world == 1 else f"rank 0 of {world}"
    return tqdm(total=total, unit="image", desc=name, disable=not shown or total == 0, file=sys.stderr)
