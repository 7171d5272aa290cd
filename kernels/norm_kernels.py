"""The Triton kernels of ``layer_norm_modulate`` and ``gate_residual``: a program takes whole rows, tokens by channels.

Rows are read once and stay in registers for mean, variance and result. Pointers that are None are not there: Triton
compiles a kernel for each such choice. A backward pass takes STEPS tiles of a sample in turn and leaves its sums over
tokens, one row a program, for a second stage.
"""

from __future__ import annotations

from .lang import jit, tl


@jit
def standardise(x, inside, C: tl.constexpr, EPS: tl.constexpr):
    """Rows of a tile (R, N) with mean 0 and variance 1 over their C channels ``inside``, and 1 / std (R,)."""
    centred = tl.where(inside, x - tl.sum(x, 1)[:, None] / C, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)
    return centred * rstd[:, None], rstd


@jit
def standardise_backward(g, n, rstd, C: tl.constexpr):
    """The gradient of the rows from that of the standardised ones, ``g``, which is 0 outside."""
    return rstd[:, None] * (g - tl.sum(g, 1)[:, None] / C - n * (tl.sum(g * n, 1)[:, None] / C))


@jit
def load_modulation(pointer, token, channel, stride, inside, some, EACH: tl.constexpr):
    """A scale, shift or gate as float32: (R, N) where it is one EACH token, else (1, N)."""
    if EACH:
        value = tl.load(pointer + (token * stride + channel), mask=inside, other=0.0)
    else:
        value = tl.load(pointer + channel, mask=some, other=0.0)
    return value.to(tl.float32)


@jit
def load_channels(pointer, channel, some):
    """A weight or bias as float32, (1, N)."""
    return tl.load(pointer + channel, mask=some, other=0.0).to(tl.float32)


@jit
def modulated(
    row, scale, shift, weight, bias, sample, token, channel, sb, sl, tb, tt, inside, some,
    EACH: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The norm of a tile of rows, with whatever weight, bias, scale and shift there are."""
    value, _ = standardise(row, inside, C, EPS)
    if weight is not None:
        value = value * load_channels(weight, channel, some)
    if bias is not None:
        value = value + load_channels(bias, channel, some)
    if scale is not None:
        s = load_modulation(scale + sample * sb, token, channel, sl, inside, some, EACH)
        t = load_modulation(shift + sample * tb, token, channel, tt, inside, some, EACH)
        value = value * (1.0 + s) + t
    return value


@jit
def modulated_backward(
    g, row, scale, weight, bias, dscale, start, out, sample, token, channel, sb, sl, inside, some, sums,
    EACH: tl.constexpr, MODULATION: tl.constexpr, AFFINE: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of rows from that of their norm, ``g``; that of a scale a token is stored, and
    those that tokens share are added to ``sums``: scale, shift, weight, bias, (N,) each."""
    scales, shifts, weights, biases = sums
    n, rstd = standardise(row, inside, C, EPS)
    if scale is not None:
        if MODULATION:
            value = n
            if weight is not None:
                value = value * load_channels(weight, channel, some)
            if bias is not None:
                value = value + load_channels(bias, channel, some)
            if EACH:
                tl.store(dscale + start + out, (g * value).to(dscale.dtype.element_ty), mask=inside)
            else:
                scales += tl.sum(g * value, 0)
                shifts += tl.sum(g, 0)
        g = g * (1.0 + load_modulation(scale + sample * sb, token, channel, sl, inside, some, EACH))
    if weight is not None:
        if AFFINE:
            weights += tl.sum(g * n, 0)
            biases += tl.sum(g, 0)
        g = g * load_channels(weight, channel, some)
    return standardise_backward(g, n, rstd, C), (scales, shifts, weights, biases)


@jit
def store_sums(at, plane, sums, mask, MODULATION: tl.constexpr, AFFINE: tl.constexpr):
    """The sums that are wanted, a plane each."""
    scales, shifts, weights, biases = sums
    if MODULATION:
        tl.store(at, scales, mask=mask)
        tl.store(at + plane, shifts, mask=mask)
        at += 2 * plane
    if AFFINE:
        tl.store(at, weights, mask=mask)
        tl.store(at + plane, biases, mask=mask)


@jit
def layer_norm_modulate_kernel(
    x, scale, shift, weight, bias, y, count, xb, xl, sb, sl, tb, tt,
    EACH: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, BLOCK)[None]
    some = channel < C
    inside = (token < count) & some
    start = sample * count * C
    row = tl.load(x + sample * xb + (token * xl + channel), mask=inside, other=0.0).to(tl.float32)
    value = modulated(
        row, scale, shift, weight, bias, sample, token, channel, sb, sl, tb, tt, inside, some, EACH, C, EPS
    )
    tl.store(y + start + (token * C + channel), value.to(y.dtype.element_ty), mask=inside)


@jit
def layer_norm_modulate_backward_kernel(
    dy, x, scale, weight, bias, dx, dscale, partial, batch, count, programs, xb, xl, sb, sl,
    EACH: tl.constexpr, MODULATION: tl.constexpr, AFFINE: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    column = tl.arange(0, BLOCK)
    channel = column[None]
    some = channel < C
    start = sample * count * C
    none = tl.zeros([BLOCK], tl.float32)
    sums = (none, none, none, none)
    for step in range(STEPS):
        token = ((program * STEPS + step) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (token < count) & some
        out = token * C + channel
        row = tl.load(x + sample * xb + (token * xl + channel), mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + start + out, mask=inside, other=0.0).to(tl.float32)
        g, sums = modulated_backward(
            g, row, scale, weight, bias, dscale, start, out, sample, token, channel, sb, sl, inside, some, sums,
            EACH, MODULATION, AFFINE, C, EPS,
        )  # fmt: skip
        tl.store(dx + start + out, g.to(dx.dtype.element_ty), mask=inside)
    at = partial + (sample * programs + program) * C + column
    store_sums(at, batch * programs * C, sums, column < C, MODULATION and not EACH, AFFINE)


@jit
def gate_residual_kernel(
    x, h, gate, scale, shift, weight, bias, r, y, count, xb, xl, hb, hl, gb, gl, sb, sl, tb, tt,
    GATES: tl.constexpr, EACH: tl.constexpr, NORM: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, BLOCK)[None]
    some = channel < C
    inside = (token < count) & some
    start, out = sample * count * C, token * C + channel
    value = tl.load(h + sample * hb + (token * hl + channel), mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        value = value * load_modulation(gate + sample * gb, token, channel, gl, inside, some, GATES)
    value += tl.load(x + sample * xb + (token * xl + channel), mask=inside, other=0.0).to(tl.float32)
    value = value.to(r.dtype.element_ty)
    tl.store(r + start + out, value, mask=inside)
    if NORM:
        value = modulated(
            value.to(tl.float32), scale, shift, weight, bias, sample, token, channel, sb, sl, tb, tt, inside, some,
            EACH, C, EPS,
        )  # fmt: skip
        tl.store(y + start + out, value.to(y.dtype.element_ty), mask=inside)


@jit
def gate_residual_backward_kernel(
    dr, dy, r, h, gate, scale, weight, bias, dx, dh, dgate, dscale, partial,
    batch, count, programs, hb, hl, gb, gl, sb, sl,
    GATES: tl.constexpr, EACH: tl.constexpr, NORM: tl.constexpr,
    GATE: tl.constexpr, MODULATION: tl.constexpr, AFFINE: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    column = tl.arange(0, BLOCK)
    channel = column[None]
    some = channel < C
    start = sample * count * C
    none = tl.zeros([BLOCK], tl.float32)
    gates, sums = none, (none, none, none, none)
    for step in range(STEPS):
        token = ((program * STEPS + step) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (token < count) & some
        out = token * C + channel
        if NORM:
            row = tl.load(r + start + out, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(dy + start + out, mask=inside, other=0.0).to(tl.float32)
            g, sums = modulated_backward(
                g, row, scale, weight, bias, dscale, start, out, sample, token, channel, sb, sl, inside, some, sums,
                EACH, MODULATION, AFFINE, C, EPS,
            )  # fmt: skip
            total = g + tl.load(dr + start + out, mask=inside, other=0.0).to(tl.float32)
        else:
            total = tl.load(dr + start + out, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + start + out, total.to(dx.dtype.element_ty), mask=inside)
        if gate is not None:
            if GATE:
                value = tl.load(h + sample * hb + (token * hl + channel), mask=inside, other=0.0).to(
                    tl.float32
                )
                if GATES:
                    tl.store(dgate + start + out, (total * value).to(dgate.dtype.element_ty), mask=inside)
                else:
                    gates += tl.sum(total * value, 0)
            value = total * load_modulation(gate + sample * gb, token, channel, gl, inside, some, GATES)
            tl.store(dh + start + out, value.to(dh.dtype.element_ty), mask=inside)
    plane = batch * programs * C
    at = partial + (sample * programs + program) * C + column
    if GATE and not GATES:
        tl.store(at, gates, mask=column < C)
        at += plane
    store_sums(at, plane, sums, column < C, MODULATION and not EACH, AFFINE)
