"""LayerNorm with the modulation of adaptive layer norm (2212.09748), in one pass over the tokens.

    y = n (1 + scale) + shift,    n = (x - mean) / sqrt(var + eps) [weight + bias]

scale and shift are one a sample or one a token. Mean and variance are float32, of centred values. The gradients of
scale, shift, weight and bias are sums over tokens in two stages, without atomics: the same bits in every run.
Nothing is kept for the backward pass but the inputs: it has whole rows before it, and takes their statistics again.

    >>> x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    >>> y = layer_norm_modulate(x, scale=torch.ones(2, 8).double(), shift=torch.full((2, 1, 8), 3.0).double(), eps=0.0)
    >>> [round(float(v), 9) for v in (y.mean(), ((y - 3) ** 2).mean())]
    [3.0, 4.0]
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .cases import Case, randn
from .dispatch import choose, runs_on
from .norm_kernels import layer_norm_modulate_backward_kernel, layer_norm_modulate_kernel
from .tokens import affine, modulation, precise, result_type, shaped, tiles, tokens, unsupported

Maybe = torch.Tensor | None
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    scale: Maybe = None,
    shift: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """x (B, L, C), scale, shift (B, 1 or L, C), weight, bias (C,): y in the dtype of x, scale, shift together."""
    to = precise(x, scale, weight)
    weight, bias = (None if v is None else v.to(to) for v in (weight, bias))
    y = functional.layer_norm(x.to(to), x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = torch.addcmul(y + shift.to(to), y, scale.to(to))
    return y.to(result_type(x, scale, shift))


def reference_backward(
    dy: torch.Tensor, x: torch.Tensor, scale: Maybe, weight: Maybe, bias: Maybe, eps: float, sums: list[bool]
) -> Gradients:
    """The gradients of x, scale, shift, weight, bias; ``sums`` asks for (scale, shift) and (weight, bias), else empty.

    The gradient of a shift that is one a token is dy, and is left empty too.
    """
    to = precise(x, scale, weight, dy)
    g, centred = dy.to(to), x.to(to) - x.to(to).mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n = centred * rstd
    dscale, dshift, dweight, dbias = (x.new_empty(0) for _ in range(4))
    if scale is not None:
        if sums[0]:
            value = n if weight is None else n * weight.to(to)
            dscale = g * (value if bias is None else value + bias.to(to))
            if scale.shape[1] == 1:
                dscale, dshift = dscale.sum(1, keepdim=True), g.sum(1, keepdim=True).to(scale.dtype)
            dscale = dscale.to(scale.dtype)
        g = g * (1 + scale.to(to))
    if weight is not None:
        if sums[1]:
            dweight, dbias = ((v.sum((0, 1))).to(weight.dtype) for v in (g * n, g))
        g = g * weight.to(to)
    dx = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dx.to(x.dtype), dscale, dshift, dweight, dbias


# --- the launches ----------------------------------------------------------------------------------------------------


def launch(
    x: torch.Tensor,
    scale: Maybe = None,
    shift: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``reference`` by the kernel."""
    batch, count, channels = x.shape
    y = torch.empty(x.shape, dtype=result_type(x, scale, shift), device=x.device)
    if y.numel():
        cut = tiles(batch, count, channels)
        layer_norm_modulate_kernel[(cut.programs, batch)](
            x, scale, shift, weight, bias, y, count, *x.stride()[:2], *strides(scale), *strides(shift),
            EACH=each(scale), C=channels, EPS=eps, ROWS=cut.rows, BLOCK=cut.block, num_warps=cut.warps,
        )  # fmt: skip
    return y


def launch_backward(
    dy: torch.Tensor, x: torch.Tensor, scale: Maybe, weight: Maybe, bias: Maybe, eps: float, sums: list[bool]
) -> Gradients:
    """``reference_backward`` by the kernel."""
    batch, count, channels = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wanted, affined = sums[0] and scale is not None, sums[1] and weight is not None
    per_token = each(scale)
    dscale = torch.empty_like(dx, dtype=scale.dtype) if wanted and per_token else x.new_empty(0)
    cut = tiles(batch, count, channels, steps=16, elements=2048, each=256)
    planes = 2 * (wanted and not per_token) + 2 * affined
    partial = torch.empty(planes, batch, cut.programs, channels, device=x.device)
    if dx.numel():
        layer_norm_modulate_backward_kernel[(cut.programs, batch)](
            dy.contiguous(), x, scale, weight, bias, dx, dscale, partial, batch, count, cut.programs,
            *x.stride()[:2], *strides(scale), EACH=per_token, MODULATION=wanted, AFFINE=affined, C=channels, EPS=eps,
            STEPS=cut.steps, ROWS=cut.rows, BLOCK=cut.block, num_warps=cut.warps,
        )  # fmt: skip
    else:
        partial.zero_()
    planes_left = iter(partial)
    dshift, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if wanted and not per_token:
        dscale, dshift = (next(planes_left).sum(1, keepdim=True).to(scale.dtype) for _ in range(2))
    if affined:
        dweight, dbias = (next(planes_left).sum((0, 1)).to(weight.dtype) for _ in range(2))
    return dx, dscale, dshift, dweight, dbias


def strides(v: Maybe) -> tuple[int, int]:
    """The strides of a modulation over samples and tokens."""
    return (0, 0) if v is None else (v.stride(0), v.stride(1))


def each(v: Maybe) -> bool:
    """Whether a modulation is one a token."""
    return v is not None and v.shape[1] > 1


def launches(**arguments: Any) -> None:
    """Forward and backward, as the ahead-of-time checks compile them."""
    y = launch(**arguments)
    x, scale, _, weight, bias, eps = arguments.values()
    launch_backward(torch.empty_like(y), x, scale, weight, bias, eps, [True, True])


# --- the op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fewstep::layer_norm_modulate",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps) -> Tensor",
)
def op(x, scale, shift, weight, bias, eps):
    return (launch if runs_on(x) else reference)(x, scale, shift, weight, bias, eps)


@op.register_fake
def _(x, scale, shift, weight, bias, eps):
    return torch.empty(x.shape, dtype=result_type(x, scale, shift), device=x.device)


@torch.library.custom_op(
    "fewstep::layer_norm_modulate_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? scale, Tensor? weight, Tensor? bias, float eps, bool[] sums)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def op_backward(dy, x, scale, weight, bias, eps, sums):
    return (launch_backward if runs_on(x) else reference_backward)(dy, x, scale, weight, bias, eps, sums)


@op_backward.register_fake
def _(dy, x, scale, weight, bias, eps, sums):
    dscale, dshift, dweight, dbias = (x.new_empty(0) for _ in range(4))
    if sums[0] and scale is not None:
        dscale = torch.empty(scale.shape, dtype=scale.dtype, device=x.device)
        dshift = torch.empty_like(dscale) if scale.shape[1] == 1 else dshift
    if sums[1] and weight is not None:
        dweight, dbias = (torch.empty_like(weight) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dscale, dshift, dweight, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, scale, weight, bias)


def _differentiate(ctx: Any, dy: torch.Tensor) -> tuple[Maybe, ...]:
    x, scale, weight, bias = ctx.saved_tensors
    sums = [any(ctx.needs_input_grad[1:3]), any(ctx.needs_input_grad[3:5])]
    dx, dscale, dshift, dweight, dbias = op_backward(dy, x, scale, weight, bias, ctx.eps, sums)
    if each(scale):
        dshift = dy.to(scale.dtype)
    found = (dx, dscale, dshift, dweight, dbias)
    return *(v if needed else None for v, needed in zip(found, ctx.needs_input_grad)), None


op.register_autograd(_differentiate, setup_context=_keep)


def layer_norm_modulate(
    x: torch.Tensor,
    scale: Maybe = None,
    shift: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-6,
    impl: str | None = None,
) -> torch.Tensor:
    """LayerNorm of x (B, ..., C) over C, times 1 + scale, plus shift.

    Args:
        scale, shift: (B, C), (B, 1, C) or x's own shape, both or neither.
        weight, bias: (C,), of the norm itself; no bias without a weight.
        impl: "triton" or "reference"; by default whichever ``dispatch`` finds.
    """
    given = tokens(x), *modulations(x, scale, shift, weight, bias)
    chosen = choose("layer_norm_modulate", impl, [x], unsupported(*given))
    return shaped((op if chosen == "triton" else reference)(*given, eps), x)


def modulations(
    x: torch.Tensor, scale: Maybe, shift: Maybe, weight: Maybe, bias: Maybe
) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    """Scale, shift, weight and bias as kernels take them; ``ValueError`` where they do not fit x or one another."""
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must both be given or neither")
    if bias is not None and weight is None:
        raise ValueError("bias must come with a weight")
    s, t = modulation(scale, x, "scale"), modulation(shift, x, "shift")
    if s is not None and (s.dtype, s.shape) != (t.dtype, t.shape):
        one, other = (f"{v.dtype} {tuple(v.shape)}" for v in (scale, shift))
        raise ValueError(f"scale and shift must be alike, got {one} and {other}")
    return s, t, affine(weight, x.shape[-1], "weight"), affine(bias, x.shape[-1], "bias")


# --- cases -----------------------------------------------------------------------------------------------------------


def unfused(x, scale, shift, weight, bias, eps):
    """As models write it, in the dtype of x."""
    y = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if scale is None else y * (1 + scale) + shift


RIVALS = {"unfused": unfused}


def _case(
    batch: int,
    count: int,
    channels: int,
    modulated: int = 1,
    affined: bool = False,
    dtype: Any = torch.float32,
) -> Any:
    """``modulated``: how many scales a sample has (0, 1 or ``count``)."""

    def make(device: torch.device | str) -> dict[str, Any]:
        shapes = [(batch, modulated, channels)] * 2 if modulated else [None] * 2
        shapes += [(channels,)] * 2 if affined else [None] * 2
        extra = [
            s if s is None else randn(*s, device=device, dtype=dtype, seed=k) for k, s in enumerate(shapes, 1)
        ]
        names = ("scale", "shift", "weight", "bias")
        x = randn(batch, count, channels, device=device, dtype=dtype)
        return {"x": x, **dict(zip(names, extra)), "eps": 1e-6}

    return make


bf16 = torch.bfloat16
CASES = [
    Case("plain", _case(2, 7, 48, modulated=0)),
    Case("affine", _case(2, 7, 33, modulated=0, affined=True)),
    Case("per sample", _case(3, 37, 72)),
    Case("per token", _case(2, 9, 40, modulated=9)),
    Case("affine, per sample", _case(2, 130, 20, affined=True)),
    Case("one channel", _case(2, 3, 1)),
    Case("empty", _case(0, 5, 16, affined=True)),
    Case("half", _case(2, 19, 64, dtype=torch.float16), tolerance=1e-3),
    Case("DiT-XL/2, batch 8", _case(8, 256, 1152, dtype=bf16), real=True, tolerance=2**-7),
    Case("SD3, batch 2", _case(2, 4429, 1536, dtype=bf16), real=True, tolerance=2**-7),
    Case("Flux", _case(1, 4608, 3072, dtype=bf16), real=True, tolerance=2**-7),
    Case("Wan", _case(1, 75_600, 5120, dtype=bf16), real=True, tolerance=2**-7),
    Case("SDXL, affine", _case(2, 4096, 640, 0, affined=True, dtype=bf16), real=True, tolerance=2**-7),
    Case("per token, float32", _case(2, 1024, 1536, modulated=1024), real=True),
]
