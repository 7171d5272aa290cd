"""The divergence of a denoiser, with the outputs of the same pass: exact, or Hutchinson's estimate.

    div f = sum_d df_d / dx_d        E_v [v . (df/dx) v] = div f   for v of independent signs (Hutchinson, 1990)

Forward mode answers f and (df/dx) v in one pass of about two calls' cost. Where an op has no forward derivative the
reverse mode does it (v . J v = v . J' v), with memory for the whole graph. Attention is computed by its plain formula
meanwhile.

>>> from fewstep.models import GaussianMixture, paths
>>> d = GaussianMixture([1.0], [[0.0, 0.0]], [[1.0, 3.0]]).denoiser(paths.edm())
>>> x = torch.zeros(1, 2, dtype=torch.float64)
>>> with_divergence(d, x, 1.0, {}, "eps").divergence             # eps = x_d / (var_d + 1)
tensor([0.7500], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models.denoiser import Denoiser, Form


class Diverged(NamedTuple):
    """``d.raw(x, t)``, the divergence (B,) in float64, and the estimate's variance (B,) where probes tell it."""

    outputs: tuple[torch.Tensor, ...]
    divergence: torch.Tensor
    variance: torch.Tensor | None


def with_divergence(
    d: Denoiser,
    x: torch.Tensor,
    t: float,
    cond: Mapping[str, Any],
    form: Form = "eps",
    probes: list[torch.Tensor] | None = None,
) -> Diverged:
    """``d.raw(x, t)`` and the divergence of ``form``: over the axes, or over ``probes``, tensors like x, of signs. Two
    probes or more tell how far their mean is off: their sample variance over their number.
    """
    scalars = d.affine(t, form)
    if scalars is None:
        raise ValueError("d must be affine in its networks' outputs to have a divergence here: no rescaling")
    p, qs = scalars
    outputs, found = (), []
    for v in _axes(x) if probes is None else probes:
        outputs, along = _curvature(lambda y: d.raw(y, t, **cond), qs, x, v)
        found.append(p * v.double().square().flatten(1).sum(1) + along)
    if probes is None:
        return Diverged(outputs, torch.stack(found).sum(0), None)
    each = torch.stack(found)
    return Diverged(outputs, each.mean(0), each.var(0) / len(each) if len(each) > 1 else None)


def _axes(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Unit vectors, one a dimension, each for the whole batch."""
    for k in range(x[0].numel()):
        v = torch.zeros_like(x)
        v.view(len(x), -1)[:, k] = 1
        yield v


def _curvature(f: Callable, qs: Sequence[float], x: torch.Tensor, v: torch.Tensor):
    """f(x), a tuple, and  v . J v  (B,) for J the Jacobian of sum_i q_i f_i."""
    with sdpa_kernel(SDPBackend.MATH):
        try:
            with torch.no_grad():
                outputs, tangents = torch.func.jvp(f, (x,), (v,))  # type: ignore[bad-unpacking]
            return outputs, sum(q * _dot(v, tangent) for q, tangent in zip(qs, tangents, strict=True))
        except NotImplementedError:  # an op without a forward derivative
            pass
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            outputs = f(y)
            value = sum(q * _dot(v, output).sum() for q, output in zip(qs, outputs, strict=True))
            (pulled,) = torch.autograd.grad(value, y)
    return tuple(output.detach() for output in outputs), _dot(v, pulled)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b.to(a.dtype)).flatten(1).sum(1)
