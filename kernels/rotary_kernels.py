"""The Triton kernels of ``rms_norm_rotary``: a program takes heads of one token, so that its angles are read once."""

from __future__ import annotations

from .lang import jit, tl


@jit
def load_pairs(at, first, half, mask, INTERLEAVED: tl.constexpr):
    """The two members of each pair, (R, N/2) each: neighbours are read side by side and then told apart."""
    if INTERLEAVED:
        both = tl.load(at + first, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (both.shape[0], both.shape[1] // 2, 2)))
    else:
        a = tl.load(at + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + first + half, mask=mask, other=0.0).to(tl.float32)
    return a, b


@jit
def store_pairs(at, first, half, a, b, mask, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        both = tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1] * 2))
        tl.store(at + first, both.to(at.dtype.element_ty), mask=mask)
    else:
        tl.store(at + first, a.to(at.dtype.element_ty), mask=mask)
        tl.store(at + first + half, b.to(at.dtype.element_ty), mask=mask)


@jit
def rms_norm_rotary_kernel(
    x, weight, cos, sin, y, heads, start, length, xb, xl, xh, yb, yl,
    INTERLEAVED: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's heads, HEADS of them; the pairs of a head are its D channels in BLOCK (interleaved) or 2 BLOCK."""
    sample, token = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, BLOCK)[None]
    half: tl.constexpr = D // 2
    some = channel < (D if INTERLEAVED else half)
    inside = (head < heads) & some
    a, b = load_pairs(x + sample * xb + token * xl, head * xh + channel, half, inside, INTERLEAVED)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / D + EPS)[:, None]
    a, b = a * rstd, b * rstd
    if weight is not None:
        wa, wb = load_pairs(weight, channel, half, some, INTERLEAVED)
        a, b = a * wa, b * wb
    if cos is not None:
        turn = token - start
        if (turn >= 0) & (turn < length):
            ca, cb = load_pairs(cos + turn * D, channel, half, some, INTERLEAVED)
            sa, sb = load_pairs(sin + turn * D, channel, half, some, INTERLEAVED)
            a, b = a * ca - b * sa, b * cb + a * sb
    store_pairs(y + sample * yb + token * yl, head * D + channel, half, a, b, inside, INTERLEAVED)


@jit
def rms_norm_rotary_backward_kernel(
    dy, x, weight, cos, sin, dx, partial, count, heads, programs, start, length, xb, xl, xh, yb, yl,
    SUMS: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, STEPS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    sample, program = tl.program_id(2).to(tl.int64), tl.program_id(0)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, BLOCK)[None]
    half: tl.constexpr = D // 2
    some = channel < (D if INTERLEAVED else half)
    sum_a, sum_b = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
    for step in range(STEPS):
        token = (program * STEPS + step).to(tl.int64)
        inside = (head < tl.where(token < count, heads, 0)) & some
        a, b = load_pairs(x + sample * xb + token * xl, head * xh + channel, half, inside, INTERLEAVED)
        ga, gb = load_pairs(dy + sample * yb + token * yl, head * D + channel, half, inside, INTERLEAVED)
        if cos is not None:
            turn = token - start
            if (turn >= 0) & (turn < length):
                ca, cb = load_pairs(cos + turn * D, channel, half, some, INTERLEAVED)
                sa, sb = load_pairs(sin + turn * D, channel, half, some, INTERLEAVED)
                ga, gb = ga * ca + gb * sb, gb * cb - ga * sa
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / D + EPS)[:, None]
        a, b = a * rstd, b * rstd
        if weight is not None:
            if SUMS:
                sum_a += tl.sum(ga * a, 0)
                sum_b += tl.sum(gb * b, 0)
            wa, wb = load_pairs(weight, channel, half, some, INTERLEAVED)
            ga, gb = ga * wa, gb * wb
        inner = (tl.sum(ga * a + gb * b, 1) / D)[:, None]
        ga, gb = rstd * (ga - a * inner), rstd * (gb - b * inner)
        at = dx + ((sample * count + token) * heads) * D
        store_pairs(at, head * D + channel, half, ga, gb, inside, INTERLEAVED)
    if SUMS:
        row = (sample * tl.num_programs(1) + tl.program_id(1)) * programs + program
        at = partial + row * D
        store_pairs(at, channel, half, sum_a[None], sum_b[None], some, INTERLEAVED)
