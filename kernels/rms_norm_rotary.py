"""Queries or keys by RMSNorm over a head (1910.07467) and the rotary embedding (2104.09864), in one pass.

    n = x / sqrt(mean(x^2) + eps) [weight],    out = n cos + R n sin

R turns pairs of channels by a right angle: (a, b) -> (-b, a), pairs being neighbours ("interleaved": Flux) or the two
halves of the head ("halves"). cos and sin are (T, D), given for every channel as diffusers makes them; tokens outside
start ... start + T are normed only, and without cos and sin all are (SD3). Text and image tokens with weights of their
own come out in one tensor, without being joined first (``before``).

    >>> x = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    >>> quarter = dict(cos=torch.zeros(1, 2), sin=torch.ones(1, 2))
    >>> rms_norm_rotary(x, torch.full((2,), 12.5**0.5), **quarter, eps=0.0).flatten().round(decimals=4)
    tensor([-4.,  3.])
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .cases import Case, randn
from .dispatch import choose, runs_on
from .lang import ceil_div, next_power_of_2
from .rotary_kernels import rms_norm_rotary_backward_kernel, rms_norm_rotary_kernel
from .tokens import precise, side_by_side, strange

Maybe = torch.Tensor | None
LAYOUTS = ("interleaved", "halves")


# --- the reference ---------------------------------------------------------------------------------------------------


def turned(n: torch.Tensor, layout: str) -> torch.Tensor:
    """R n: every pair (a, b) of the last axis as (-b, a).

    >>> turned(torch.tensor([1, 2, 3, 4]), "interleaved"), turned(torch.tensor([1, 2, 3, 4]), "halves")
    (tensor([-2,  1, -4,  3]), tensor([-3, -4,  1,  2]))
    """
    if layout == "interleaved":
        a, b = n.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-b, a], -1).flatten(-2)
    a, b = n.chunk(2, -1)
    return torch.cat([-b, a], -1)


def reference(
    x: torch.Tensor,
    weight: Maybe = None,
    cos: Maybe = None,
    sin: Maybe = None,
    before: Maybe = None,
    before_weight: Maybe = None,
    layout: str = "interleaved",
    start: int = 0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """x (B, L, H, D) after ``before`` (B, L', H, D): (B, L' + L, H, D), contiguous; ``start`` counts from L' = 0."""
    to, parts = precise(x, weight), []
    for part, gain in ((before, before_weight), (x, weight)):
        if part is not None:
            n = part.to(to)
            n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
            parts.append(n if gain is None else n * gain.to(to))
    n = torch.cat(parts, 1)
    if cos is not None:
        c, s = cos.to(to)[:, None], sin.to(to)[:, None]
        some = n[:, start : start + len(cos)]
        rotated = some * c + turned(some, layout) * s
        n = torch.cat([n[:, :start], rotated, n[:, start + len(cos) :]], 1)
    return n.to(x.dtype)


def reference_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: Maybe,
    cos: Maybe,
    sin: Maybe,
    layout: str,
    start: int,
    eps: float,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of one part, x, and of its weight (empty unless ``sums``) from its part of dy."""
    to = precise(x, weight, dy)
    g, n = dy.to(to), x.to(to)
    if cos is not None:
        c, s = cos.to(to)[:, None], sin.to(to)[:, None]
        first, last = max(start, 0), max(min(start + len(cos), x.shape[1]), 0)
        c, s, some = c[first - start : last - start], s[first - start : last - start], g[:, first:last]
        g = torch.cat([g[:, :first], some * c - turned(some * s, layout), g[:, last:]], 1)
    rstd = torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    n = n * rstd
    dweight = x.new_empty(0)
    if weight is not None:
        dweight = (g * n).sum((0, 1, 2)).to(weight.dtype) if sums else dweight
        g = g * weight.to(to)
    return (rstd * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype), dweight


# --- the launches ----------------------------------------------------------------------------------------------------


def _cut(heads: int, channels: int, layout: str) -> tuple[int, int, int]:
    """Heads of a program, channels of its block, warps."""
    block = max(16, next_power_of_2(channels if layout == "interleaved" else channels // 2))
    each = max(1, min(next_power_of_2(heads), 4096 // next_power_of_2(channels)))
    return each, block, min(8, max(1, each * channels // 512))


def launch(
    x: torch.Tensor,
    weight: Maybe = None,
    cos: Maybe = None,
    sin: Maybe = None,
    before: Maybe = None,
    before_weight: Maybe = None,
    layout: str = "interleaved",
    start: int = 0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``reference`` by the kernel: each part writes its tokens of the result."""
    batch, count, heads, channels = x.shape
    ahead = 0 if before is None else before.shape[1]
    y = torch.empty(batch, ahead + count, heads, channels, dtype=x.dtype, device=x.device)
    each, block, warps = _cut(heads, channels, layout)
    length = 0 if cos is None else len(cos)
    for part, gain, offset in ((before, before_weight, 0), (x, weight, ahead)):
        if part is not None and part.numel():
            grid = (part.shape[1], ceil_div(heads, each), batch)
            rms_norm_rotary_kernel[grid](
                part, gain, cos, sin, y[:, offset:], heads, start - offset, length, *part.stride()[:3], *y.stride()[:2],
                INTERLEAVED=layout == "interleaved", D=channels, EPS=eps, HEADS=each, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return y


def launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: Maybe,
    cos: Maybe,
    sin: Maybe,
    layout: str,
    start: int,
    eps: float,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference_backward`` by the kernel; dy's heads and channels are contiguous."""
    batch, count, heads, channels = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = sums and weight is not None
    each, block, warps = _cut(heads, channels, layout)
    groups, steps = ceil_div(heads, each), 16
    while steps > 1 and batch * groups * ceil_div(count, steps) < 1024:
        steps //= 2
    programs = ceil_div(count, steps)
    partial = torch.empty(batch * groups * programs if sums else 0, channels, device=x.device)
    if dx.numel():
        rms_norm_rotary_backward_kernel[(programs, groups, batch)](
            dy, x, weight, cos, sin, dx, partial, count, heads, programs, start, 0 if cos is None else len(cos),
            *x.stride()[:3], *dy.stride()[:2], SUMS=sums, INTERLEAVED=layout == "interleaved", D=channels, EPS=eps,
            STEPS=steps, HEADS=each, BLOCK=block, PAIRS=block // 2 if layout == "interleaved" else block,
            num_warps=warps,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if sums else x.new_empty(0)


def launches(**arguments: Any) -> None:
    """Forward and backward, as the ahead-of-time checks compile them."""
    dy = torch.empty_like(launch(**arguments))
    x, weight, cos, sin, before, before_weight, layout, start, eps = arguments.values()
    ahead = 0 if before is None else before.shape[1]
    launch_backward(dy[:, ahead:], x, weight, cos, sin, layout, start - ahead, eps, True)
    if before is not None:
        launch_backward(dy[:, :ahead], before, before_weight, cos, sin, layout, start, eps, True)


# --- the op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fewstep::rms_norm_rotary",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, Tensor? before, Tensor? before_weight, str layout,"
    " int start, float eps) -> Tensor",
)
def op(x, weight, cos, sin, before, before_weight, layout, start, eps):
    run = launch if runs_on(x) else reference
    return run(x, weight, cos, sin, before, before_weight, layout, start, eps)


@op.register_fake
def _(x, weight, cos, sin, before, before_weight, layout, start, eps):
    count = x.shape[1] if before is None else before.shape[1] + x.shape[1]
    return torch.empty(x.shape[0], count, *x.shape[2:], dtype=x.dtype, device=x.device)


@torch.library.custom_op(
    "fewstep::rms_norm_rotary_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, str layout, int start, float eps,"
    " bool sums) -> (Tensor, Tensor)",
)
def op_backward(dy, x, weight, cos, sin, layout, start, eps, sums):
    run = launch_backward if runs_on(x) else reference_backward
    return run(dy, x, weight, cos, sin, layout, start, eps, sums)


@op_backward.register_fake
def _(dy, x, weight, cos, sin, layout, start, eps, sums):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty_like(weight) if sums and weight is not None else x.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.layout, ctx.start, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: torch.Tensor) -> tuple[Maybe, ...]:
    x, weight, cos, sin, before, before_weight = ctx.saved_tensors
    need, dy = ctx.needs_input_grad, dy.contiguous()
    ahead = 0 if before is None else before.shape[1]
    found: list[Maybe] = [None] * 9
    parts = (
        (0, x, weight, dy[:, ahead:], ctx.start - ahead),
        (4, before, before_weight, dy[:, :ahead], ctx.start),
    )
    for at, part, gain, g, start in parts:
        if need[at] or need[at + 1]:
            sums = need[at + 1]
            dpart, dgain = op_backward(g, part, gain, cos, sin, ctx.layout, start, ctx.eps, sums)
            found[at : at + 2] = [dpart if need[at] else None, dgain if sums else None]
    return tuple(found)


op.register_autograd(_differentiate, setup_context=_keep)


def rms_norm_rotary(
    x: torch.Tensor,
    weight: Maybe = None,
    cos: Maybe = None,
    sin: Maybe = None,
    before: Maybe = None,
    before_weight: Maybe = None,
    layout: str = "interleaved",
    start: int = 0,
    eps: float = 1e-6,
    impl: str | None = None,
) -> torch.Tensor:
    """RMSNorm of x (B, L, H, D) over D, turned by cos and sin (T, D) at the tokens start ... start + T.

    Args:
        weight: (D,) or None.
        before, before_weight: (B, L', H, D) with a weight of its own, whose tokens stand before x's in the result.
        layout: which channels are pairs, "interleaved" or "halves".
        impl: "triton" or "reference"; by default whichever ``dispatch`` finds.
    """
    _check(x, weight, cos, sin, before, before_weight, layout, start)
    weight, before_weight, cos, sin = (
        v if v is None else v.contiguous() for v in (weight, before_weight, cos, sin)
    )
    x, before = side_by_side(x), before if before is None else side_by_side(before)
    given = (x, weight, cos, sin, before, before_weight, layout, start, eps)
    chosen = choose("rms_norm_rotary", impl, [x], _unsupported(x, weight, cos, sin, before, before_weight))
    return (op if chosen == "triton" else reference)(*given)


def _unsupported(*given: Maybe) -> str | None:
    batch, channels = given[0].shape[0], given[0].shape[-1]
    if channels > 1024 or channels % 2:
        return f"heads of {channels} channels: kernels take even numbers up to 1024"
    if batch > 65_535:
        return f"a batch of {batch}: kernels take up to 65535"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given[2:4]):
        return "cos or sin want a gradient"
    return strange(*given)


def _check(
    x: torch.Tensor,
    weight: Maybe,
    cos: Maybe,
    sin: Maybe,
    before: Maybe,
    before_weight: Maybe,
    layout: str,
    start: int,
) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (B, L, H, D), got {x.dtype} {tuple(x.shape)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    batch, count, heads, channels = x.shape
    if before is not None and (before.ndim != 4 or before.shape != (batch, before.shape[1], heads, channels)):
        wanted = f"({batch}, tokens, {heads}, {channels})"
        raise ValueError(f"before must be {wanted}, got {tuple(before.shape)}")
    for name, v in (("weight", weight), ("before_weight", before_weight)):
        if v is not None and v.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), got {tuple(v.shape)}")
    if before is None and before_weight is not None:
        raise ValueError("before_weight is given without before")
    if before is not None and before.dtype != x.dtype:
        raise ValueError(f"before must have x's dtype {x.dtype}, got {before.dtype}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must both be given or neither")
    if cos is not None:
        if cos.ndim != 2 or cos.shape[1] != channels or sin.shape != cos.shape:
            found = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
            raise ValueError(f"cos and sin must both be (tokens, {channels}), got {found}")
        if channels % 2:
            raise ValueError(f"a rotary embedding needs an even number of channels a head, got {channels}")
        total = count if before is None else count + before.shape[1]
        if start < 0 or start + len(cos) > total:
            raise ValueError(f"cos has tokens {start} to {start + len(cos)}, and there are {total}")


# --- cases -----------------------------------------------------------------------------------------------------------


def unfused(x, weight, cos, sin, before, before_weight, layout, start, eps):
    """As models write it: the norms in the dtype of x, the rotation of all tokens or of some in float32."""
    n = functional.rms_norm(x, x.shape[-1:], weight, eps)
    if before is not None:
        n = torch.cat([functional.rms_norm(before, x.shape[-1:], before_weight, eps), n], 1)
    if cos is None:
        return n
    some = n[:, start : start + len(cos)]
    out = (some.float() * cos[:, None] + turned(some, layout).float() * sin[:, None]).to(x.dtype)
    return out if out.shape == n.shape else torch.cat([n[:, :start], out, n[:, start + len(cos) :]], 1)


RIVALS = {"unfused": unfused}


def _case(
    batch: int,
    count: int,
    heads: int,
    channels: int,
    turns: int = 0,
    layout: str = "interleaved",
    start: int = 0,
    ahead: int = 0,
    weighted: bool = True,
    dtype: Any = torch.float32,
) -> Any:
    """``turns``: tokens that cos and sin have; ``ahead``: tokens of ``before``."""

    def make(device: torch.device | str) -> dict[str, Any]:
        def some(seed: int, *shape: int, kind: Any = dtype) -> Maybe:
            return randn(*shape, device=device, dtype=kind, seed=seed)

        angle = randn(turns, channels // 2, device=device, seed=9)
        wide = angle.repeat_interleave(2, 1) if layout == "interleaved" else torch.cat([angle, angle], 1)
        return {
            "x": some(0, batch, count, heads, channels),
            "weight": some(1, channels) if weighted else None,
            "cos": wide.cos() if turns else None,
            "sin": wide.sin() if turns else None,
            "before": some(2, batch, ahead, heads, channels) if ahead else None,
            "before_weight": some(3, channels) if ahead and weighted else None,
            "layout": layout,
            "start": start,
            "eps": 1e-6,
        }

    return make


bf16 = torch.bfloat16
CASES = [
    Case("norm", _case(2, 5, 3, 16)),
    Case("no weight", _case(2, 5, 3, 20, weighted=False)),
    Case("interleaved", _case(2, 7, 3, 24, turns=7)),
    Case("halves", _case(2, 7, 3, 24, turns=7, layout="halves")),
    Case("some tokens", _case(2, 9, 5, 8, turns=4, start=3)),
    Case("some tokens, halves, before", _case(2, 6, 3, 12, turns=5, layout="halves", start=2, ahead=3)),
    Case("before", _case(2, 6, 3, 32, turns=10, ahead=4)),
    Case("empty", _case(0, 6, 3, 32, turns=6)),
    Case("half", _case(2, 7, 4, 64, turns=7, dtype=torch.float16), tolerance=1e-3),
    Case("SD3, norm", _case(2, 4096, 24, 64, dtype=bf16), True, 2**-7),
    Case("Flux", _case(1, 4096, 24, 128, turns=4608, ahead=512, dtype=bf16), True, 2**-7),
    Case("Flux, halves", _case(1, 4608, 24, 128, turns=4608, layout="halves", dtype=bf16), True, 2**-7),
    Case("Wan", _case(1, 75_600, 40, 128, turns=75_600, dtype=bf16), True, 2**-7),
]
