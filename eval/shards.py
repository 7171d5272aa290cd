"""Samples in shards of bytes, each with its checksum: what was made stays made, and what is broken is seen.

    folder/plan.json          what the samples are, how many, how many a shard
    folder/00000.npz          arr_0 (n, H, W, C) bytes, arr_1 (n,) labels if there are any: the layout of ADM's batches
    folder/00000.npz.sha256   as sha256sum writes it; ``sha256sum -c *.sha256`` checks all

A shard appears whole, after its checksum, so a shard that is there was finished. The same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .checks import whole_number
from .files import written_aside

PLAN = "plan.json"
VERSION = 1


class Plan(NamedTuple):
    """``num`` samples, and what decides their bytes, ``told`` in plain words and numbers (model, solver, seed, ..)."""

    told: dict[str, Any]
    num: int
    per_shard: int

    @property
    def shards(self) -> int:
        """How many files hold them."""
        return math.ceil(self.num / self.per_shard)

    def ids(self, shard: int) -> range:
        """Which samples a shard holds."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.num))


def claim(folder: str | os.PathLike, told: Mapping[str, Any], num: int, per_shard: int = 500) -> Plan:
    """The plan of a folder, written where there is none; ``ValueError`` where it holds other samples.

    More samples of the same kind may be asked for than are there: a last shard that is too short is then made anew.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     plan = claim(tmp, {"model": "digits", "seed": 0}, 1200)
    ...     claim(tmp, {"model": "digits", "seed": 1}, 1200)
    Traceback (most recent call last):
    ValueError: ... holds other samples: seed is 0 there and 1 here; give another folder
    """
    folder = Path(folder)
    plan = Plan(json.loads(json.dumps(told)), whole_number(num, "num"), whole_number(per_shard, "per_shard"))
    file = folder / PLAN
    if file.is_file():
        there = read_plan(folder)
        differ = [
            f"{key} is {there.told.get(key)!r} there and {plan.told.get(key)!r} here"
            for key in sorted(there.told.keys() | plan.told.keys())
            if there.told.get(key) != plan.told.get(key)
        ]
        if there.per_shard != plan.per_shard:
            differ.append(f"per_shard is {there.per_shard} there and {plan.per_shard} here")
        if differ:
            raise ValueError(f"{folder} holds other samples: {'; '.join(differ)}; give another folder")
        if there.num >= plan.num:
            return plan._replace(num=there.num)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty, and has no {PLAN}: expected a new folder, or one of samples"
        )
    with written_aside(file) as aside:
        aside.write_text(json.dumps({"version": VERSION, **plan._asdict()}, indent=1) + "\n")
    return plan


def read_plan(folder: str | os.PathLike) -> Plan:
    """What ``claim`` wrote."""
    content = json.loads((Path(folder) / PLAN).read_text())
    if content.get("version") != VERSION:
        raise ValueError(f"{folder}/{PLAN} has version {content.get('version')!r}; expected {VERSION}")
    return Plan(content["told"], content["num"], content["per_shard"])


def shard_file(folder: str | os.PathLike, shard: int) -> Path:
    """Where a shard lies."""
    return Path(folder) / f"{shard:05d}.npz"


def write_shard(file: Path, images: torch.Tensor, labels: torch.Tensor | None) -> None:
    """Bytes (n, C, H, W) with labels (n,), and the checksum before them."""
    arrays = {"arr_0": np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())}
    if labels is not None:
        arrays["arr_1"] = labels.cpu().numpy()
    held = io.BytesIO()
    np.savez(held, **arrays)  # uncompressed and dated 1980, so bytes depend on the samples alone
    content = held.getvalue()
    with written_aside(_checksum(file)) as aside:
        aside.write_text(f"{hashlib.sha256(content).hexdigest()}  {file.name}\n")
    with written_aside(file) as aside:
        aside.write_bytes(content)


def whole(folder: str | os.PathLike, plan: Plan, shard: int) -> bool:
    """Whether a shard is there, has the bytes that its checksum tells, and as many samples as it should."""
    file = shard_file(folder, shard)
    if not (file.is_file() and _checksum(file).is_file()):
        return False
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != _checksum(file).read_text().split()[0]:
        return False
    with np.load(io.BytesIO(content), allow_pickle=False) as held:
        return len(held["arr_0"]) == len(plan.ids(shard))


def _checksum(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")
