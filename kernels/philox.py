"""Counter-based noise: Philox4x32-10 (Salmon et al. 2011), keyed by (seed, id), counted by (element, row, stream).

The normal at an element depends on these five numbers alone: not on the batch it is drawn in, nor on the block of the
kernel that draws it. Four normals come from one draw, by Box-Muller from 23-bit uniforms: |z| <= 5.77. The words are
the same bits everywhere; the kernel's normals, made in float32, are the reference's within 3e-6.

    >>> import torch
    >>> a = normals(torch.tensor(7), torch.arange(64), 192, row=2)
    >>> torch.equal(a[17:18], normals(torch.tensor(7), torch.tensor([17]), 192, row=2))
    True
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .cases import Case
from .dispatch import choose, runs_on
from .lang import ceil_div, jit, next_power_of_2, tl

WORD = 0xFFFFFFFF
BLOCK = 512  # draws a program: four normals each


# --- the reference ---------------------------------------------------------------------------------------------------


def philox(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor | int, torch.Tensor | int]
) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words and broadcast against one another.

    The key is left to grow beyond 32 bits from round to round: all that is read of it is masked with the counter.
    """
    k0, k1 = key
    keys = (k for k in key if isinstance(k, torch.Tensor))
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter, *keys)[:4]
    for _ in range(10):
        # a product of two words overflows int64 but wraps, and its upper word survives the shift and the mask
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = p1.bitwise_and_(WORD), p0.bitwise_and_(WORD)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


def words(
    seed: torch.Tensor, ids: torch.Tensor, groups: int, row: torch.Tensor, stream: int
) -> tuple[torch.Tensor, ...]:
    """Four random 32-bit words for each of (B, groups), in int64; ``seed`` and ``row``: one for all or one a sample."""
    seed, ids, row = (v.to(torch.int64).reshape(-1, 1) for v in (seed, ids, row))
    element = torch.arange(groups, dtype=torch.int64, device=ids.device).reshape(1, -1)
    counter = (element, row, torch.full_like(row, stream), (seed >> 32) & WORD)
    return philox(counter, (seed & WORD, ids & WORD))


def reference(
    seed: torch.Tensor, ids: torch.Tensor, count: int, row: torch.Tensor, stream: int
) -> torch.Tensor:
    """Standard normals (B, count) as float32: computed in float64, rounded once."""
    drawn = words(seed, ids, -(-count // 4), row, stream)
    z = torch.empty(*drawn[0].shape, 4, device=ids.device)
    for k in (0, 2):
        radius, angle = (
            w.bitwise_right_shift_(9).double().add_(0.5).mul_(2.0**-23) for w in drawn[k : k + 2]
        )
        r, angle = radius.log_().mul_(-2).sqrt_(), angle.mul_(2 * math.pi)
        z[..., k], z[..., k + 1] = torch.cos(angle).mul_(r), angle.sin_().mul_(r)
    return z.flatten(1)[:, :count].contiguous()


# --- the kernel ------------------------------------------------------------------------------------------------------


@jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """``philox`` on uint32."""
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@jit
def box_muller(radius, angle):
    """Two normals from two words. Sine and cosine by the nearest quarter turn, which is exact, and a polynomial."""
    u = ((radius >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    r = tl.sqrt(-2.0 * tl.log(u))
    turn = (angle >> 9).to(tl.int32)
    quarter = (turn + 1048576) >> 21
    a = ((turn - quarter * 2097152).to(tl.float32) + 0.5) * 7.490140565847157e-07  # 2 pi / 2^23
    s = a * a
    # minimax on [-pi/4, pi/4]
    sine = a + a * s * (-0.16666654611 + s * (8.3321608736e-3 + s * -1.9515295891e-4))
    cosine = (
        1.0
        - 0.5 * s
        + s * s * (4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5))
    )
    odd = (quarter & 1) == 1
    x, y = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    flip = (quarter & 2) == 2
    return r * tl.where(flip, -x, x), r * tl.where(flip, -y, y)


@jit
def four_normals(seed, id, element, row, stream: tl.constexpr):
    """Four normals (N,) each for draws ``element`` (N,) int32; ``seed`` and ``id`` are int64, ``row`` an integer."""
    c0 = element.to(tl.uint32, bitcast=True)
    zero = c0 * 0
    c1, c2, c3 = zero + row.to(tl.uint32), zero + stream, zero + (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, zero + seed.to(tl.uint32), zero + id.to(tl.uint32))
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@jit(do_not_specialize_on_alignment=["seeds", "ids", "rows"])
def normals_kernel(
    out, seeds, ids, rows, count, seed_each, row_each, STREAM: tl.constexpr, BLOCK: tl.constexpr
):
    sample = tl.program_id(0)
    draw = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed, id = tl.load(seeds + sample * seed_each), tl.load(ids + sample)
    row = tl.load(rows + sample * row_each)
    z0, z1, z2, z3 = four_normals(seed, id, draw, row, STREAM)
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * BLOCK,))
    element = tl.program_id(1) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + sample.to(tl.int64) * count + element, z, mask=element < count)


def launch(seed: torch.Tensor, ids: torch.Tensor, count: int, row: torch.Tensor, stream: int) -> torch.Tensor:
    """``reference`` by the kernel."""
    out = torch.empty(len(ids), count, device=ids.device)
    if out.numel():
        block = min(BLOCK, next_power_of_2(ceil_div(count, 4)))
        grid = (len(ids), ceil_div(count, 4 * block))
        seed, ids, row = seed.contiguous(), ids.contiguous(), row.contiguous()
        each = int(seed.numel() > 1), int(row.numel() > 1)
        warps = max(1, block // 128)
        normals_kernel[grid](out, seed, ids, row, count, *each, STREAM=stream, BLOCK=block, num_warps=warps)
    return out


# --- the op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fewstep::philox", mutates_args=())
def op(seed: torch.Tensor, ids: torch.Tensor, count: int, row: torch.Tensor, stream: int) -> torch.Tensor:
    return (launch if runs_on(ids) else reference)(seed, ids, count, row, stream)


@op.register_fake
def _(seed, ids, count, row, stream):
    return ids.new_empty(len(ids), count, dtype=torch.float32)


def normals(
    seed: torch.Tensor,
    ids: torch.Tensor,
    count: int,
    row: torch.Tensor | int = 0,
    stream: int = 2,
    impl: str | None = None,
) -> torch.Tensor:
    """Standard normals (B, count) in float32, for ``ids`` (B,) int64 below 2^32.

    ``seed`` holds 64 bits in an int64 tensor, ``row`` is an int or such a tensor; both: one for all or one a sample.
    """
    if not isinstance(row, torch.Tensor):
        row = torch.full_like(seed, row)
    too_long = f"count must be at most 2^26, got {count}" if count > 2**26 else None
    if choose("philox", impl, [ids], too_long) == "triton":
        return op(seed, ids, count, row, stream)
    return reference(seed, ids, count, row, stream)


# --- cases -----------------------------------------------------------------------------------------------------------


def _case(batch: int, count: int, apart: bool = False) -> Any:
    def make(device: torch.device | str) -> dict[str, Any]:
        ids = torch.arange(batch, device=device) * 977
        seed = torch.full((batch if apart else 1,), -(2**62) + 12345, device=device)
        row = torch.arange(batch, device=device) % 5 if apart else torch.full_like(seed, 3)
        return {"seed": seed, "ids": ids, "count": count, "row": row, "stream": 0}

    return make


# computed in float64 on the one side and in float32 on the other: 5.77 times a few float32 roundings
CASES = [
    Case("one", _case(1, 1), tolerance=3e-6),
    Case("ragged", _case(3, 1001, apart=True), tolerance=3e-6),
    Case("empty", _case(0, 12), tolerance=3e-6),
    Case("two blocks", _case(2, 4 * BLOCK + 4), tolerance=3e-6),
    Case("SD 1.5, batch 4", _case(4, 16_384), real=True, tolerance=3e-6),
    Case("Flux 1024, batch 1", _case(1, 262_144), real=True, tolerance=3e-6),
    Case("Wan 480p, batch 1", _case(1, 2_096_640), real=True, tolerance=3e-6),
    Case("digits, batch 4096, ids and rows apart", _case(4096, 64, apart=True), real=True, tolerance=3e-6),
]
