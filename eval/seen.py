"""What a network sees in images: features and moments of a source, over all ranks; statistics of a reference.

>>> from .features import extractor
>>> ours = see("digits:held_out", extractor("digits"))
>>> ours.stats.n, ours.features.shape, ours.logits.shape, ours.protocol.rounding
(360, torch.Size([360, 64]), torch.Size([360, 10]), 'nearest')
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from .checks import whole_number
from .features import Extractor
from .moments import Stats, over_ranks, stream_stats
from .protocol import Protocol, replace
from .ranks import ALONE, Ranks, gather_rows, share
from .sources import batches, open_images
from .statistics_files import Statistics, read_statistics

FEW = 4096  # features of so few images are kept whether a metric needs them or not


class Seen(NamedTuple):
    """What a network saw in images: moments; where kept, features (N, D), logits (N, K) and labels (N,); the protocol;
    and the images that could not be read and were left out, by name."""

    stats: Stats
    features: torch.Tensor | None
    logits: torch.Tensor | None
    labels: torch.Tensor | None
    protocol: Protocol
    skipped: tuple[str, ...] = ()


def see(
    source,
    extractor: Extractor,
    num: int | None = None,
    keep: bool = False,
    batch: int = 64,
    skip_bad: bool = False,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> Seen:
    """Features of a source (``open_images``): each rank reads its share of batches, and has the sums and rows of all.

    num: the first so many images, None for all. keep: keep features and logits, as all metrics but "fd" need; of few
    images they are kept anyway.
    """
    images = open_images(source)
    batch = whole_number(batch, "batch")
    count = images.count if num is None else whole_number(num, "num")
    if count > images.count:
        raise ValueError(f"num is {count}; expected at most {images.count}, the images of {images.name}")
    if count < 2:
        raise ValueError(f"{images.name} has {count} image; a distribution needs at least 2")
    keep = keep or count <= FEW
    values: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    rows: list[int] = []
    shapes: set[tuple[int, ...]] = set()

    def features() -> Iterator[torch.Tensor]:
        # Whole batches are shared out, since a network's float32 rounds differently in batches of another size.
        runs = share(math.ceil(count / batch), ranks)
        mine = range(runs.start * batch, min(runs.stop * batch, count))
        with _bar(len(mine), progress and ranks.first) as bar:
            for images_here, rows_here in batches(images, mine, batch, skip_bad):
                seen = extractor(images_here)
                shapes.add(tuple(images_here.shape[1:]))
                rows.extend(rows_here)
                if keep:
                    values.append(seen.values.cpu())
                    if seen.logits is not None:
                        logits.append(seen.logits.cpu())
                bar.update(len(rows_here))
                yield seen.values

    stats, failure = Stats(), None
    try:
        stats = stream_stats(features())
    except ValueError as error:
        failure = str(error)
    everyone = _told((failure, rows, shapes), ranks)
    if failures := [told[0] for told in everyone if told[0]]:
        raise ValueError(failures[0])
    if len(sizes := set().union(*(told[2] for told in everyone))) > 1:
        raise ValueError(f"images of {images.name} have shapes {sorted(sizes)}; expected one size")
    all_rows = [row for told in everyone for row in told[1]]
    if len(all_rows) < 2:
        raise ValueError(
            f"{len(all_rows)} of {count} images of {images.name} could be read; expected at least 2"
        )
    left_out = sorted(set(range(count)) - set(all_rows))
    whole_values = (
        gather_rows(torch.cat(values).to(ranks.device) if values else None, ranks) if keep else None
    )
    whole_logits = (
        gather_rows(torch.cat(logits).to(ranks.device) if logits else None, ranks) if keep else None
    )
    labels = None if images.labels is None else images.labels[torch.tensor(all_rows)]
    protocol = replace(extractor.protocol, rounding=images.rounding, num=len(all_rows), seeds=images.seeds)
    skipped = tuple(images.called(row) for row in left_out)
    return Seen(over_ranks(stats, ranks), whole_values, whole_logits, labels, protocol, skipped)


def reference_of(
    source,
    extractor: Extractor,
    keep: bool = False,
    batch: int = 64,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> Statistics:
    """Statistics from a file of them, or made of images here and now."""
    if isinstance(source, Statistics):
        return source
    if is_statistics(source):
        return read_statistics(source, extractor.name)
    images = open_images(source)
    seen = see(images, extractor, None, keep, batch, False, ranks, progress)
    return Statistics(seen.stats.finish(), seen.protocol, seen.features, seen.labels, images.name)


def is_statistics(source) -> bool:
    """Whether a path is a file of statistics rather than of images."""
    if not isinstance(source, (str, os.PathLike)) or not Path(source).is_file():
        return False
    if Path(source).suffix == ".pkl":
        return True
    if Path(source).suffix != ".npz":
        return False
    try:
        with np.load(source, allow_pickle=False) as file:
            return bool({"mu", "sigma", "feats"} & set(file.files))
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(source)} cannot be read as .npz: {error}") from error


def _told(what, ranks: Ranks) -> list:
    """What each rank has to say."""
    told = [what] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(told, what)
    return told


def _bar(total: int, shown: bool):
    from tqdm.auto import tqdm

    # Even one that is not shown starts a thread.
    return tqdm(total=total, unit="image", disable=None, leave=False) if shown else _NoBar()


class _NoBar(nullcontext):
    def __enter__(self):
        return self

    def update(self, count: int) -> None:
        """Nothing to show."""
