"""The Triton kernels of ``group_norm_silu``, on images as (samples, channels, places) with any strides.

``whole_kernel`` takes a group that fits a program. Else ``pieces_kernel`` takes channels piece by piece,
``join_kernel`` joins the pieces of a group, and ``apply_kernel`` reads x again; backward, ``sums_kernel`` and
``inputs_kernel``. A tile is CHANNELS x PLACES, whichever of the two lie side by side.
"""

from __future__ import annotations

from .lang import jit, tl


@jit
def load_channel(pointer, sample, channel, stride, some):
    """What a channel has one of, (N, 1), as float32; ``stride`` is 0 where all samples share it."""
    return tl.load(pointer + sample * stride + channel, mask=some, other=0.0).to(tl.float32)[:, None]


@jit
def activated(value, SILU: tl.constexpr):
    if SILU:
        value = value * tl.sigmoid(value)
    return value


@jit
def whole_kernel(
    x, weight, bias, add, y, means, rstds, size, groups, each, xn, xc, xs, wn,
    SILU: tl.constexpr, EPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """A group at once: ``each`` channels of ``size`` places."""
    sample, group = tl.program_id(1).to(tl.int64), tl.program_id(0)
    inner = tl.arange(0, CHANNELS)
    some, channel = inner < each, group * each + inner
    place = tl.arange(0, PLACES)[None]
    inside = some[:, None] & (place < size)
    at = channel[:, None] * xc + place * xs
    value = tl.load(x + sample * xn + at, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        value += load_channel(add, sample, channel, groups * each, some)
    value = tl.where(inside, value, 0.0)
    mean = tl.sum(tl.sum(value, 1), 0) / (each * size)
    value = tl.where(inside, value - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / (each * size) + EPS)
    value *= rstd
    if weight is not None:
        value *= load_channel(weight, sample, channel, wn, some)
        value += load_channel(bias, sample, channel, wn, some)
    tl.store(y + sample * xn + at, activated(value, SILU).to(y.dtype.element_ty), mask=inside)
    tl.store(means + sample * groups + group, mean)
    tl.store(rstds + sample * groups + group, rstd)


@jit
def pieces_kernel(
    x, means, squares, count, size, pieces, xn, xc, xs,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The mean and the sum of centred squares of each channel over a piece of STEPS tiles."""
    sample, piece = tl.program_id(2).to(tl.int64), tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    some = channel < count
    mean, square = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    seen = 0.0
    for step in range(STEPS):
        first = (piece * STEPS + step) * PLACES
        place = (first + tl.arange(0, PLACES))[None]
        inside = some[:, None] & (place < size)
        at = channel[:, None] * xc + place * xs
        value = tl.load(x + sample * xn + at, mask=inside, other=0.0).to(tl.float32)
        here = tl.minimum(tl.maximum(size - first, 0), PLACES).to(tl.float32)
        new = tl.sum(value, 1) / tl.maximum(here, 1.0)
        value = tl.where(inside, value - new[:, None], 0.0)
        share = here / tl.maximum(seen + here, 1.0)
        gap = new - mean
        mean += gap * share
        square += tl.sum(value * value, 1) + gap * gap * (seen * share)
        seen += here
    at = (sample * count + channel) * pieces + piece
    tl.store(means + at, mean, mask=some)
    tl.store(squares + at, square, mask=some)


@jit
def join_kernel(
    piece_means, piece_squares, add, means, rstds, size, groups, each, pieces, length,
    EPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean and 1 / std of a group from its pieces, which are of ``length`` places but for the last."""
    sample, group = tl.program_id(1).to(tl.int64), tl.program_id(0)
    start = (sample * groups + group) * each
    pivot = tl.load(piece_means + start * pieces)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        k = step * BLOCK + tl.arange(0, BLOCK)
        inside = k < each * pieces
        weight = tl.where(inside, tl.minimum(size - (k % pieces) * length, length), 0).to(tl.float32)
        value = tl.load(piece_means + start * pieces + k, mask=inside, other=0.0)
        if add is not None:
            value += tl.load(add + start + k // pieces, mask=inside, other=0.0).to(tl.float32)
        total += weight * (value - pivot)
    mean = pivot + tl.sum(total, 0) / (each * size)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        k = step * BLOCK + tl.arange(0, BLOCK)
        inside = k < each * pieces
        weight = tl.where(inside, tl.minimum(size - (k % pieces) * length, length), 0).to(tl.float32)
        value = tl.load(piece_means + start * pieces + k, mask=inside, other=0.0)
        if add is not None:
            value += tl.load(add + start + k // pieces, mask=inside, other=0.0).to(tl.float32)
        value -= mean
        total += weight * value * value + tl.load(piece_squares + start * pieces + k, mask=inside, other=0.0)
    tl.store(means + sample * groups + group, mean)
    tl.store(rstds + sample * groups + group, tl.rsqrt(tl.sum(total, 0) / (each * size) + EPS))


@jit
def normalised(
    x, add, means, rstds, sample, channel, place, count, size, groups, each, xn, xc, xs, some, inside
):
    """A tile of n, the 1 / std of its channels, and where in its sample it stands."""
    at = channel[:, None] * xc + place * xs
    value = tl.load(x + sample * xn + at, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        value += load_channel(add, sample, channel, count, some)
    rstd = load_channel(rstds, sample, channel // each, groups, some)
    return (value - load_channel(means, sample, channel // each, groups, some)) * rstd, rstd, at


@jit
def apply_kernel(
    x, weight, bias, add, means, rstds, y, count, size, groups, each, xn, xc, xs, wn,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = (tl.program_id(0) * PLACES + tl.arange(0, PLACES))[None]
    some = channel < count
    inside = some[:, None] & (place < size)
    value, _, at = normalised(
        x, add, means, rstds, sample, channel, place, count, size, groups, each, xn, xc, xs, some, inside
    )
    if weight is not None:
        value *= load_channel(weight, sample, channel, wn, some)
        value += load_channel(bias, sample, channel, wn, some)
    tl.store(y + sample * xn + at, activated(value, SILU).to(y.dtype.element_ty), mask=inside)


@jit
def gradient(dy, weight, bias, n, at, sample, channel, xn, wn, some, inside, SILU: tl.constexpr):
    """A tile of the gradient before the activation, with the weights of its channels (1 where there are none)."""
    g = tl.load(dy + sample * xn + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.where(some, 1.0, 0.0)[:, None]
    if weight is not None:
        w = load_channel(weight, sample, channel, wn, some)
    if SILU:
        v = n * w
        if bias is not None:
            v += load_channel(bias, sample, channel, wn, some)
        s = tl.sigmoid(v)
        g *= s * (1.0 + v * (1.0 - s))
    return g, w


@jit
def sums_kernel(
    dy, x, weight, bias, add, means, rstds, partial, batch, count, size, groups, each, pieces, xn, xc, xs, wn,
    SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The sums of g and of g n over a piece of each channel."""
    sample, piece = tl.program_id(2).to(tl.int64), tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    some = channel < count
    plain, times = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for step in range(STEPS):
        place = ((piece * STEPS + step) * PLACES + tl.arange(0, PLACES))[None]
        inside = some[:, None] & (place < size)
        n, _, at = normalised(
            x, add, means, rstds, sample, channel, place, count, size, groups, each, xn, xc, xs, some, inside
        )
        g, _ = gradient(dy, weight, bias, n, at, sample, channel, xn, wn, some, inside, SILU)
        plain += tl.sum(g, 1)
        times += tl.sum(g * n, 1)
    at = (sample * count + channel) * pieces + piece
    tl.store(partial + at, plain, mask=some)
    tl.store(partial + batch * count * pieces + at, times, mask=some)


@jit
def inputs_kernel(
    dy, x, weight, bias, add, means, rstds, group_means, dx, batch, count, size, groups, each, xn, xc, xs, wn,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The gradient of x, with the means over each group of g weight and g weight n."""
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = (tl.program_id(0) * PLACES + tl.arange(0, PLACES))[None]
    some = channel < count
    inside = some[:, None] & (place < size)
    n, rstd, at = normalised(
        x, add, means, rstds, sample, channel, place, count, size, groups, each, xn, xc, xs, some, inside
    )
    g, w = gradient(dy, weight, bias, n, at, sample, channel, xn, wn, some, inside, SILU)
    plain = load_channel(group_means, sample, channel // each, groups, some)
    times = load_channel(group_means + batch * groups, sample, channel // each, groups, some)
    tl.store(dx + sample * xn + at, (rstd * (g * w - plain - n * times)).to(dx.dtype.element_ty), mask=inside)
