"""Counter-based noise: Philox4x32-10 (Salmon et al. 2011), keyed by (seed, id), counted by (element, row, stream).

The normal at an element depends on these five numbers alone, so a sample is the same bits in any batch, order, rank or
process. Four normals come from one draw, by Box-Muller from 23-bit uniforms: |z| <= 5.77.

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

WORD = 0xFFFFFFFF
STEP, START, USER = 0, 1, 2  # streams: a row's fresh noise, a sample's opening noise, whatever a user draws


def philox(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor | int, torch.Tensor | int]
) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words and broadcast against one another."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # a product of two words overflows int64 but wraps, and its upper word survives the shift and the mask
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _check_seed(seed: int) -> int:
    try:
        whole = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        whole = -1
    if not 0 <= whole < 2**64:
        raise ValueError(f"seed must be an int in 0 .. 2^64 - 1, got {seed!r}")
    return whole


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
    seed: int, ids: torch.Tensor, groups: int, row: int | torch.Tensor, stream: int
) -> tuple[torch.Tensor, ...]:
    """Four random 32-bit words for each of (B, groups); ``row`` is an int or one a sample."""
    seed, ids = _check_seed(seed), ids.to(torch.int64).reshape(-1, 1)
    element = torch.arange(groups, dtype=torch.int64, device=ids.device).reshape(1, -1)
    row = (
        row.to(torch.int64).reshape(-1, 1)
        if isinstance(row, torch.Tensor)
        else torch.full_like(ids, int(row))
    )
    counter = (element, row, torch.full_like(ids, int(stream)), torch.full_like(ids, seed >> 32))
    return philox(counter, (seed & WORD, ids & WORD))


def normal(
    seed: int,
    ids: torch.Tensor,
    shape: Sequence[int],
    row: int | torch.Tensor = 0,
    stream: int = USER,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normals of shape (B, *shape), one sample for each of ``ids`` (below 2^32)."""
    count = math.prod(shape)
    uniforms = [((w >> 9).double() + 0.5) * 2.0**-23 for w in words(seed, ids, -(-count // 4), row, stream)]
    pairs = []
    for radius, angle in (uniforms[:2], uniforms[2:]):
        r = torch.sqrt(-2 * torch.log(radius))
        pairs += [r * torch.cos(2 * math.pi * angle), r * torch.sin(2 * math.pi * angle)]
    # rounded to float32 also when float64 is asked for: the same draw whatever the precision of the state
    z = torch.stack(pairs, dim=-1).float().flatten(1)[:, :count]
    return z.reshape(len(ids), *shape).to(dtype)


def uniform(
    seed: int, ids: torch.Tensor, count: int, row: int | torch.Tensor = 0, stream: int = USER
) -> torch.Tensor:
    """Uniforms in (0, 1), float64 with 32 random bits, of shape (B, count)."""
    drawn = torch.stack(words(seed, ids, -(-count // 4), row, stream), dim=-1).flatten(1)[:, :count]
    return (drawn.double() + 0.5) * 2.0**-32


def starting_noise(
    seed: int, ids: torch.Tensor | int, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The unit noise that samples ``ids`` (or the first n) open with.

    >>> starting_noise(0, 4, (1, 8, 8)).shape
    torch.Size([4, 1, 8, 8])
    """
    if isinstance(ids, int) and not isinstance(ids, bool) and ids >= 0:
        ids = torch.arange(ids)
    return normal(seed, check_ids(ids), shape, stream=START, dtype=dtype)
