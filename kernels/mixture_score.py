"""Posterior mean and log-density of a mixture of K isotropic Gaussians, or of K points, seen through noise.

With x = alpha x0 + sigma eps, x0 from sum_k w_k N(y_k, s_k I), v_k = alpha^2 s_k + sigma^2, and p the softmax over k of

    log w_k - D/2 log v_k - |x - alpha y_k|^2 / (2 v_k):

    E[x0 | x] = sum_k p_k (sigma^2 / v_k) y_k + x sum_k p_k (alpha s_k / v_k)          log p(x) = their log-sum-exp

Points are s_k = 0: at sigma = 0 the mean is then that of the nearest rows. The kernel (D <= 128, float32) keeps a
running maximum over tiles of rows, as flash attention does, so memory is O(Q D) at any K; its distances are sums of
squared differences, which lose nothing to cancellation where sigma is small. Rows that weigh nothing skip the second
product. Each query is rounded alike in any batch. Above 128 dimensions the chunked products of the reference are the
right program. The gradient goes to x, and does not hold Q x K numbers either.

    >>> import torch
    >>> rows, x, one = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.3]]), torch.ones(1)
    >>> mean, density = mixture_score(x, one, one, rows)
    >>> torch.allclose(mean, x.tanh()), density.shape
    (True, torch.Size([1]))
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .cases import Case, randn
from .dispatch import choose, runs_on
from .mixture_kernels import ROWS, launch, launch_backward

LARGEST = 128  # dimensions that the kernel takes
LOG_2PI = math.log(2 * math.pi)


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    rows: torch.Tensor,
    log_weights: torch.Tensor | None = None,
    variances: torch.Tensor | None = None,
    label: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    chunk: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By matrix products, ``chunk`` rows at a time; ``squares`` are |y_k|^2, where somebody keeps them."""
    clean, noise, common = _shared(x, sigma, rows, variances)
    maximum = x.new_full((len(x),), -math.inf)
    total, kept_x, mean = torch.zeros_like(maximum), torch.zeros_like(maximum), torch.zeros_like(x)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        logits, v = _logits(x, alpha, noise, rows, log_weights, variances, label, labels, squares, part)
        highest = torch.maximum(maximum, logits.detach().amax(-1))
        anchor = torch.where(highest == -math.inf, 0.0, highest)  # nothing kept so far: exp(-inf - 0) = 0
        shrink = torch.where(clean & (highest > maximum), 0.0, (maximum - anchor).exp())
        weights = (logits - anchor[:, None]).exp()
        weights = torch.where(clean[:, None], (logits == highest[:, None]).to(weights), weights)
        total = total * shrink + weights.sum(-1)
        if variances is not None:
            kept_x = kept_x * shrink + (weights * variances[part] / v).sum(-1)
            weights = weights * noise / v
        mean = mean * shrink[:, None] + weights @ rows[part]
        maximum = highest
    if variances is not None:
        mean = mean + (alpha * kept_x)[:, None] * x
    return mean / total[:, None], torch.where(clean, math.nan, maximum + total.log() - common)


def reference_backward(
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
    chunk: int = 4096,
) -> torch.Tensor:
    """The gradient at x, from gradients ``slope`` at the mean and ``density_slope`` at the density.

    With E_k what component k alone would say and a_k = slope.(E_k - E) + density_slope, it is
    sum_k p_k (alpha s_k / v_k) slope - sum_k p_k a_k (x - alpha y_k) / v_k.
    """
    clean, noise, common = _shared(x, sigma, rows, variances)
    found = torch.zeros_like(x)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        logits, v = _logits(x, alpha, noise, rows, log_weights, variances, label, labels, None, part)
        p = (logits - (density + common)[:, None]).exp()
        along = slope @ rows[part].mT - (slope * mean).sum(-1)[:, None]
        if variances is not None:
            gain = alpha[:, None] * variances[part] / v
            along = along + gain * ((slope * x).sum(-1)[:, None] - alpha[:, None] * (slope @ rows[part].mT))
            found = found + (p * gain).sum(-1)[:, None] * slope
        pull = p * (along + density_slope[:, None]) / v
        found = found - pull.sum(-1)[:, None] * x + alpha[:, None] * (pull @ rows[part])
    return torch.where(clean[:, None], 0.0, found)


def _shared(x, sigma, rows, variances):
    """Queries without noise, sigma^2 (1 for those), and what turns the log-sum-exp of logits into the density."""
    dim = rows.shape[1]
    clean = sigma == 0 if variances is None else torch.zeros_like(sigma, dtype=torch.bool)
    noise = torch.where(clean, 1.0, sigma * sigma)[:, None]
    common = 0.5 * dim * LOG_2PI
    if variances is None:
        common = common + 0.5 * ((x * x).sum(-1) / noise[:, 0] + dim * noise[:, 0].log())
    return clean, noise, common


def _logits(x, alpha, noise, rows, log_weights, variances, label, labels, squares, part):
    """Of some rows, less the terms that all rows share; and v."""
    y, v, bend = rows[part], noise, (alpha * alpha)[:, None]
    square = (y * y).sum(-1) if squares is None else squares[part]
    if variances is None:
        logits = (alpha[:, None] / noise * x) @ y.mT - 0.5 * bend / noise * square
    else:
        v = bend * variances[part] + noise
        distance = (x * x).sum(-1)[:, None] - 2 * alpha[:, None] * (x @ y.mT) + bend * square
        logits = -0.5 * (distance / v + y.shape[1] * v.log())
    if log_weights is not None:
        logits = logits + log_weights[part]
    if labels is not None:
        keeps = (label[:, None] == labels[part]) | (label[:, None] == -1)
        logits = logits.masked_fill(~keeps, -math.inf)
    return logits, v


def launches(**arguments: Any) -> None:
    """What a gradient launches: for the ahead-of-time checks."""
    mean, density = launch(**arguments)
    mixture = [arguments.get(name) for name in ("log_weights", "variances", "label", "labels")]
    launch_backward(
        *(arguments[n] for n in ("x", "alpha", "sigma", "rows")), *mixture, mean, density, mean, density
    )


# --- the op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fewstep::mixture_score", mutates_args=())
def op(
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    rows: torch.Tensor,
    log_weights: torch.Tensor | None = None,
    variances: torch.Tensor | None = None,
    label: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    run = launch if runs_on(x) and unsupported(x, alpha, sigma, rows) is None else reference
    return run(x, alpha, sigma, rows, log_weights, variances, label, labels)


@op.register_fake
def _(x, alpha, sigma, rows, log_weights=None, variances=None, label=None, labels=None):
    return x.new_empty(x.shape), x.new_empty(len(x))


@torch.library.custom_op("fewstep::mixture_score_backward", mutates_args=())
def backward_op(
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
    mixture = (rows, log_weights, variances, label, labels)
    if runs_on(x) and unsupported(x, alpha, sigma, rows) is None:
        return launch_backward(x, alpha, sigma, *mixture, mean, density, slope, density_slope)
    return reference_backward(x, alpha, sigma, *mixture, mean, density, slope, density_slope)


@backward_op.register_fake
def _(x, alpha, sigma, rows, log_weights, variances, label, labels, mean, density, slope, density_slope):
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, slope: torch.Tensor, density_slope: torch.Tensor) -> tuple[Any, ...]:
    return backward_op(*ctx.saved_tensors, slope, density_slope), *[None] * 7


op.register_autograd(_backward, setup_context=_keep)


def mixture_score(
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    rows: torch.Tensor,
    log_weights: torch.Tensor | None = None,
    variances: torch.Tensor | None = None,
    label: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    *,
    squares: torch.Tensor | None = None,
    chunk: int = 4096,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x0 | x], (Q, D), and log p(x), (Q,).

    Args:
        x: (Q, D).
        alpha, sigma: (Q,) of the dtype of x. Where sigma = 0 points have no density: NaN.
        rows: (K, D) centres y_k. Centred ones cost less precision in the reference's products.
        log_weights, variances: (K,); without them all weights are 1 (not 1 / K), all variances 0: points.
        label, labels: (Q,) and (K,) int64: a query sees the rows of its label, or all of them if that is -1.
        squares, chunk: |y_k|^2 if at hand, and the rows that are looked at together: for the reference.
    """
    arguments = (x, alpha, sigma, rows, log_weights, variances, label, labels)
    _check(*arguments)
    if choose("mixture_score", impl, [x], unsupported(*arguments)) == "triton":
        return op(*arguments)
    return reference(*arguments, squares, chunk)


def _check(x, alpha, sigma, rows, log_weights, variances, label, labels) -> None:
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"rows must have shape (K, D) with K >= 1, got {tuple(rows.shape)}")
    if x.ndim != 2 or x.shape[1] != rows.shape[1]:
        raise ValueError(f"x must have shape (Q, {rows.shape[1]}) as rows does, got {tuple(x.shape)}")
    if (label is None) != (labels is None):
        raise ValueError("label and labels go together: give both or neither")
    each = {"alpha": (alpha, x), "sigma": (sigma, x), "label": (label, x)}
    each |= {"log_weights": (log_weights, rows), "variances": (variances, rows), "labels": (labels, rows)}
    for name, (t, like) in each.items():
        if t is not None and t.shape != like.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(like)},), got {tuple(t.shape)}")


def unsupported(
    x, alpha, sigma, rows, log_weights=None, variances=None, label=None, labels=None
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    constants = (alpha, sigma, rows, log_weights, variances)
    for t in (x, *constants):
        if t is not None and t.dtype != torch.float32:
            return f"tensors must be float32, got {t.dtype}"
    if x.shape[1] > LARGEST:
        return f"x must have at most {LARGEST} dimensions, got {x.shape[1]}"
    if max(x.numel(), rows.numel()) >= 2**31:
        return "x and rows must have fewer than 2^31 elements"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in constants):
        return "the kernel's gradient goes to x alone"
    return None


# --- cases -----------------------------------------------------------------------------------------------------------


def _case(
    queries: int,
    count: int,
    dim: int,
    sigma: float = 0.5,
    variances: bool = False,
    classes: int = 0,
    alpha: float = 0.8,
) -> Any:
    def make(device: torch.device | str) -> dict[str, Any]:
        centres = randn(count, dim, device=device, seed=1)
        noise = randn(queries, dim, device=device, seed=2)
        near = torch.arange(queries, device=device) % count
        spread = sigma * (1 + 0.5 * torch.arange(queries, device=device) / max(queries, 1))
        found = {
            "x": alpha * centres[near] + spread[:, None] * noise,
            "alpha": torch.full((queries,), alpha, device=device),
            "sigma": spread,
            "rows": centres,
        }
        if variances:
            found["log_weights"] = randn(count, device=device, seed=3)
            found["variances"] = 0.01 + 0.1 * randn(count, device=device, seed=4).square()
        if classes:
            found["label"] = torch.arange(queries, device=device) % (classes + 1) - 1
            found["labels"] = torch.arange(count, device=device) % classes
        return found

    return make


# of the data's scale, from a sigma of 0.05 on; below it what x and the rows themselves are rounded by shows
NARROW = {"wide": "a row of the plane is 8 bytes"}
CASES = [
    Case("one", _case(1, 1, 1), tolerance=1e-5),
    Case("plane", _case(37, 101, 2), tolerance=1e-5),
    Case("mixture", _case(19, 150, 3, variances=True), tolerance=1e-5),
    Case("labels", _case(21, 70, 17, classes=3), tolerance=1e-5),
    Case("little noise", _case(33, 130, 64, sigma=0.05, alpha=1.0), tolerance=1e-5),
    Case("hardly any noise", _case(16, 65, 128, sigma=0.005, alpha=1.0, variances=True), tolerance=1e-4),
    Case("two parts", _case(9, ROWS + 70, 5), tolerance=1e-5),
    Case("empty", _case(0, 10, 4), tolerance=1e-5),
    Case("digits, 64 x 1797 x 64", _case(64, 1797, 64), True, 1e-5),
    Case("plane, 65536 x 4096 x 2", _case(65_536, 4096, 2), True, 1e-5, NARROW),
    Case("plane, a mixture, 65536 x 1024 x 2", _case(65_536, 1024, 2, variances=True), True, 1e-5, NARROW),
    Case("32 dimensions, 4096 x 50000", _case(4096, 50_000, 32), True, 1e-5),
    Case("64 dimensions, 4096 x 50000", _case(4096, 50_000, 64), True, 1e-5),
    Case("64 dimensions, a mixture, labels", _case(4096, 8192, 64, variances=True, classes=10), True, 1e-5),
    Case("128 dimensions, 4096 x 50000", _case(4096, 50_000, 128), True, 1e-5),
    Case("128 dimensions, a mixture", _case(4096, 8192, 128, variances=True), True, 1e-5),
]


def flops(x: torch.Tensor, rows: torch.Tensor, **_: Any) -> int:
    """Of one forward pass: three a squared difference, two a product."""
    return 5 * len(x) * rows.numel()
