"""Weights and what they mean in one safetensors file: tensors, and a JSON document in the file's own metadata.

>>> import tempfile, os
>>> path = os.path.join(tempfile.mkdtemp(), "a.safetensors")
>>> write(path, {"w": torch.ones(2)}, {"kind": "denoiser", "seed": 0})
>>> read(path)[1]["kind"]
'denoiser'
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_KEY = "fewstep"
DATA = Path(__file__).parent / "data"


def write(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able document; the file appears whole or not at all."""
    from safetensors.torch import save

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {os.fspath(path)!r}")
    document = json.dumps({"format": FORMAT, **meta}, sort_keys=True, allow_nan=False)
    content = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata={_KEY: document})
    write_atomically(path, content)


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
    """Write aside in the same folder, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors as stored, and the document. ValueError for a file that fewstep did not write."""
    return _read(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)


def about(path: str | os.PathLike) -> dict[str, Any]:
    """The document alone, without the weights."""
    return _read(path, lambda file: {})[1]


def _read(path: str | os.PathLike, tensors_of: Callable) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            document, tensors = (file.metadata() or {}).get(_KEY), tensors_of(file)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file: {error}") from error
    if document is None:
        raise ValueError(f"{os.fspath(path)} has no fewstep metadata: it was not written by fewstep")
    meta = json.loads(document)
    if meta.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)} has format {meta.get('format')!r}, this version reads {FORMAT}")
    return tensors, meta
