"""GroupNorm (1803.08494) and SiLU, in one pass where a group fits a program and in two where it does not.

    y = silu(n weight + bias),    n = (x + add - mean) / sqrt(var + eps)

for images (N, C, ...) whose channels come first or last in memory; ``add`` (N, C) is what a residual block adds for the
time, and weight and bias may be of each sample: a norm modulated by scale and shift is one with weight (1 + scale).
Large groups are split: means and centred squares of pieces, joined exactly (Chan et al. 1979), never E[x^2] - E[x]^2.
Gradients are sums in stages, without atomics.

    >>> x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    >>> y = group_norm_silu(x, 2, activation="none", eps=0.0)
    >>> bool((y.unflatten(1, (2, 2)).mean((2, 3, 4)).abs() < 1e-12).all())
    True
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from .cases import Case, randn
from .dispatch import choose, runs_on
from .group_norm_kernels import (
    apply_kernel,
    inputs_kernel,
    join_kernel,
    pieces_kernel,
    sums_kernel,
    whole_kernel,
)
from .lang import ceil_div, next_power_of_2
from .tokens import precise, result_type, strange

Maybe = torch.Tensor | None
ACTIVATIONS = ("silu", "none")
WHOLE = 8192  # elements of a group that one program holds


# --- the reference ---------------------------------------------------------------------------------------------------


def plain(
    x: torch.Tensor,
    groups: int,
    weight: Maybe = None,
    bias: Maybe = None,
    add: Maybe = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> torch.Tensor:
    """x (N, C, ...), weight and bias (C,) or (N, C), add (N, C): y, laid out as a dense x is."""
    to, dtype = precise(x, weight, add), result_type(x, add)
    x = x.to(to)
    v = x if add is None else x + _spread(add.to(to), x)
    if weight is None or weight.ndim == 1:
        v = functional.group_norm(v, groups, *(w if w is None else w.to(to) for w in (weight, bias)), eps)
    else:
        v = torch.addcmul(
            _spread(bias.to(to), x), functional.group_norm(v, groups, eps=eps), _spread(weight.to(to), x)
        )
    y = (functional.silu(v) if activation == "silu" else v).to(dtype)
    return dense(y, like=x)


def reference(
    x: torch.Tensor,
    groups: int,
    weight: Maybe = None,
    bias: Maybe = None,
    add: Maybe = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``plain``, and the mean and 1 / std of each group, (N, groups)."""
    to = precise(x, weight, add)
    v = (x.to(to) if add is None else x.to(to) + _spread(add.to(to), x)).detach()
    return plain(x, groups, weight, bias, add, eps, activation), *_statistics(v, groups, eps)


def reference_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    add: Maybe,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias; the latter empty where there are none."""
    to, groups = mean.dtype, mean.shape[1]
    each = x.shape[1] // groups

    def of_groups(v: torch.Tensor) -> torch.Tensor:
        return _spread(v.repeat_interleave(each, 1), x)

    v = x.to(to) if add is None else x.to(to) + _spread(add.to(to), x)
    n = (v - of_groups(mean)) * of_groups(rstd)
    w, b = (1.0, 0.0) if weight is None else (_spread(u.to(to), x) for u in (weight, bias))
    g = dy.to(to) * _slope(n * w + b) if activation == "silu" else dy.to(to)
    over = tuple(range(2, x.ndim))
    sums = torch.stack([g.sum(over), (g * n).sum(over)])
    dx = of_groups(rstd) * (g * w - of_groups(_means(sums, weight, x, groups)[0]))
    dx = dx - of_groups(rstd) * n * of_groups(_means(sums, weight, x, groups)[1])
    dweight, dbias = _of_weights(sums, weight, x)
    return torch.empty_like(x).copy_(dx), dweight, dbias


def _spread(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) or (N, C) against x (N, C, ...)."""
    return v.reshape(-1, v.shape[-1], *[1] * (x.ndim - 2))


def _statistics(v: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    v = v.reshape(v.shape[0], groups, v.shape[1] // groups * v.shape[2:].numel())
    mean = v.mean(-1)
    return mean, torch.rsqrt((v - mean[..., None]).square().mean(-1) + eps)


def _slope(v: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(v)
    return s * (1 + v * (1 - s))


def _means(sums: torch.Tensor, weight: Maybe, x: torch.Tensor, groups: int) -> torch.Tensor:
    """The means over each group of g and g n, (2, N, groups), from their sums a channel, (2, N, C)."""
    weighted = sums if weight is None else sums * weight.to(sums.dtype)
    size = x.shape[1] // groups * x.shape[2:].numel()
    return weighted.unflatten(2, (groups, x.shape[1] // groups)).sum(-1) / max(size, 1)


def _of_weights(sums: torch.Tensor, weight: Maybe, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if weight is None:
        return x.new_empty(0), x.new_empty(0)
    dbias, dweight = (v.sum(0) if weight.ndim == 1 else v.clone() for v in sums)
    return dweight.to(weight.dtype), dbias.to(weight.dtype)


# --- the launches ----------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """x as (batch, channels, places), its strides, and the tile that a program takes: ``steps`` of them for sums."""

    batch: int
    channels: int
    places: int
    strides: tuple[int, int, int]
    tile: dict[str, int]
    steps: int
    pieces: int

    def grid(self, pieces: int | None = None) -> tuple[int, int, int]:
        across = ceil_div(self.places, self.tile["PLACES"]) if pieces is None else pieces
        return across, ceil_div(self.channels, self.tile["CHANNELS"]), self.batch


def layout(x: torch.Tensor) -> Layout:
    """How the kernels see a dense x, by its shape and strides alone."""
    batch, channels, places = x.shape[0], x.shape[1], x.shape[2:].numel()
    if x.is_contiguous():
        strides = (channels * places, places, 1)
        across = min(4096, next_power_of_2(places))
        tile = {"CHANNELS": min(4096 // across, next_power_of_2(channels)), "PLACES": across}
    else:
        strides = (channels * places, 1, channels)
        wide = min(64, next_power_of_2(channels))
        tile = {"CHANNELS": wide, "PLACES": min(4096 // wide, next_power_of_2(places))}
    steps, programs = 16, batch * ceil_div(channels, tile["CHANNELS"])
    while steps > 1 and programs * ceil_div(places, tile["PLACES"] * steps) < 1024:
        steps //= 2
    pieces = ceil_div(places, tile["PLACES"] * steps)
    warps = min(8, max(1, tile["CHANNELS"] * tile["PLACES"] // 512))
    return Layout(batch, channels, places, strides, {**tile, "num_warps": warps}, steps, pieces)


def launch(
    x: torch.Tensor,
    groups: int,
    weight: Maybe = None,
    bias: Maybe = None,
    add: Maybe = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``reference`` by the kernels: one where a group fits a program, else three."""
    y = torch.empty_like(x, dtype=result_type(x, add))
    mean, rstd = (torch.empty(x.shape[0], groups, device=x.device) for _ in range(2))
    if not x.numel():
        return y, mean.zero_(), rstd.fill_(eps**-0.5 if eps else float("inf"))
    at, each, silu, shared = layout(x), x.shape[1] // groups, activation == "silu", _stride(weight)
    whole = next_power_of_2(each), next_power_of_2(at.places)
    if whole[0] * whole[1] <= WHOLE:
        warps = min(16, max(1, whole[0] * whole[1] // 512))
        whole_kernel[(groups, at.batch)](
            x, weight, bias, add, y, mean, rstd, at.places, groups, each, *at.strides, shared,
            SILU=silu, EPS=eps, CHANNELS=whole[0], PLACES=whole[1], num_warps=warps,
        )  # fmt: skip
        return y, mean, rstd
    means, squares = (torch.empty(at.batch, at.channels, at.pieces, device=x.device) for _ in range(2))
    pieces_kernel[at.grid(at.pieces)](
        x, means, squares, at.channels, at.places, at.pieces, *at.strides, STEPS=at.steps, **at.tile
    )
    block = min(1024, next_power_of_2(each * at.pieces))
    join_kernel[(groups, at.batch)](
        means, squares, add, mean, rstd, at.places, groups, each, at.pieces, at.tile["PLACES"] * at.steps,
        EPS=eps, STEPS=ceil_div(each * at.pieces, block), BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    apply_kernel[at.grid()](
        x, weight, bias, add, mean, rstd, y, at.channels, at.places, groups, each, *at.strides, shared,
        SILU=silu, **at.tile,
    )  # fmt: skip
    return y, mean, rstd


def launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    add: Maybe,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``reference_backward`` by the kernels; dy is laid out as x."""
    at, groups = layout(x), mean.shape[1]
    dx = torch.empty_like(x)
    partial = torch.empty(2, at.batch, at.channels, at.pieces, device=x.device)
    each, silu, shared = at.channels // groups, activation == "silu", _stride(weight)
    if x.numel():
        sums_kernel[at.grid(at.pieces)](
            dy, x, weight, bias, add, mean, rstd, partial, at.batch, at.channels, at.places, groups, each, at.pieces,
            *at.strides, shared, SILU=silu, STEPS=at.steps,
            **at.tile | {"num_warps": min(16, 2 * at.tile["num_warps"])},  # fewer would spill here and there
        )  # fmt: skip
    sums = partial.sum(-1)
    if x.numel():
        inputs_kernel[at.grid()](
            dy, x, weight, bias, add, mean, rstd, _means(sums, weight, x, groups).contiguous(), dx,
            at.batch, at.channels, at.places, groups, each, *at.strides, shared, SILU=silu, **at.tile,
        )  # fmt: skip
    else:
        sums.zero_()
    return dx, *_of_weights(sums, weight, x)


def _stride(weight: Maybe) -> int:
    return weight.shape[1] if weight is not None and weight.ndim == 2 else 0


def launches(**arguments: Any) -> None:
    """Forward and backward, as the ahead-of-time checks compile them."""
    y, mean, rstd = launch(**arguments)
    x, _, weight, bias, add, _, activation = arguments.values()
    launch_backward(torch.empty_like(y), x, mean, rstd, weight, bias, add, activation)


# --- the op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fewstep::group_norm_silu",
    mutates_args=(),
    schema="(Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor? add, float eps, str activation)"
    " -> (Tensor, Tensor, Tensor)",
)
def op(x, groups, weight, bias, add, eps, activation):
    return (launch if runs_on(x) else reference)(x, groups, weight, bias, add, eps, activation)


@op.register_fake
def _(x, groups, weight, bias, add, eps, activation):
    mean, rstd = (
        torch.empty(x.shape[0], groups, dtype=precise(x, weight, add), device=x.device) for _ in range(2)
    )
    return torch.empty_like(x, dtype=result_type(x, add)), mean, rstd


@torch.library.custom_op(
    "fewstep::group_norm_silu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? add,"
    " str activation) -> (Tensor, Tensor, Tensor)",
)
def op_backward(dy, x, mean, rstd, weight, bias, add, activation):
    run = launch_backward if runs_on(x) else reference_backward
    return run(dy, x, mean, rstd, weight, bias, add, activation)


@op_backward.register_fake
def _(dy, x, mean, rstd, weight, bias, add, activation):
    gains = (x.new_empty(0) if weight is None else torch.empty_like(weight) for _ in range(2))
    return torch.empty_like(x), *gains


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, _, weight, bias, add, _, ctx.activation = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], weight, bias, add)


def _differentiate(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[Maybe, ...]:
    x, mean, rstd, weight, bias, add = ctx.saved_tensors
    need = ctx.needs_input_grad
    dy = dense(dy, like=x)
    dx, dweight, dbias = op_backward(dy, x, mean, rstd, weight, bias, add, ctx.activation)
    dadd = dx.sum(tuple(range(2, x.ndim)), dtype=mean.dtype).to(add.dtype) if need[4] else None
    found = (dx, None, dweight, dbias, dadd, None, None)
    return tuple(v if needed else None for v, needed in zip(found, need, strict=True))


op.register_autograd(_differentiate, setup_context=_keep)


def group_norm_silu(
    x: torch.Tensor,
    groups: int,
    weight: Maybe = None,
    bias: Maybe = None,
    scale: Maybe = None,
    shift: Maybe = None,
    add: Maybe = None,
    eps: float = 1e-5,
    activation: str = "silu",
    impl: str | None = None,
) -> torch.Tensor:
    """SiLU of the GroupNorm of x (N, C, ...), laid out in memory as x is.

    Args:
        weight, bias: (C,), both or neither.
        scale, shift: (N, C), both or neither: the norm times 1 + scale, plus shift.
        add: (N, C), added to x before.
        activation: "silu" or "none".
        impl: "triton" or "reference"; by default whichever ``dispatch`` finds.
    """
    _check(x, groups, weight, bias, scale, shift, add, activation)
    if scale is not None:
        to = precise(x, weight, scale)
        if x.dtype != result_type(x, scale):
            x = x.to(result_type(x, scale))
        gain, offset = 1 + scale.to(to), shift.to(to)
        if weight is not None:
            gain, offset = gain * weight.to(to), offset + gain * bias.to(to)
        weight, bias = gain, offset
    weight, bias, add = (v if v is None else v.contiguous() for v in (weight, bias, add))
    chosen = choose("group_norm_silu", impl, [x], _unsupported(x, weight, bias, add))
    if chosen == "reference":
        return plain(x, groups, weight, bias, add, eps, activation)
    return op(dense(x), groups, weight, bias, add, eps, activation)[0]


def dense(x: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """x with its channels last in memory where those of ``like`` (by default x itself) are, else first."""
    if not _last(x if like is None else like):
        return x.contiguous()
    return x if _last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _last(x: torch.Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _unsupported(x: torch.Tensor, *more: Maybe) -> str | None:
    if x.shape[0] > 65_535 or x.shape[1:].numel() >= 2**31:
        return f"a shape of {tuple(x.shape)}: kernels take up to 65535 samples of less than 2^31 elements"
    return strange(x, *more)


def _check(
    x: torch.Tensor,
    groups: int,
    weight: Maybe,
    bias: Maybe,
    scale: Maybe,
    shift: Maybe,
    add: Maybe,
    activation: str,
) -> None:
    if x.ndim < 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (N, C, ...), got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for one, other, names in ((weight, bias, "weight and bias"), (scale, shift, "scale and shift")):
        if (one is None) != (other is None):
            raise ValueError(f"{names} must both be given or neither")
    for name, v, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (x.shape[0], channels)),
        ("shift", shift, (x.shape[0], channels)),
        ("add", add, (x.shape[0], channels)),
    ):
        if v is not None and v.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(v.shape)}")


# --- cases -----------------------------------------------------------------------------------------------------------


def unfused(x, groups, weight, bias, add, eps, activation):
    """As models write it, in the dtype of x."""
    v = x if add is None else x + _spread(add, x)
    each = weight is not None and weight.ndim == 2
    shape = (*v.shape[:2], v.shape[2:].numel(), groups, eps)
    v, mean, rstd = torch.native_group_norm(v, *((None, None) if each else (weight, bias)), *shape)
    v = v * _spread(weight, x) + _spread(bias, x) if each else v
    return functional.silu(v) if activation == "silu" else v, mean, rstd


RIVALS = {"unfused": unfused}


def _case(
    *shape: int,
    groups: int = 32,
    weights: str = "shared",
    added: bool = False,
    channels: str = "first",
    activation: str = "silu",
    offset: float = 0.0,
    dtype: Any = torch.float32,
) -> Any:
    """``weights``: none, shared or of each sample; ``channels``: first or last in memory."""

    def make(device: torch.device | str) -> dict[str, Any]:
        few = shape[:2] if weights == "each" else shape[1:2]

        def some(seed: int, *size: int) -> torch.Tensor:
            return randn(*size, device=device, dtype=dtype, seed=seed)

        x = some(0, *shape) + offset
        return {
            "x": x if channels == "first" else x.movedim(1, -1).contiguous().movedim(-1, 1),
            "groups": groups,
            "weight": None if weights == "none" else some(1, *few),
            "bias": None if weights == "none" else some(2, *few),
            "add": some(3, *shape[:2]) if added else None,
            "eps": 1e-5,
            "activation": activation,
        }

    return make


bf16 = torch.bfloat16
CASES = [
    Case("whole", _case(2, 12, 5, 7, groups=4)),
    Case("whole, channels last", _case(2, 12, 5, 7, groups=4, channels="last")),
    Case("whole, added, weights of each", _case(2, 6, 4, 4, groups=3, weights="each", added=True)),
    Case("no weights, no activation", _case(3, 8, 9, groups=2, weights="none", activation="none")),
    Case("split", _case(1, 6, 65, 67, groups=2)),
    Case("split, added", _case(1, 6, 65, 67, groups=2, added=True)),
    Case("split, channels last", _case(1, 20, 31, 33, groups=2, channels="last", added=True)),
    Case("split, weights of each", _case(2, 4, 71, 67, groups=2, weights="each")),
    Case("empty", _case(0, 4, 3, 3, groups=2)),
    Case("half", _case(2, 8, 6, 6, groups=2, dtype=torch.float16), tolerance=1e-3),
    Case("SDXL", _case(2, 320, 128, 128, dtype=bf16), True, 2**-7),
    Case("SDXL, channels last", _case(2, 320, 128, 128, channels="last", dtype=bf16), True, 2**-7),
    Case("SDXL, added", _case(2, 640, 64, 64, added=True, dtype=bf16), True, 2**-7),
    Case("SD 1.5, 64", _case(2, 320, 64, 64, dtype=bf16), True, 2**-7),
    Case("SD 1.5, 8", _case(2, 1280, 8, 8, dtype=bf16), True, 2**-7),
    Case("VAE, 512 channels", _case(1, 512, 512, 512, dtype=bf16), True, 2**-7),
    Case("VAE, 128 channels", _case(1, 128, 1024, 1024, dtype=bf16), True, 2**-7),
    Case("EDM CIFAR-10, batch 64", _case(64, 256, 32, 32, weights="each"), True),
]
