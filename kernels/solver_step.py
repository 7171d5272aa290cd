"""One solver step in one pass: a few weighted sums over the same tensors, with coefficients read from the device.

The *sources* of a step are x, y, the fresh noise z, K stored outputs and m network outputs. Row r of a table, lane l,
holds the weights of up to six sums over them (``CONVERT .. V``):

    x0  = clip(w_convert . sources)              where there is a limit: x0 then stands for the outputs in what follows
    new = w_new . sources                        what is stored; it replaces history[slot] in what follows
    x'  = w_x . sources      y' = w_y . sources
    <u, u>, <u, v>, <v, v>                       of u = w_u . sources and v = w_v . sources, one of each a sample

(x0 and new are made of x, y and the outputs alone), so a guidance blend, a change of parametrisation, a multistep or
Runge-Kutta combination and fresh noise are one read of what is there and one write of what comes. Rows and lanes are
counters on the device, one for all or one a sample. Noise is drawn by counter (``philox``): it depends on no block and
no batch.

    >>> import torch
    >>> x, eps = torch.ones(2, 3), torch.full((2, 3), 0.5)
    >>> table = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1.0, 0, 0, -0.1], [0, 0, 0, 0]]).reshape(1, 1, 4, 4)
    >>> step = solver_step(x, x, [], [eps], table, torch.zeros(1, dtype=torch.int64), masks=(0, 0, 0b1001, 0))
    >>> step.x[0], step.y is step.x
    (tensor([0.9500, 0.9500, 0.9500]), True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import philox
from .cases import Case, randn
from .dispatch import choose, direct, runs_on
from .lang import ceil_div, jit, next_power_of_2, tl
from .philox import four_normals

X, Y, Z, HISTORY = 0, 1, 2, 3  # where each source stands; the outputs follow the history
CONVERT, NEW, XS, YS, U, V = range(6)  # the sums
NOWHERE, APART = -1, -2  # a slot: nothing is stored; samples store in slots of their own
BLOCK = 1024  # elements a program


class Stepped(NamedTuple):
    """x', y' (x' itself where they are one), the history (None where unwritten), and (B, 3) inner products or None."""

    x: torch.Tensor
    y: torch.Tensor
    history: tuple[torch.Tensor | None, ...]
    products: torch.Tensor | None


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    y: torch.Tensor,
    history: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor],
    table: torch.Tensor,
    row: torch.Tensor,
    lane: torch.Tensor,
    masks: Sequence[int],
    slot: int,
    slots: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    limit: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """[x', y' if it is another, what is stored .., products if asked for]."""
    weights = table[row, lane].to(x.dtype)  # (1 or B, sums, sources)
    if seed is not None:
        z = (
            philox.reference(seed, ids, x[0].numel() if len(x) else 0, row + 1, 0)
            .reshape(x.shape)
            .to(x.dtype)
        )
    sources = [x, y, z, *history, *(f.to(x.dtype) for f in outputs)]
    first = HISTORY + len(history)

    def combined(which: int) -> torch.Tensor:
        total = torch.zeros_like(x)
        for k, source in enumerate(sources):
            if masks[which] >> k & 1 and source is not None:
                total = total + _each(weights[:, which, k], x) * source
        return total

    if limit is not None:
        reach = _each(limit.to(x.dtype), x)
        sources[first:] = [combined(CONVERT).clamp(-reach, reach)]
    stored = []
    if slot != NOWHERE:
        new = combined(NEW)
        stored = [new]
        if slot == APART:
            here = _each(slots[row], x)
            stored = [
                torch.where(here == k, new, torch.zeros_like(x) if old is None else old)
                for k, old in enumerate(history)
            ]
        begin = HISTORY if slot == APART else HISTORY + slot
        sources[begin : begin + len(stored)] = stored
    results = [combined(XS), *([combined(YS)] if masks[YS] else []), *stored]
    if len(masks) > U:
        u, v = combined(U).flatten(1), combined(V).flatten(1)
        results.append(torch.stack([(u * u).sum(1), (u * v).sum(1), (v * v).sum(1)], 1))
    return results


def _each(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


# --- the kernel ------------------------------------------------------------------------------------------------------


@jit
def _add(
    total, value, weights, ok, SUM: tl.constexpr, SOURCE: tl.constexpr, MASKS: tl.constexpr, S: tl.constexpr
):
    if (MASKS[SUM] >> SOURCE) & 1:
        # a row that is not there makes NaN, which is reported, rather than what lies behind the table
        total += value * tl.load(weights + SUM * S + SOURCE, mask=ok, other=float("nan"))
    return total


@jit
def _add_to_all(sums, value, weights, ok, SOURCE: tl.constexpr, MASKS: tl.constexpr, S: tl.constexpr):
    new, x, y, u, v = sums
    new = _add(new, value, weights, ok, 1, SOURCE, MASKS, S)
    x = _add(x, value, weights, ok, 2, SOURCE, MASKS, S)
    y = _add(y, value, weights, ok, 3, SOURCE, MASKS, S)
    u = _add(u, value, weights, ok, 4, SOURCE, MASKS, S)
    v = _add(v, value, weights, ok, 5, SOURCE, MASKS, S)
    return new, x, y, u, v


# a row's counter may stand anywhere, and tables are of any length: neither is worth another compile
@jit(
    do_not_specialize=["draws", "parts", "row_count", "lane_count"],
    do_not_specialize_on_alignment=["rows", "lanes", "slots", "limits", "seeds", "ids", "table"],
)
def step_kernel(
    x, y, z, history, outputs, table, rows, lanes, slots, limits, seeds, ids, out_x, out_y, stored, partials,
    count, draws, parts, row_count, lane_count, SUMS: tl.constexpr,
    ROW_EACH: tl.constexpr, LANE_EACH: tl.constexpr, SEED_EACH: tl.constexpr, LIMIT_EACH: tl.constexpr,
    HELD: tl.constexpr, PRESENT: tl.constexpr, OUTPUTS: tl.constexpr, MASKS: tl.constexpr, SLOT: tl.constexpr,
    DRAWS: tl.constexpr, CLIPS: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = 3 + HELD + OUTPUTS
    READ: tl.constexpr = MASKS[0] | MASKS[1] | MASKS[2] | MASKS[3] | MASKS[4] | MASKS[5]
    if FLAT:  # one sample or one row for all: the batch is one long sample
        sample, block = 0, tl.program_id(0)
    else:
        sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    at = sample * count + i
    row, lane = tl.load(rows + sample * ROW_EACH), tl.load(lanes + sample * LANE_EACH)
    ok = (row >= 0) & (row < row_count) & (lane >= 0) & (lane < lane_count)
    w = table + (row * lane_count + lane) * (SUMS * S)
    nothing = tl.zeros((BLOCK,), tl.float32)
    sums = (nothing, nothing, nothing, nothing, nothing)

    x0 = nothing
    if READ & 1:
        old = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        sums = _add_to_all(sums, old, w, ok, 0, MASKS, S)
        x0 = _add(x0, old, w, ok, 0, 0, MASKS, S)
    if (READ >> 1) & 1:
        here = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        sums = _add_to_all(sums, here, w, ok, 1, MASKS, S)
        x0 = _add(x0, here, w, ok, 0, 1, MASKS, S)
    for k in tl.static_range(OUTPUTS):
        if (READ >> (3 + HELD + k)) & 1:
            given = tl.load(outputs[k] + at, mask=inside, other=0.0).to(tl.float32)
            if CLIPS:
                x0 = _add(x0, given, w, ok, 0, 3 + HELD + k, MASKS, S)
            else:
                sums = _add_to_all(sums, given, w, ok, 3 + HELD + k, MASKS, S)
    if CLIPS:
        reach = tl.load(limits + sample * LIMIT_EACH)
        x0 = tl.where(x0 > reach, reach, tl.where(x0 < -reach, -reach, x0))  # NaN stays
        sums = _add_to_all(sums, x0, w, ok, 3 + HELD, MASKS, S)

    new = sums[0]
    if SLOT >= 0:
        tl.store(stored[0] + at, new, mask=inside)
    if SLOT == -2:
        mine = tl.load(slots + row, mask=ok, other=0)
    for k in tl.static_range(HELD):
        if (SLOT == -2) | (SLOT == k) | ((READ >> (3 + k)) & 1):
            held = nothing
            if SLOT == k:
                held = new
            elif (PRESENT >> k) & 1:
                held = tl.load(history[k] + at, mask=inside, other=0.0).to(tl.float32)
            if SLOT == -2:
                held = tl.where(mine == k, new, held)
                tl.store(stored[k] + at, held, mask=inside)
            sums = _add_to_all(sums, held, w, ok, 3 + k, MASKS, S)
    if (READ >> 2) & 1:
        if DRAWS:
            draw = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            if FLAT:  # it is one sample, or each has a whole number of draws
                real = draw * 4 < count
                whose, draw = draw // draws, draw % draws
                seed, id = tl.load(seeds + whose * SEED_EACH, mask=real), tl.load(ids + whose, mask=real)
            else:
                seed, id = tl.load(seeds + sample * SEED_EACH), tl.load(ids + sample)
            z0, z1, z2, z3 = four_normals(seed, id, draw, row + 1, 0)
            fresh = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))
        else:
            fresh = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        sums = _add_to_all(sums, fresh, w, ok, 2, MASKS, S)
    new, following, point, u, v = sums
    tl.store(out_x + at, following, mask=inside)
    if MASKS[3]:
        tl.store(out_y + at, point, mask=inside)
    if SUMS > 4:
        u, v = tl.where(inside, u, 0.0), tl.where(inside, v, 0.0)
        part = partials + sample * 3 * parts + block
        tl.store(part, tl.sum(u * u))
        tl.store(part + parts, tl.sum(u * v))
        tl.store(part + 2 * parts, tl.sum(v * v))


@jit
def fold_kernel(partials, out, parts, LANES: tl.constexpr):
    """The sum over a sample's blocks, one program a sample, always in the same order."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    for k in tl.static_range(3):
        total = tl.zeros((LANES,), tl.float32)
        begin = 0
        while begin < parts:
            at = begin + lane
            total += tl.load(partials + (sample * 3 + k) * parts + at, mask=at < parts, other=0.0)
            begin += LANES
        tl.store(out + sample * 3 + k, tl.sum(total))


def launch(
    x: torch.Tensor,
    y: torch.Tensor,
    history: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor],
    table: torch.Tensor,
    row: torch.Tensor,
    lane: torch.Tensor,
    masks: Sequence[int],
    slot: int,
    slots: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    limit: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """``reference`` by the kernel."""
    results = _empty(x, history, masks, slot)
    batch, total, products = len(x), x.numel(), len(masks) > U
    if total == 0:
        return [*results[:-1], results[-1].zero_()] if products else results
    x, y, z = x.contiguous(), y.contiguous(), None if z is None else z.contiguous()
    held = [t if t is None else t.contiguous() for t in history]
    given = [t.contiguous() for t in outputs]
    row, lane = row.contiguous(), lane.contiguous()
    seed, ids, limit = (t if t is None else t.contiguous() for t in (seed, ids, limit))
    apart = row.numel() > 1 or lane.numel() > 1 or (limit is not None and limit.numel() > 1)
    count = total // batch
    flat = batch == 1 or not (apart or products or (seed is not None and count % 4))
    if flat:
        count = total
    block = min(BLOCK, max(16, next_power_of_2(count)))
    blocks = ceil_div(count, block)
    each = (int(t is not None and t.numel() > 1) for t in (row, lane, seed, limit))
    parts = 16 * ceil_div(blocks, 16)  # of which the last are zero, so that all are read in wide loads
    partials = x.new_zeros(batch, 3, parts) if products else None
    step_kernel[(blocks, 1) if flat else (batch, blocks)](
        x, y, z, tuple(x if t is None else t for t in held) or (x,), tuple(given) or (x,), table, row, lane, slots,
        limit, seed, ids, results[0], results[1] if masks[YS] else None,
        tuple(results[1 + bool(masks[YS]) :]) or (x,), partials,
        count, ceil_div(total // batch, 4), parts, *table.shape[:3], *each,
        HELD=len(held), PRESENT=sum(1 << k for k, t in enumerate(held) if t is not None), OUTPUTS=len(given),
        MASKS=(*masks, 0, 0)[:6], SLOT=slot, DRAWS=seed is not None, CLIPS=limit is not None, FLAT=flat,
        BLOCK=block, num_warps=max(1, min(4, block // 256)),
    )  # fmt: skip
    if partials is not None:
        fold_kernel[(batch,)](
            partials, results[-1], parts, LANES=min(1024, next_power_of_2(parts)), num_warps=1
        )
    return results


# --- the op ----------------------------------------------------------------------------------------------------------


def _empty(
    x: torch.Tensor, history: Sequence[torch.Tensor | None], masks: Sequence[int], slot: int
) -> list[torch.Tensor]:
    """What a step answers, not filled yet."""
    stored = {NOWHERE: 0, APART: len(history)}.get(slot, 1)
    results = [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for _ in range(1 + bool(masks[YS]) + stored)
    ]
    return [*results, x.new_empty(len(x), 3)] if len(masks) > U else results


# written out: not every torch that we run on reads lists of optional tensors off the annotations
SCHEMA = """(Tensor x, Tensor y, Tensor?[] history, Tensor[] outputs, Tensor table, Tensor row, Tensor lane,
SymInt[] masks, SymInt slot, Tensor? slots=None, Tensor? z=None, Tensor? seed=None, Tensor? ids=None,
Tensor? limit=None) -> Tensor[]"""


@torch.library.custom_op("fewstep::solver_step", mutates_args=(), schema=SCHEMA)
def op(
    x, y, history, outputs, table, row, lane, masks, slot, slots=None, z=None, seed=None, ids=None, limit=None
):
    run = launch if runs_on(x) else reference
    return run(x, y, history, outputs, table, row, lane, masks, slot, slots, z, seed, ids, limit)


@op.register_fake
def _(
    x, y, history, outputs, table, row, lane, masks, slot, slots=None, z=None, seed=None, ids=None, limit=None
):
    return _empty(x, history, masks, slot)


def solver_step(
    x: torch.Tensor,
    y: torch.Tensor,
    history: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor],
    table: torch.Tensor,
    row: torch.Tensor,
    lane: torch.Tensor | None = None,
    *,
    masks: Sequence[int],
    slot: int = NOWHERE,
    slots: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    limit: torch.Tensor | None = None,
    impl: str | None = None,
) -> Stepped:
    """x', y', the history and inner products, from row ``row`` and lane ``lane`` of ``table``.

    Args:
        x, y, outputs: (B, ...); ``outputs`` (one to three of them) in any floating-point dtype.
        history: K tensors like x, None where nothing has been written.
        table: (R, L, 4 or 6, 3 + K + m) weights, float32 for the kernel.
        row, lane: int64, (1,) or (B,). A row that is not in the table gives NaN (the reference: an ``IndexError``).
        masks: of each sum, which sources it reads, as bits. YS without any: y' is x'. CONVERT is for ``limit`` alone.
        slot: where what is stored goes: NOWHERE, 0 .. K - 1, or APART, which looks up ``slots`` (R,) sample by sample.
        z, seed, ids: the noise, or what it is drawn from: stream 0, row + 1 of samples ``ids`` (B,).
        limit: (1,) or (B,), the largest |x0|.
    """
    lane = torch.zeros_like(row[:1]) if lane is None else lane
    arguments = (x, y, history, outputs, table, row, lane, masks, slot, slots, z, seed, ids, limit)
    if choose("solver_step", impl, [x], unsupported(x, y, history, outputs, z, table)) == "triton":
        results = (launch if direct(x) else op)(*arguments)
    else:
        results = reference(*arguments)
    following = results[0]
    point = results[1] if masks[YS] else following
    stored = results[1 + bool(masks[YS]) : len(results) - (len(masks) > U)]
    history = tuple(history)
    if slot == APART:
        history = tuple(stored)
    elif slot != NOWHERE:
        history = (*history[:slot], stored[0], *history[slot + 1 :])
    return Stepped(following, point, history, results[-1] if len(masks) > U else None)


def unsupported(
    x: torch.Tensor,
    y: torch.Tensor,
    history: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor],
    z: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> str | None:
    """Why the kernel does not take this step; None if it does."""
    for name, t in (("x", x), ("y", y), ("z", z), ("table", table), *(("history", h) for h in history)):
        if t is not None and t.dtype != torch.float32:
            return f"{name} must be float32, got {t.dtype}"
    for t in outputs:
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"outputs must be float32, bfloat16 or float16, got {t.dtype}"
    if not 1 <= len(outputs) <= 3:
        return f"outputs must be one to three, got {len(outputs)}"
    if x.numel() > 2**30:
        return f"x must have at most 2^30 elements, got {x.numel()}"
    if x.numel() > len(x) * 2**26:
        return f"a sample must have at most 2^26 elements, got {x.numel() // len(x)}"
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, y, z, *history, *outputs)
    ):
        return "gradients flow, and the kernel has no backward"
    return None


# --- cases -----------------------------------------------------------------------------------------------------------


def _case(
    shape: tuple[int, ...],
    held: int = 0,
    outputs: int = 1,
    dtype: torch.dtype = torch.float32,
    slot: int | None = None,
    draws: bool = False,
    z: bool = False,
    clips: bool = False,
    products: bool = False,
    apart: bool = False,
    two: bool = False,
    unwritten: int | None = None,
) -> Any:
    """A step that reads all it can: from ``two`` registers, samples ``apart`` in row, lane and slot, noise or ``z``."""
    rows, lanes, sources = 5, 2, HISTORY + held + outputs
    slot = (APART if apart and held else NOWHERE) if slot is None else slot

    def make(device: torch.device | str) -> dict[str, Any]:
        def one(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return randn(*shape, device=device, dtype=dtype, seed=seed)

        def counters(n: int) -> torch.Tensor:
            return (
                torch.arange(shape[0], device=device) * 7 % n
                if apart
                else torch.full((1,), n // 2, device=device)
            )

        x = one(0)
        everything = (1 << sources) - 1 - (0 if two else 1 << Y) - (0 if draws or z else 1 << Z)
        network = everything & ~((1 << HISTORY + held) - 1) | (1 << Y if two else 1 << X)
        if clips:  # one x0 in the place of the outputs
            everything = everything & ((1 << HISTORY + held + 1) - 1)
        written = (
            everything & ((1 << HISTORY) - 1 | ~((1 << HISTORY + held) - 1)) & ~(1 << Z | 1 << X) | 1 << Y
        )
        masks = [
            network if clips else 0,
            written if slot != NOWHERE else 0,
            everything,
            everything if two else 0,
        ]
        return {
            "x": x,
            "y": one(1) if two else x,
            "history": [None if k == unwritten else one(2 + k) for k in range(held)],
            "outputs": [one(10 + k, dtype) for k in range(outputs)],
            "table": randn(rows, lanes, 6 if products else 4, sources, device=device, seed=20),
            "row": counters(rows),
            "lane": counters(lanes),
            "masks": masks + [everything, everything] * products,
            "slot": slot,
            "slots": torch.arange(rows, device=device) % max(held, 1) if slot == APART else None,
            "z": one(30) if z else None,
            "seed": torch.full((1,), 2**40 + 3, device=device) if draws else None,
            "ids": torch.arange(shape[0], device=device) * 5 if draws else None,
            "limit": torch.full((1,), 0.75, device=device) if clips else None,
        }

    return make


HALF = torch.bfloat16
CASES = [
    Case("euler", _case((2, 3, 8, 8))),
    Case("ragged, guided, two stored", _case((3, 17, 13), held=2, outputs=2, slot=1)),
    Case("one dimension", _case((5,), held=1, slot=0, z=True)),
    Case("five dimensions, two registers", _case((2, 2, 3, 4, 5), held=3, outputs=3, slot=2, two=True, unwritten=0)),
    Case("noise, flat", _case((3, 4, 5), draws=True), tolerance=2e-6),
    Case("noise, ragged", _case((3, 7, 3), held=1, slot=0, draws=True, clips=True), tolerance=2e-6),
    Case("noise, ragged, alone", _case((1, 7, 3), draws=True), tolerance=2e-6),
    Case("all of it", _case((3, 2, 600), 3, 3, draws=True, clips=True, products=True, apart=True, two=True),
         tolerance=2e-6),
    Case("apart", _case((7, 33), held=2, outputs=2, apart=True, unwritten=1)),
    Case("products over blocks", _case((2, 3 * BLOCK + 40), outputs=2, products=True)),
    Case("empty", _case((0, 3), held=1, outputs=2, slot=0, products=True)),
    # the arguments' bfloat16 is exact in what is compared with
    Case("half", _case((2, 64, 5), held=1, outputs=2, dtype=torch.float16, slot=0)),
    Case("SDXL, guided, order 2", _case((4, 4, 128, 128), 2, 2, HALF, slot=0), real=True),
    Case("Flux, Euler", _case((1, 16, 128, 128), 0, 1, HALF), real=True),
    Case("Flux, order 3, float32", _case((4, 16, 128, 128), 3, 1, slot=1), real=True),
    Case("Wan 480p, guided, order 2", _case((1, 16, 21, 60, 104), 2, 2, HALF, slot=0), real=True),
    Case("Wan 480p, guided, noise, clip", _case((1, 16, 21, 60, 104), 2, 2, HALF, slot=0, draws=True, clips=True),
         real=True, tolerance=2e-6),
    Case("Wan 480p, all of it", _case((1, 16, 21, 60, 104), 3, 3, HALF, draws=True, clips=True, products=True,
                                      apart=True, two=True), real=True, tolerance=2e-6),
    Case("512 particles, noise, products", _case((512, 4, 64, 64), 0, 3, HALF, draws=True, products=True), real=True,
         tolerance=2e-6),
    Case("digits, batch 4096, apart", _case((4096, 1, 8, 8), 3, 1, apart=True), real=True),
    Case("points, batch 2^20", _case((2**20, 2), 2, 1, slot=0), real=True),
    Case("ragged, batch 64", _case((64, 3, 17, 13), 2, 1, HALF, slot=1), real=True),
]  # fmt: skip
