"""Checkpoints of a run: folders ``step-000500`` that appear whole, are checked when read, and are kept by merit.

A checkpoint is written by ``torch.distributed.checkpoint`` into a folder of another name, every file's SHA-256 goes
into its ``manifest.json``, and only then is the folder renamed. One that does not match its manifest is passed over for
the one before it.

>>> import tempfile, torch
>>> folder = Path(tempfile.mkdtemp())
>>> state = {"w": torch.ones(3)}
>>> _ = save(folder, 5, state)
>>> found = {"w": torch.zeros(3)}
>>> load(newest(folder), found)["step"], found["w"].tolist()
(5, [1.0, 1.0, 1.0])
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.checkpoint import write_atomically
from .parallel import ALONE, Ranks

MANIFEST = "manifest.json"


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write ``state`` (nested dicts of tensors) as ``folder/step-...`` and return its path.

    A disk that is full or a folder that cannot be written to is an OSError that says so, and leaves what was there.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}.writing"
    try:
        _write(aside, final, step, state, about, ranks)
    except BaseException as error:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        cause = _of_the_disk(error)
        if cause is None:
            raise
        last = newest(folder)
        raise OSError(
            cause.errno,
            f"{cause.strerror}: {final} was not written. The run stands where its last checkpoint is "
            f"({'there is none' if last is None else last.name}): make room (report.keep = 1 keeps the last one and "
            f"the best), and start it again by the same command",
        ) from error
    return final


def _of_the_disk(error: BaseException) -> OSError | None:
    """The OSError that it is, or that torch has wrapped in its own."""
    failures = getattr(error, "failures", {})
    inner = [error, *(found[0] for found in failures.values())]
    return next((e for e in inner if isinstance(e, OSError)), None)


def _write(
    aside: Path,
    final: Path,
    step: int,
    state: Mapping[str, Any],
    about: Mapping[str, Any] | None,
    ranks: Ranks,
) -> None:
    import torch.distributed.checkpoint as dcp

    if ranks.first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.wait()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        dcp.save(dict(state), checkpoint_id=aside)
    ranks.wait()
    if ranks.first:
        files = {p.relative_to(aside).as_posix(): digest(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        manifest = {"step": step, "files": files, "about": dict(about or {})}
        write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
    ranks.wait()


def load(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill ``state``'s tensors in place from a checkpoint; its manifest."""
    import torch.distributed.checkpoint as dcp

    manifest = json.loads((checkpoint / MANIFEST).read_text())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        warnings.filterwarnings("ignore", message=".*torch.distributed.*")
        dcp.load(state, checkpoint_id=checkpoint)
    return manifest


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file) -> str:
    total = hashlib.sha256()
    while piece := file.read(1 << 20):
        total.update(piece)
    return total.hexdigest()


def trouble(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest must be there with its bytes."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is missing or unreadable"
    for name, expected in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if digest(checkpoint / name) != expected:
            return f"{name} is not what was written"
    return None


def every(folder: Path) -> list[Path]:
    """All checkpoints, the oldest first, whether sound or not."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def newest(folder: Path) -> Path | None:
    """The latest sound checkpoint; what is passed over is warned of."""
    for checkpoint in reversed(every(folder)):
        wrong = trouble(checkpoint)
        if wrong is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is passed over: {wrong}", stacklevel=2)
    return None


def tidy(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the last ``keep`` and the one of step ``best``."""
    for checkpoint in every(folder)[: -max(1, keep)]:
        if best is None or checkpoint.name != f"step-{best:08d}":
            shutil.rmtree(checkpoint)
