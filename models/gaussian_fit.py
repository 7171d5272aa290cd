"""Mean and covariance of a data set in one pass: what ``GaussianStats`` are made from.

>>> import torch
>>> data = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))
>>> whole, streamed = gaussian(data), gaussian(data.split(70))
>>> bool((whole.covariance() - streamed.covariance()).abs().max() < 1e-14)
True
>>> gaussian(data, torch.arange(300) % 3, rank=5).count
(100, 100, 100)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from .gaussian_stats import GaussianStats

DENSE = 4096  # up to so many numbers a sample the covariance itself is accumulated, beyond it a factor of low rank
CHUNK = 1024  # rows looked at together


def gaussian(
    data: Any, labels: Any = None, *, rank: int | None = None, tail: str = "mean", flip: bool = False
) -> GaussianStats:
    """The statistics of a data set, in one pass.

    Args:
        data: floats (N, ...) scaled as the network has them; or any iterable of batches (n, ...), for what does not fit
            in memory; or of pairs (batch, labels), for a Gaussian a class.
        labels: integers (N,), for a Gaussian a class: 0 .. C - 1, each at least twice.
        rank: eigenvectors to keep (all by default). Beyond 4096 numbers a sample it is needed: a factor of 2 rank + 20
            rows is carried along then, which is exact where the data's spectrum falls off.
        tail: "mean" of the discarded eigenvalues for the other directions, or "zero".
        flip: add each sample's mirror image, along the last axis.
    """
    if tail not in ("mean", "zero"):
        raise ValueError(f"tail must be 'mean' or 'zero', got {tail!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1):
        raise ValueError(f"rank must be a positive integer or None, got {rank!r}")
    if isinstance(data, (torch.Tensor, np.ndarray)):
        data = [data if labels is None else (data, labels)]
    elif labels is not None:
        raise ValueError("labels go with one array of data; batches are given as pairs (batch, labels)")
    running: dict[int, _Running] = {}
    shape: tuple[int, ...] | None = None
    by_class: bool | None = None
    for batch in _checked(data):
        x, y = batch
        shape = tuple(x.shape[1:]) if shape is None else shape
        by_class = y is not None if by_class is None else by_class
        if tuple(x.shape[1:]) != shape or by_class != (y is not None):
            raise ValueError(
                f"data must be batches alike: first {shape}, then {tuple(x.shape[1:])}, labels {y is not None}"
            )
        dim = math.prod(shape)
        if rank is None and dim > DENSE:
            raise ValueError(
                f"rank is needed beyond {DENSE} numbers a sample, here {dim}: 64 is plenty at high noise"
            )
        if rank is not None and rank > dim:
            raise ValueError(f"rank must be at most {dim}, the numbers in a sample, got {rank}")
        for which in [0] if y is None else y.unique().tolist():
            one = running.setdefault(
                which, _Running(dim, None if dim <= DENSE else 2 * int(rank or dim) + 20)
            )
            chosen = x if y is None else x[y == which]
            one.update(torch.cat([chosen, chosen.flip(-1)]) if flip else chosen, len(chosen))
    if shape is None:
        raise ValueError("data must hold at least two samples, got none")
    few = [c for c in range(max(running) + 1) if c not in running or running[c].seen < 2]
    if few or min(running) < 0:
        raise ValueError(
            f"data must hold two samples or more of every class 0 .. {max(running)}; too few of {few[:10]}"
            if by_class
            else f"data must hold at least two samples, got {running[0].seen}"
        )
    width = math.prod(shape) if rank is None else int(rank)
    finished = [running[c].finish(width, tail) for c in range(len(running))]
    mean, vectors, values, rest = (torch.stack(arrays) for arrays in zip(*finished, strict=True))
    return GaussianStats(
        mean, vectors, values, rest, tuple(running[c].seen for c in range(len(running))), shape
    )


def _checked(data: Iterable) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
    """The batches as float tensors (n, ...) on the CPU, labels as int64 (n,) or None."""
    for batch in data:
        x, y = batch if isinstance(batch, (tuple, list)) else (batch, None)
        x = torch.as_tensor(x).detach().cpu()
        if x.ndim < 2 or not x.is_floating_point() or x[:1].numel() == 0 and len(x):
            raise ValueError(
                f"data must be floats of shape (n, ...), got {x.dtype} of shape {tuple(x.shape)}"
            )
        if not torch.isfinite(x).all():
            raise ValueError("data must be finite")
        if y is not None:
            y = torch.as_tensor(y).detach().cpu()
            if tuple(y.shape) != (len(x),) or y.is_floating_point() or (len(y) and int(y.min()) < 0):
                raise ValueError(
                    f"labels must be integers >= 0, one for each of {len(x)} samples, got shape {tuple(y.shape)}"
                )
            y = y.long()
        yield x, y


class _Running:
    """Mean and scatter about it of all rows so far; the scatter (D, D), or a factor F of few rows with F'F near it.

    A batch is centred on its own mean, and the distance of the two means is one more row (Chan, Golub, LeVeque 1979):
    nothing cancels.
    """

    def __init__(self, dim: int, keep: int | None):
        self.keep, self.rows, self.seen, self.trace = keep, 0, 0, 0.0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim if keep is None else 0, dim, dtype=torch.float64)

    def update(self, batch: torch.Tensor, seen: int) -> None:
        """Add rows (n, ...), which stand for ``seen`` samples."""
        self.seen += seen
        for chunk in batch.split(CHUNK):
            rows = chunk.flatten(1).double()
            mean, total = rows.mean(0), self.rows + len(rows)
            delta = mean - self.mean
            between = delta * math.sqrt(self.rows * len(rows) / total)
            rows = torch.cat([rows - mean, between[None]])
            self.trace += float(rows.square().sum())
            self.mean = self.mean + delta * (len(chunk) / total)
            self.rows = total
            if self.keep is None:
                self.scatter += rows.mT @ rows
            else:
                self.scatter = torch.cat([self.scatter, rows])
                if len(self.scatter) > 2 * self.keep:
                    values, vectors = self._eigen(self.keep)
                    self.scatter = values.sqrt()[:, None] * vectors.mT

    def _eigen(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest eigenvalues of the scatter, falling, and their vectors (D, count); zeros where there are none."""
        if self.keep is None:
            values, vectors = torch.linalg.eigh(self.scatter)
        else:  # the Gram matrix of the factor's rows has the same eigenvalues
            values, turns = torch.linalg.eigh(self.scatter @ self.scatter.mT)
            sound = values > 1e-12 * values[-1:].clamp_min(0)
            values = values[sound]
            vectors = self.scatter.mT @ turns[:, sound] / values.sqrt()
        values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
        missing = count - len(values)
        return torch.nn.functional.pad(values, (0, missing)), torch.nn.functional.pad(vectors, (0, missing))

    def finish(self, rank: int, tail: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """mean, U, L, l."""
        values, vectors = self._eigen(rank)
        values, dim = values / self.rows, len(self.mean)
        rest = max(0.0, self.trace / self.rows - float(values.sum())) / (dim - rank) if rank < dim else 0.0
        return self.mean, vectors, values, torch.tensor(0.0 if tail == "zero" else rest, dtype=torch.float64)
