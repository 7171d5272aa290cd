"""Counter-based noise: Philox4x32-10 (Salmon et al. 2011), keyed by (seed, id), counted by (element, row, stream).

The normal at an element depends on these five numbers alone, so a sample is the same bits in any batch, order, rank or
process (of one kind of device: a GPU rounds logarithms otherwise, by 3e-6 at most). ``kernels/philox.py`` draws them.

    >>> import torch
    >>> a = normal(7, torch.arange(64), (3, 8, 8), row=2)
    >>> torch.equal(a[17:18], normal(7, torch.tensor([17]), (3, 8, 8), row=2))
    True
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

from ..kernels import philox as kernel
from ..kernels.philox import WORD, philox

__all__ = [
    "START",
    "STEP",
    "USER",
    "WORD",
    "check_ids",
    "normal",
    "philox",
    "starting_noise",
    "uniform",
    "words",
]

STEP, START, USER = 0, 1, 2  # streams: a row's fresh noise, a sample's opening noise, whatever a user draws
Seed = int | torch.Tensor


def seed_on(seed: Seed, device: torch.device) -> torch.Tensor:
    """The 64 bits of a seed in an int64 tensor of shape (1,); a tensor (one or one a sample) goes through."""
    if isinstance(seed, torch.Tensor) and seed.dtype == torch.int64 and seed.ndim <= 1:
        return seed.to(device)
    try:
        whole = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        whole = -1
    if not 0 <= whole < 2**64:
        raise ValueError(f"seed must be an int in 0 .. 2^64 - 1, got {seed!r}")
    # filled on the device: a copy from here would be waited for
    return torch.full((1,), whole - (whole >> 63 << 64), dtype=torch.int64, device=device)


def check_ids(ids: torch.Tensor, batch: int | None = None) -> torch.Tensor:
    """Sample ids as int64, one a sample of the batch, each below 2^32; else ``ValueError``."""
    whole = isinstance(ids, torch.Tensor) and ids.dtype in (torch.int32, torch.int64)
    if not whole or ids.ndim != 1 or batch not in (None, len(ids)):
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else repr(ids)
        raise ValueError(
            f"ids must be integers, a tensor of shape ({'n' if batch is None else batch},), got {got}"
        )
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
        raise ValueError(f"ids must lie in 0 .. 2^32 - 1, got {int(ids.min())} .. {int(ids.max())}")
    return ids.long()


def words(
    seed: Seed, ids: torch.Tensor, groups: int, row: int | torch.Tensor, stream: int
) -> tuple[torch.Tensor, ...]:
    """Four random 32-bit words for each of (B, groups); ``seed`` and ``row`` are one for all or one a sample."""
    return kernel.words(seed_on(seed, ids.device), ids, groups, _row_on(row, ids), stream)


def normal(
    seed: Seed,
    ids: torch.Tensor,
    shape: Sequence[int],
    row: int | torch.Tensor = 0,
    stream: int = USER,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> torch.Tensor:
    """Standard normals of shape (B, *shape), one sample for each of ``ids`` (below 2^32).

    The seed is an int, or int64 tensors with its bits on the device of ``ids``, one for all or one a sample.
    """
    # float32 draws also when float64 is asked for: the same draw whatever the precision of the state
    z = kernel.normals(
        seed_on(seed, ids.device), ids.long(), math.prod(shape), _row_on(row, ids), stream, impl
    )
    return z.reshape(len(ids), *shape).to(dtype)


def uniform(
    seed: Seed, ids: torch.Tensor, count: int, row: int | torch.Tensor = 0, stream: int = USER
) -> torch.Tensor:
    """Uniforms in (0, 1), float64 with 32 random bits, of shape (B, count)."""
    drawn = torch.stack(words(seed, ids, -(-count // 4), row, stream), dim=-1).flatten(1)[:, :count]
    return (drawn.double() + 0.5) * 2.0**-32


def starting_noise(
    seed: Seed, ids: torch.Tensor | int, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The unit noise that samples ``ids`` (or the first n) open with.

    >>> starting_noise(0, 4, (1, 8, 8)).shape
    torch.Size([4, 1, 8, 8])
    """
    if isinstance(ids, int) and not isinstance(ids, bool) and ids >= 0:
        ids = torch.arange(ids)
    return normal(seed, check_ids(ids), shape, stream=START, dtype=dtype)


def _row_on(row: int | torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(row, torch.Tensor):
        return row.to(ids.device, torch.int64)
    return torch.full((1,), int(row), dtype=torch.int64, device=ids.device)
