"""The Triton side of ``mixture_score``: tiles of queries by rows, a running softmax, and the gradient at x.

A tile's distances are summed over the dimensions one by one, as squared differences: what is subtracted are the numbers
themselves, so a small sigma loses nothing. The softmax's sums over rows are products on tensor cores, in float32 or in
three products of its halves; a tile whose weights are all exactly 0 skips them. The rows are summed in parts (the
grid's second axis), whose number depends on the rows alone, and ``fold_kernel`` adds the parts in order.
"""

from __future__ import annotations

from typing import Any

import torch

from .lang import ceil_div, interpreting, jit, next_power_of_2, tl

SPLITS = 16  # parts of the rows, so that few queries keep a GPU busy
ROWS = 1024  # at least, a part
WORKSPACE = 2**26  # numbers, in all parts together
TILE = 32  # queries, and rows: more spills somewhere between sm_80, sm_100, 64 and 128 dimensions


@jit
def _noise(alphas, sigmas, q, inside, POINTS: tl.constexpr):
    alpha = tl.load(alphas + q, mask=inside, other=1.0)
    sigma = tl.load(sigmas + q, mask=inside, other=1.0)
    noise = sigma * sigma
    clean = noise != noise
    if POINTS:
        clean = noise == 0.0
        noise = tl.where(clean, 1.0, noise)
    return alpha, noise, clean


@jit
def _logits(
    square, alpha, noise, k, q, real, inside, log_weights, variances, label, labels,
    D: tl.constexpr, POINTS: tl.constexpr, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, and 1 / v and s / v, or nothing where there are points."""
    if POINTS:
        over, share = (1.0 / noise)[:, None], 0.0
        logits = square * (-0.5 * over)
    else:
        s = tl.load(variances + k, mask=real, other=1.0)
        v = (alpha * alpha)[:, None] * s[None, :] + noise[:, None]
        over = 1.0 / v
        share = s[None, :] * over
        logits = -0.5 * (square * over + D * tl.log(v))
    if WEIGHTED:
        logits += tl.load(log_weights + k, mask=real, other=0.0)[None, :]
    keeps = real[None, :]
    if LABELLED:
        mine = tl.load(label + q, mask=inside, other=-1)[:, None]
        keeps = keeps & ((mine == tl.load(labels + k, mask=real, other=-2)[None, :]) | (mine == -1))
    return tl.where(keeps, logits, float("-inf")), over, share


@jit
def forward_kernel(
    x, rows, columns, alphas, sigmas, log_weights, variances, label, labels, maxima, totals, shares, means,
    queries, count, each,
    D: tl.constexpr, PAD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    POINTS: tl.constexpr, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    inside = q < queries
    axis = tl.arange(0, PAD)
    alpha, noise, clean = _noise(alphas, sigmas, q, inside, POINTS)
    maximum = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    kept_x = tl.zeros((BQ,), tl.float32)
    mean = tl.zeros((BQ, PAD), tl.float32)
    start = tl.program_id(1) * each
    end = tl.minimum(start + each, count)
    while start < end:
        k = start + tl.arange(0, BK)
        real = k < end
        square = tl.zeros((BQ, BK), tl.float32)
        for d in range(D):
            here = tl.load(x + d * queries + q, mask=inside, other=0.0)
            y = tl.load(columns + d * count + k, mask=real, other=0.0)
            apart = here[:, None] - alpha[:, None] * y[None, :]
            square += apart * apart
        logits, over, share = _logits(
            square, alpha, noise, k, q, real, inside, log_weights, variances, label, labels,
            D, POINTS, WEIGHTED, LABELLED,
        )  # fmt: skip
        highest = tl.maximum(maximum, tl.max(logits, 1))
        anchor = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp(logits - anchor[:, None])
        shrink = tl.exp(maximum - anchor)
        if POINTS:
            weights = tl.where(clean[:, None], tl.where(logits == anchor[:, None], 1.0, 0.0), weights)
            shrink = tl.where(clean & (highest > maximum), 0.0, shrink)
        if tl.max(tl.max(weights, 1), 0) > 0.0:
            total = total * shrink + tl.sum(weights, 1)
            if not POINTS:
                kept_x = kept_x * shrink + tl.sum(weights * share, 1)
                weights = weights * (noise[:, None] * over)
            tile = tl.load(
                rows + k[:, None] * D + axis[None, :], mask=real[:, None] & (axis < D)[None, :], other=0.0
            )
            mean = tl.dot(weights, tile, acc=mean * shrink[:, None], input_precision=PRECISION)
        maximum = highest
        start += BK
    at = tl.program_id(1).to(tl.int64) * queries + q
    tl.store(maxima + at, maximum, mask=inside)
    tl.store(totals + at, total, mask=inside)
    if not POINTS:
        tl.store(shares + at, kept_x, mask=inside)
    tl.store(means + at[:, None] * D + axis[None, :], mean, mask=inside[:, None] & (axis < D)[None, :])


@jit
def backward_kernel(
    x, rows, columns, alphas, sigmas, log_weights, variances, label, labels, mean, slope, density, density_slope,
    totals, shares, pulls, pulled, queries, count, each,
    D: tl.constexpr, PAD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    POINTS: tl.constexpr, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr,
):  # fmt: skip
    """With a_k = slope.(E_k - E) + density_slope: sums of p_k, p_k s_k / v_k, p_k a_k / v_k, and p_k a_k / v_k y_k."""
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    inside = q < queries
    axis = tl.arange(0, PAD)
    alpha, noise, clean = _noise(alphas, sigmas, q, inside, POINTS)
    anchor = tl.load(density + q, mask=inside, other=0.0) + D * 0.9189385332046727  # log(2 pi) / 2
    if POINTS:
        anchor += 0.5 * D * tl.log(noise)
    rise = tl.load(density_slope + q, mask=inside, other=0.0)
    total = tl.zeros((BQ,), tl.float32)
    kept_x = tl.zeros((BQ,), tl.float32)
    pull = tl.zeros((BQ,), tl.float32)
    toward = tl.zeros((BQ, PAD), tl.float32)
    start = tl.program_id(1) * each
    end = tl.minimum(start + each, count)
    while start < end:
        k = start + tl.arange(0, BK)
        real = k < end
        square = tl.zeros((BQ, BK), tl.float32)
        along = tl.zeros((BQ, BK), tl.float32)
        away = tl.zeros((BQ, BK), tl.float32)
        for d in range(D):
            here = tl.load(x + d * queries + q, mask=inside, other=0.0)
            g = tl.load(slope + d * queries + q, mask=inside, other=0.0)
            centre = tl.load(mean + d * queries + q, mask=inside, other=0.0)
            y = tl.load(columns + d * count + k, mask=real, other=0.0)
            apart = here[:, None] - alpha[:, None] * y[None, :]
            square += apart * apart
            along += g[:, None] * (y[None, :] - centre[:, None])
            if not POINTS:
                away += g[:, None] * apart
        logits, over, share = _logits(
            square, alpha, noise, k, q, real, inside, log_weights, variances, label, labels,
            D, POINTS, WEIGHTED, LABELLED,
        )  # fmt: skip
        weights = tl.exp(logits - anchor[:, None])
        if tl.max(tl.max(weights, 1), 0) > 0.0:
            total += tl.sum(weights, 1)
            if not POINTS:
                kept_x += tl.sum(weights * share, 1)
                along += alpha[:, None] * share * away
            weights = weights * (along + rise[:, None]) * over
            pull += tl.sum(weights, 1)
            tile = tl.load(
                rows + k[:, None] * D + axis[None, :], mask=real[:, None] & (axis < D)[None, :], other=0.0
            )
            toward = tl.dot(weights, tile, acc=toward, input_precision=PRECISION)
        start += BK
    at = tl.program_id(1).to(tl.int64) * queries + q
    tl.store(totals + at, total, mask=inside)
    if not POINTS:
        tl.store(shares + at, kept_x, mask=inside)
    tl.store(pulls + at, pull, mask=inside)
    tl.store(pulled + at[:, None] * D + axis[None, :], toward, mask=inside[:, None] & (axis < D)[None, :])


@jit
def fold_kernel(
    x, alphas, sigmas, maxima, totals, shares, means, out, density, queries, splits,
    D: tl.constexpr, PAD: tl.constexpr, BQ: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """The parts of the rows together, always in the same order."""
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    inside = q < queries
    axis = tl.arange(0, PAD)
    tile = inside[:, None] & (axis < D)[None, :]
    alpha, noise, clean = _noise(alphas, sigmas, q, inside, POINTS)
    maximum = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    kept_x = tl.zeros((BQ,), tl.float32)
    mean = tl.zeros((BQ, PAD), tl.float32)
    part = 0
    while part < splits:
        at = part.to(tl.int64) * queries + q
        theirs = tl.load(maxima + at, mask=inside, other=0.0)
        highest = tl.maximum(maximum, theirs)
        anchor = tl.where(highest == float("-inf"), 0.0, highest)
        ours, other = tl.exp(maximum - anchor), tl.exp(theirs - anchor)
        if POINTS:
            ours = tl.where(clean & (highest > maximum), 0.0, ours)
            other = tl.where(clean & (highest > theirs), 0.0, other)
        total = total * ours + tl.load(totals + at, mask=inside, other=1.0) * other
        if not POINTS:
            kept_x = kept_x * ours + tl.load(shares + at, mask=inside, other=0.0) * other
        there = tl.load(means + at[:, None] * D + axis[None, :], mask=tile, other=0.0)
        mean = mean * ours[:, None] + there * other[:, None]
        maximum = highest
        part += 1
    value = maximum + tl.log(total) - D * 0.9189385332046727  # log(2 pi) / 2
    to = q[:, None].to(tl.int64) * D + axis[None, :]
    mean = mean / total[:, None]
    if POINTS:
        value = tl.where(clean, float("nan"), value - 0.5 * D * tl.log(noise))
    else:
        mean += (alpha * kept_x / total)[:, None] * tl.load(x + to, mask=tile, other=0.0)
    tl.store(out + to, mean, mask=tile)
    tl.store(density + q, value, mask=inside)


def launch(
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    rows: torch.Tensor,
    log_weights: torch.Tensor | None = None,
    variances: torch.Tensor | None = None,
    label: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference`` by the kernel."""
    x, alpha, sigma, rows, label, *mixture = _contiguous(
        x, alpha, sigma, rows, label, log_weights, variances, labels
    )
    out, density = torch.empty_like(x), x.new_empty(len(x))
    for part in _parts(x, rows):
        query, a, s, mine = x[part], alpha[part], sigma[part], label if label is None else label[part]
        maxima, totals, shares, means = parts = _workspace(query, rows, 3)
        _run(forward_kernel, query, a, s, rows, mixture, mine, (), parts)
        fold_kernel[(ceil_div(len(query), 16),)](
            query, a, s, maxima, totals, shares, means, out[part], density[part], len(query), len(maxima),
            **_sizes(rows, variances), BQ=16,
        )  # fmt: skip
    return out, density


def launch_backward(
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    rows: torch.Tensor,
    log_weights: torch.Tensor | None,
    variances: torch.Tensor | None,
    label: torch.Tensor | None,
    labels: torch.Tensor | None,
    mean: torch.Tensor,
    density: torch.Tensor,
    slope: torch.Tensor,
    density_slope: torch.Tensor,
) -> torch.Tensor:
    """The gradient at x, (Q, D), for gradients ``slope`` at the mean and ``density_slope`` at the density."""
    x, alpha, sigma, rows, label, *mixture = _contiguous(
        x, alpha, sigma, rows, label, log_weights, variances, labels
    )
    density, density_slope = _contiguous(density, density_slope)
    slopes = []
    for part in _parts(x, rows):
        query, a, s, mine = x[part], alpha[part], sigma[part], label if label is None else label[part]
        totals, shares, pulls, pulled = parts = _workspace(query, rows, 3)
        given = (
            mean[part].mT.contiguous(),
            slope[part].mT.contiguous(),
            density[part],
            density_slope[part],
        )
        _run(backward_kernel, query, a, s, rows, mixture, mine, given, parts)
        total, pull, away = totals.sum(0), pulls.sum(0), pulled.sum(0)
        found = a[:, None] * away - pull[:, None] * query
        if variances is not None:
            found = found + (a * shares.sum(0))[:, None] * slope[part]
        found = found / total[:, None]
        slopes.append(found if variances is not None else torch.where((s == 0)[:, None], 0.0, found))
    return torch.cat(slopes) if slopes else torch.empty_like(x)


def _contiguous(*tensors: torch.Tensor | None) -> list[Any]:
    return [t if t is None else t.contiguous() for t in tensors]


def _parts(x: torch.Tensor, rows: torch.Tensor) -> list[slice]:
    """Queries of one launch each, so that the workspace has a bound."""
    most = max(1, WORKSPACE // (_splits(len(rows))[0] * x.shape[1]))
    return [slice(i, i + most) for i in range(0, len(x), most)]


def _splits(count: int) -> tuple[int, int]:
    """How many parts the rows have, and the rows of each: of their number alone, so that no batch changes a bit."""
    each = max(ROWS, ceil_div(ceil_div(count, SPLITS), 64) * 64)
    return ceil_div(count, each), each


def _workspace(query: torch.Tensor, rows: torch.Tensor, scalars: int) -> list[torch.Tensor]:
    splits = _splits(len(rows))[0]
    return [
        *(query.new_empty(splits, len(query)) for _ in range(scalars)),
        query.new_empty(splits, *query.shape),
    ]


def _sizes(rows: torch.Tensor, variances: torch.Tensor | None) -> dict[str, Any]:
    dim = rows.shape[1]
    return {"D": dim, "PAD": max(16, next_power_of_2(dim)), "POINTS": variances is None}


def _run(kernel, query, alpha, sigma, rows, mixture, label, given, parts) -> None:
    log_weights, variances, labels = mixture
    sizes, (splits, each) = _sizes(rows, variances), _splits(len(rows))
    kernel[(ceil_div(len(query), TILE), splits)](
        query.mT.contiguous(), rows, rows.mT.contiguous(), alpha, sigma, log_weights, variances, label, labels,
        *given, *parts, len(query), len(rows), each, **sizes, BQ=TILE, BK=TILE, **_options(),
        WEIGHTED=log_weights is not None, LABELLED=labels is not None, num_warps=4, num_stages=1,
    )  # fmt: skip


def _options() -> dict[str, Any]:
    """How a compiler is to multiply float32 by tensor cores: whole (AMD), or as three products of halves.

    ptxas is told that all registers are there: left alone it saves some of them for another program, by spilling.
    """
    if interpreting():
        return {"PRECISION": "ieee"}
    from triton.runtime import driver

    hip = driver.active.get_current_target().backend == "hip"
    return {"PRECISION": "ieee"} if hip else {"PRECISION": "tf32x3", "maxnreg": 255}
