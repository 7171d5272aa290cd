"""Reference statistics in files: mean and covariance as every tool stores them, and how they were made.

An .npz with ``mu`` (D,) and ``sigma`` (D, D), float64, sigma divided by N - 1: what EDM, pytorch-fid, clean-fid and ADM
read and write. Beside these stand ``num_images`` and ``protocol`` (JSON), which the others pass over, and ``feats`` (N,
D), as clean-fid calls them, where the features were kept for metrics that need them. Also read: ADM's files with their
spatial moments, clean-fid's files of ``feats`` alone, and the pickles of EDM2, without running what is in them.

>>> import tempfile
>>> x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
>>> file = os.path.join(tempfile.mkdtemp(), "stats.npz")
>>> write_statistics(file, Statistics(gaussian_stats(x), Protocol(features="inception")))
>>> back = read_statistics(file)
>>> back.gaussian.n, back.protocol.features, back.features
(10, 'inception', None)
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..models import inert_pickle
from .checks import sample_matrix
from .files import written_aside
from .moments import Gaussian, gaussian_stats
from .protocol import Protocol

# EDM2 names what it measures; these are the same extractors under our names.
EDM2 = {"fid": "inception", "fd_dinov2": "dinov2"}
SUFFIXES = (".npz", ".pkl")


class Statistics(NamedTuple):
    """Moments (n None where a file says none), how they were made, features (N, D) where they were kept, and their
    labels; `name` is what a protocol calls them as a reference: file and hash."""

    gaussian: Gaussian
    protocol: Protocol
    features: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    name: str = "statistics"

    def counted(self, why: str) -> int:
        """The number of images behind it; ``ValueError`` saying what needs it where the file has none."""
        if self.gaussian.n is None:
            raise ValueError(
                f"{self.name} has no count of images (num_images), which {why} needs; "
                "make the file anew with `fewstep eval stats`, or use a metric that does without"
            )
        return self.gaussian.n


def write_statistics(path: str | os.PathLike, statistics: Statistics) -> None:
    """One .npz, whole or not at all."""
    if Path(path).suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {os.fspath(path)!r}")
    gaussian = statistics.gaussian
    arrays: dict[str, Any] = {
        "mu": gaussian.mean.cpu().numpy(),
        "sigma": gaussian.cov.cpu().numpy(),
        "protocol": np.array(statistics.protocol.text()),
    }
    if gaussian.n is not None:
        arrays["num_images"] = np.array(gaussian.n)
    if statistics.features is not None:
        arrays["feats"] = statistics.features.float().cpu().numpy()
    if statistics.labels is not None:
        arrays["labels"] = statistics.labels.cpu().numpy()
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: str | os.PathLike, metric: str | None = None) -> Statistics:
    """The statistics in a file of any of the tools above.

    metric: which of several a file of EDM2 holds is wanted, "inception" or "dinov2"; None where it has one.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"statistics must be in an .npz, or EDM2's .pkl, got {str(path)!r}")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    content = _npz(path) if path.suffix == ".npz" else _edm2(path, metric)
    if "protocol" in content:
        protocol = Protocol.read(str(content["protocol"]))
    else:
        protocol = Protocol(features=content.get("features_name"))
    features = labels = None
    if "feats" in content:
        features = torch.as_tensor(content["feats"])
        sample_matrix(features, f"feats of {path}", least=2)
        labels = torch.as_tensor(content["labels"]) if "labels" in content else None
    if {"mu", "sigma"} <= content.keys():
        gaussian = _gaussian(content, path)
    elif features is not None:
        gaussian = gaussian_stats(features)
    else:
        found = ", ".join(sorted(content)) or "nothing"
        raise ValueError(f"{path} has no mu and sigma, it has {found}; expected statistics of features")
    if features is not None and features.shape[1] != len(gaussian.mean):
        raise ValueError(
            f"{path}: feats have {features.shape[1]} dimensions, and mu {len(gaussian.mean)}; expected one number"
        )
    return Statistics(gaussian, protocol, features, labels, f"{path.name}@{file_hash(path)[:12]}")


def file_hash(path: str | os.PathLike) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _gaussian(content: dict[str, Any], path: Path) -> Gaussian:
    mean, cov = np.asarray(content["mu"]), np.asarray(content["sigma"])
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: mu has shape {mean.shape} and sigma {cov.shape}; expected (D,) and (D, D)")
    for name, array in (("mu", mean), ("sigma", cov)):
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} has NaN, infinity, or no floats ({array.dtype})")
    count = content.get("num_images")
    n = None if count is None else int(count)
    if n is not None and n < 2:
        raise ValueError(f"{path}: num_images is {n}; a covariance needs at least 2")
    # Some files are in the other byte order or in float32; torch takes native float64.
    return Gaussian(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(cov.astype(np.float64)), n)


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = {"mu", "sigma", "num_images", "protocol", "feats", "labels"} & set(file.files)
            # Reference batches carry their images along (arr_0), which are large and not asked for.
            return {name: file[name] for name in wanted} or dict.fromkeys(file.files)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error


def _edm2(path: Path, metric: str | None) -> dict[str, Any]:
    with open(path, "rb") as file:
        content = inert_pickle.read(file)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold EDM2's dict of metrics, it holds a {type(content).__name__}")
    held = {EDM2.get(key, key): value for key, value in content.items() if isinstance(value, dict)}
    if metric is None and len(held) == 1:
        (metric,) = held
    if metric not in held:
        known = ", ".join(sorted(held)) or "nothing"
        raise ValueError(f"{path} holds statistics of {known}; say which of them, got {metric!r}")
    found = {key: inert_pickle.plain(value) for key, value in held[metric].items()}
    return {**found, "features_name": metric, "num_images": inert_pickle.plain(content.get("num_images"))}
