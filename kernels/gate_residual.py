"""A block's output gated and added to its input, and the next norm with its modulation in the same pass (2212.09748).

    r = x + gate h,    y = LayerNorm(r) [weight + bias] (1 + scale) + shift

y is of r as it is stored, so that both passes see the same rows. The gate, scale and shift are one a sample or one a
token; without a gate it is the sum. Gradients of what is shared by tokens are sums in two stages, without atomics.

    >>> x, h = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    >>> gate_residual(x, h, gate=torch.full((2, 4), 0.5))[0, 0]
    tensor([2., 2., 2., 2.])
    >>> r, y = gate_residual_norm(x, h, gate=torch.ones(2, 1, 4), scale=torch.zeros(2, 4), shift=torch.ones(2, 4))
    >>> y[0, 0]
    tensor([1., 1., 1., 1.])
"""

from __future__ import annotations

from typing import Any

import torch

from . import layer_norm_modulate as norms
from .cases import Case, randn
from .dispatch import choose, runs_on
from .layer_norm_modulate import each, strides
from .norm_kernels import gate_residual_backward_kernel, gate_residual_kernel
from .tokens import modulation, precise, result_type, shaped, tiles, tokens, unsupported

Maybe = torch.Tensor | None
Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]
NORMS = ("none", "layer_norm")


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: Maybe = None,
    norm: str = "none",
    scale: Maybe = None,
    shift: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and h (B, L, C), gate, scale, shift (B, 1 or L, C), weight and bias (C,): r, and y (empty without a norm)."""
    to = precise(x, h, gate)
    r = x.to(to) + h.to(to) if gate is None else torch.addcmul(x.to(to), gate.to(to), h.to(to))
    r = r.to(result_type(x, h, gate))
    return r, norms.reference(r, scale, shift, weight, bias, eps) if norm != "none" else r.new_empty(0)


def reference_backward(
    dr: torch.Tensor,
    dy: torch.Tensor,
    r: torch.Tensor,
    h: torch.Tensor,
    gate: Maybe,
    norm: str,
    scale: Maybe,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    sums: list[bool],
) -> Gradients:
    """The gradients of r, h, gate, scale, shift, weight, bias; ``sums`` says which of gate, scale, weight are wanted.

    Where there is no gate, that of h is that of r; where it is one a token its gradient still is a tensor of tokens.
    Empty are those not wanted, and the gradient of a shift that is one a token, which is dy.
    """
    to = precise(dr, dy, r, h, gate)
    dscale, dshift, dweight, dbias = (r.new_empty(0) for _ in range(4))
    g = dr.to(to, copy=True)  # an op may not answer what it was given
    if norm != "none":
        inner, dscale, dshift, dweight, dbias = norms.reference_backward(
            dy.to(to), r.to(to), scale, weight, bias, eps, sums[1:]
        )
        g = g + inner
    dh, dgate = r.new_empty(0), r.new_empty(0)
    if gate is not None:
        dh = (g * gate.to(to)).to(h.dtype)
        if sums[0]:
            dgate = g * h.to(to)
            dgate = (dgate.sum(1, keepdim=True) if gate.shape[1] == 1 else dgate).to(gate.dtype)
    return g.to(r.dtype), dh, dgate, dscale, dshift, dweight, dbias


# --- the launches ----------------------------------------------------------------------------------------------------


def launch(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: Maybe = None,
    norm: str = "none",
    scale: Maybe = None,
    shift: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference`` by the kernel."""
    batch, count, channels = x.shape
    r, y = _results(x, h, gate, norm, scale, shift)
    if r.numel():
        cut = tiles(batch, count, channels)
        gate_residual_kernel[(cut.programs, batch)](
            x, h, gate, scale, shift, weight, bias, r, y, count,
            *x.stride()[:2], *h.stride()[:2], *strides(gate), *strides(scale), *strides(shift),
            GATES=each(gate), EACH=each(scale), NORM=norm != "none", C=channels, EPS=eps,
            ROWS=cut.rows, BLOCK=cut.block, num_warps=cut.warps,
        )  # fmt: skip
    return r, y


def launch_backward(
    dr: torch.Tensor,
    dy: torch.Tensor,
    r: torch.Tensor,
    h: torch.Tensor,
    gate: Maybe,
    norm: str,
    scale: Maybe,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    sums: list[bool],
) -> Gradients:
    """``reference_backward`` by the kernel."""
    batch, count, channels = r.shape
    normed = norm != "none"
    gated, modulated, affined = (
        wanted and v is not None for wanted, v in zip(sums, (gate, scale, weight), strict=True)
    )
    gates, per_token = each(gate), each(scale)
    none = [r.new_empty(0) for _ in range(6)]
    dx = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    dh = none[0] if gate is None else torch.empty_like(dx, dtype=h.dtype)
    dgate = torch.empty_like(dx, dtype=gate.dtype) if gated and gates else none[1]
    dscale = torch.empty_like(dx, dtype=scale.dtype) if modulated and per_token else none[2]
    cut = tiles(batch, count, channels, steps=16, elements=2048, each=256)
    planes = (gated and not gates) + 2 * (modulated and not per_token) + 2 * affined
    partial = torch.empty(planes, batch, cut.programs, channels, device=r.device)
    if dx.numel():
        gate_residual_backward_kernel[(cut.programs, batch)](
            dr.contiguous(), dy.contiguous(), r.contiguous(), h, gate, scale, weight, bias,
            dx, dh, dgate, dscale, partial, batch, count, cut.programs,
            *h.stride()[:2], *strides(gate), *strides(scale),
            GATES=gates, EACH=per_token, NORM=normed, GATE=gated, MODULATION=modulated, AFFINE=affined,
            C=channels, EPS=eps, STEPS=cut.steps, ROWS=cut.rows, BLOCK=cut.block, num_warps=cut.warps,
        )  # fmt: skip
    else:
        partial.zero_()
    planes_left = iter(partial)
    dshift, dweight, dbias = none[3:]
    if gated and not gates:
        dgate = next(planes_left).sum(1, keepdim=True).to(gate.dtype)
    if modulated and not per_token:
        dscale, dshift = (next(planes_left).sum(1, keepdim=True).to(scale.dtype) for _ in range(2))
    if affined:
        dweight, dbias = (next(planes_left).sum((0, 1)).to(weight.dtype) for _ in range(2))
    return dx, dh, dgate, dscale, dshift, dweight, dbias


def launches(**arguments: Any) -> None:
    """Forward and backward, as the ahead-of-time checks compile them."""
    r, y = launch(**arguments)
    _, h, gate, norm, scale, _, weight, bias, eps = arguments.values()
    dr, dy = torch.empty_like(r), torch.empty_like(y)
    launch_backward(dr, dy, r, h, gate, norm, scale, weight, bias, eps, [True] * 3)


def _results(
    x: torch.Tensor, h: torch.Tensor, gate: Maybe, norm: str, scale: Maybe, shift: Maybe
) -> tuple[torch.Tensor, torch.Tensor]:
    """r and y, to be filled."""
    r = torch.empty(x.shape, dtype=result_type(x, h, gate), device=x.device)
    return r, r.new_empty(0) if norm == "none" else torch.empty_like(r, dtype=result_type(r, scale, shift))


# --- the op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fewstep::gate_residual",
    mutates_args=(),
    schema="(Tensor x, Tensor h, Tensor? gate, str norm, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias,"
    " float eps) -> (Tensor, Tensor)",
)
def op(x, h, gate, norm, scale, shift, weight, bias, eps):
    return (launch if runs_on(x) else reference)(x, h, gate, norm, scale, shift, weight, bias, eps)


@op.register_fake
def _(x, h, gate, norm, scale, shift, weight, bias, eps):
    return _results(x, h, gate, norm, scale, shift)


@torch.library.custom_op(
    "fewstep::gate_residual_backward",
    mutates_args=(),
    schema="(Tensor dr, Tensor dy, Tensor r, Tensor h, Tensor? gate, str norm, Tensor? scale, Tensor? weight,"
    " Tensor? bias, float eps, bool[] sums) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def op_backward(dr, dy, r, h, gate, norm, scale, weight, bias, eps, sums):
    run = launch_backward if runs_on(r) else reference_backward
    return run(dr, dy, r, h, gate, norm, scale, weight, bias, eps, sums)


@op_backward.register_fake
def _(dr, dy, r, h, gate, norm, scale, weight, bias, eps, sums):
    dx, dh, dgate, dscale, dshift, dweight, dbias = (r.new_empty(0) for _ in range(7))
    dx = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    if gate is not None:
        dh = torch.empty_like(dx, dtype=h.dtype)
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=r.device) if sums[0] else dgate
    if scale is not None and sums[1]:
        dscale = torch.empty(scale.shape, dtype=scale.dtype, device=r.device)
        dshift = torch.empty_like(dscale) if scale.shape[1] == 1 else dshift
    if weight is not None and sums[2]:
        dweight, dbias = (torch.empty_like(weight) for _ in range(2))
    return dx, dh, dgate, dscale, dshift, dweight, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, h, gate, ctx.norm, scale, _, weight, bias, ctx.eps = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output[0], h, gate, scale, weight, bias)


def _differentiate(ctx: Any, dr: torch.Tensor, dy: torch.Tensor) -> tuple[Maybe, ...]:
    r, h, gate, scale, weight, bias = ctx.saved_tensors
    need = ctx.needs_input_grad
    sums = [need[2], need[4] or need[5], need[6] or need[7]]
    found = op_backward(dr, dy, r, h, gate, ctx.norm, scale, weight, bias, ctx.eps, sums)
    dx, dh, dgate, dscale, dshift, dweight, dbias = found
    dh = dx.to(h.dtype) if gate is None else dh
    dshift = dy.to(scale.dtype) if each(scale) else dshift
    found = (dx.to(ctx.x_dtype), dh, dgate, None, dscale, dshift, dweight, dbias, None)
    return tuple(v if needed else None for v, needed in zip(found, need, strict=True))


op.register_autograd(_differentiate, setup_context=_keep)


def gate_residual(
    x: torch.Tensor, h: torch.Tensor, gate: Maybe = None, impl: str | None = None
) -> torch.Tensor:
    """x + gate h for x and h (B, ..., C) and a gate (B, C), (B, 1, C) or of x's shape; None is 1."""
    return _run(x, h, gate, "none", None, None, None, None, 0.0, impl)[0]


def gate_residual_norm(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: Maybe = None,
    scale: Maybe = None,
    shift: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-6,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gate_residual`` and ``layer_norm_modulate`` of it, with the arguments of both."""
    r, y = _run(x, h, gate, "layer_norm", scale, shift, weight, bias, eps, impl)
    return r, shaped(y, r)


def _run(
    x: torch.Tensor,
    h: torch.Tensor,
    gate: Maybe,
    norm: str,
    scale: Maybe,
    shift: Maybe,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if h.shape != x.shape:
        raise ValueError(f"h must have x's shape {tuple(x.shape)}, got {tuple(h.shape)}")
    first = tokens(x), tokens(h, "h"), modulation(gate, x, "gate")
    given = norms.modulations(x, scale, shift, weight, bias)
    chosen = choose("gate_residual", impl, [x], unsupported(*first, *given))
    r, y = (op if chosen == "triton" else reference)(*first, norm, *given, eps)
    return shaped(r, x), y


# --- cases -----------------------------------------------------------------------------------------------------------


def unfused(x, h, gate, norm, scale, shift, weight, bias, eps):
    """As models write it, in the dtype of x."""
    r = x + h if gate is None else x + gate * h
    return r, r.new_empty(0) if norm == "none" else norms.unfused(r, scale, shift, weight, bias, eps)


RIVALS = {"unfused": unfused}


def _case(
    batch: int,
    count: int,
    channels: int,
    gates: int = 1,
    norm: str = "none",
    modulated: int = 0,
    affined: bool = False,
    dtype: Any = torch.float32,
) -> Any:
    """``gates`` and ``modulated``: how many a sample has (0, 1 or ``count``)."""

    def make(device: torch.device | str) -> dict[str, Any]:
        def some(seed: int, *shape: int) -> Maybe:
            return None if 0 in shape[1:] else randn(*shape, device=device, dtype=dtype, seed=seed)

        x, h = (randn(batch, count, channels, device=device, dtype=dtype, seed=k) for k in (0, 1))
        extra = {"gate": some(2, batch, gates, channels), "norm": norm}
        extra |= {k: some(i, batch, modulated, channels) for i, k in enumerate(("scale", "shift"), 3)}
        extra |= {k: some(i, channels) if affined else None for i, k in enumerate(("weight", "bias"), 5)}
        return {"x": x, "h": h, **extra, "eps": 1e-6}

    return make


bf16 = torch.bfloat16
CASES = [
    Case("gate", _case(2, 37, 72)),
    Case("sum", _case(2, 5, 33, gates=0)),
    Case("gates", _case(2, 9, 40, gates=9)),
    Case("gate, norm, per sample", _case(3, 21, 24, norm="layer_norm", modulated=1)),
    Case("gates, norm, per token", _case(2, 6, 20, gates=6, norm="layer_norm", modulated=6)),
    Case("sum, norm, affine", _case(2, 130, 18, gates=0, norm="layer_norm", affined=True)),
    Case("all", _case(2, 11, 65, norm="layer_norm", modulated=1, affined=True)),
    Case("empty", _case(0, 5, 16, norm="layer_norm", modulated=1, affined=True)),
    Case("half", _case(2, 19, 64, norm="layer_norm", modulated=1, dtype=torch.float16), tolerance=1e-3),
    Case("DiT-XL/2, batch 8", _case(8, 256, 1152, 1, "layer_norm", 1, dtype=bf16), True, 2**-7),
    Case("SD3, batch 2", _case(2, 4429, 1536, 1, "layer_norm", 1, dtype=bf16), True, 2**-7),
    Case("Flux", _case(1, 4608, 3072, 1, "layer_norm", 1, dtype=bf16), True, 2**-7),
    Case("Flux, gate alone", _case(1, 4608, 3072, dtype=bf16), True, 2**-7),
    Case("Wan", _case(1, 75_600, 5120, 1, "layer_norm", 1, dtype=bf16), True, 2**-7),
    Case("SDXL, affine", _case(2, 4096, 640, 0, "layer_norm", affined=True, dtype=bf16), True, 2**-7),
    Case("gates a token, float32", _case(2, 1024, 1536, 1024, "layer_norm", 1024), True),
]
