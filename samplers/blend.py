"""A weighted sum of Denoisers as one Denoiser: what every kind of guidance is made of.

Parts on one path are each  form = P_i x + sum_j Q_ij F_ij  with scalars of t alone, so with weights that sum to 1

    sum_i w_i form_i = (sum_i w_i P_i) x + sum_ij (w_i Q_ij) F_ij

is affine again, in x0, eps, velocity or score alike, whatever each part predicts. Outputs stay apart until the
sampler's own sum, so a step costs no more for being guided, and correctors see every expert.

    >>> from fewstep.models import GaussianMixture, paths
    >>> one, two = (GaussianMixture([1.0], [[m]], 1.0).denoiser(paths.edm()) for m in (0.0, 1.0))
    >>> both = Blend((one, two), (-1.0, 2.0))
    >>> x = torch.zeros(1, 1, dtype=torch.float64)
    >>> one(x, 1.0).item(), two(x, 1.0).item(), both(x, 1.0).item()
    (0.0, 0.5, 1.0)
    >>> len(both.parts()), both.affine(1.0)
    (2, (0.0, (-1.0, 2.0)))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.denoiser import NULL, Denoiser, Form, convert
from ..models.paths import Path, Times, coefficient

Weights = Callable[[Times], Sequence[Times]]


class Composite(Denoiser):
    """What denoisers made of denoisers share: checks, leaves, and forms that are made from an estimate of x0.

    ``names`` are what the errors call the parts. ``net`` is the one network, or a ModuleList of the distinct ones.
    """

    def __init__(self, children: Sequence[Denoiser], names: Sequence[str] = ()):
        names = tuple(names) or tuple(f"part {k}" for k in range(len(children)))
        for name, child in zip(names, children, strict=True):
            if not isinstance(child, Denoiser):
                raise TypeError(f"{name} must be a Denoiser, e.g. load('digits'), got {type(child).__name__}")
        for name, child in zip(names[1:], children[1:], strict=True):
            _check_together(names[0], children[0], name, child)
        nets: list[nn.Module] = []
        for child in children:
            found = child.net if isinstance(child.net, nn.ModuleList) else (child.net,)
            nets += [net for net in found if net is not None and all(net is not other for other in nets)]
        kinds = {child.predicts for child in children}
        super().__init__(
            _no_call,
            children[0].path,
            predicts=kinds.pop() if len(kinds) == 1 else "x0",
            net=None if not nets else nets[0] if len(nets) == 1 else nn.ModuleList(nets),
            shape=next((child.shape for child in children if child.shape is not None), None),
            codec=next((child.codec for child in children if child.codec is not None), None),
        )
        self.children = tuple(children)

    def parts(self) -> tuple[Denoiser, ...]:
        """The leaves, in the order of their outputs in ``raw``."""
        return tuple(leaf for child in self.children for leaf in child.parts())

    def raw(self, x: torch.Tensor, t: Times, **cond: Any) -> tuple[torch.Tensor, ...]:
        """The outputs of all leaves."""
        return tuple(output for child in self.children for output in child.raw(x, t, **cond))

    def exponents(self, t: Times) -> tuple[Times, ...]:
        """One weight a leaf: the score is their weighted sum (where d is not affine, before it is bent)."""
        (child,) = self.children
        return _exponents(child, t)

    def _from(self, kind: str, form: str, x: torch.Tensor, t: Times, value: torch.Tensor) -> torch.Tensor:
        """``form`` at time t where the estimate is ``value``, a ``kind``."""
        wanted = "flow" if form == "v" else form
        if kind == wanted:
            return value
        p, q = convert(self.path, t, kind, wanted)
        if isinstance(p, float) and not np.isfinite([p, q]).all():
            raise ValueError(f"t must be a time where {form} follows from {kind}, got t = {t}")
        return x * coefficient(p, x) + coefficient(q, x) * value.to(x.dtype)


class Blend(Composite):
    """sum_i w_i(t) d_i with weights that sum to 1.

    Args:
        children: Denoisers on one path, of any predictions; blends too.
        weights: one number a child, or a function t -> such numbers (for a tensor t tensors, one entry a time).
        names: what errors call the children.

    A child whose weight is the float 0 is not called: its outputs are zeros that take no memory. With one weight 1 and
    the others 0 everything is that child's, bit for bit.
    """

    def __init__(
        self,
        children: Sequence[Denoiser],
        weights: Sequence[float] | Weights,
        names: Sequence[str] = (),
    ):
        if not children:
            raise ValueError("children must hold at least one Denoiser, got none")
        super().__init__(children, names)
        self._weights = weights if callable(weights) else _constant(weights, len(children))

    def weights(self, t: Times) -> tuple[Times, ...]:
        """One weight a child at time t."""
        weights = tuple(self._weights(t))
        if len(weights) != len(self.children):
            raise ValueError(f"weights must be {len(self.children)}, one a child, got {len(weights)}")
        if all(isinstance(w, (float, int)) for w in weights) and not abs(sum(weights) - 1) < 1e-9:
            raise ValueError(f"weights must sum to 1, got {weights} at t = {t}")
        return weights

    def exponents(self, t: Times) -> tuple[Times, ...]:
        """One weight a leaf, products where blends nest: the score is sum_i exponent_i score_i."""
        return tuple(
            w * inner
            for w, child in zip(self.weights(t), self.children, strict=True)
            for inner in _exponents(child, t)
        )

    def raw(self, x: torch.Tensor, t: Times, **cond: Any) -> tuple[torch.Tensor, ...]:
        """All leaves' outputs; zeros for those whose weight is the float 0."""
        outputs: list[torch.Tensor] = []
        for w, child in zip(self.weights(t), self.children, strict=True):
            outputs += _skipped(child, x, t) if is_zero(w) else child.raw(x, t, **cond)
        return tuple(outputs)

    def affine(self, t: Times, form: Form = "x0") -> tuple[Times, tuple[Times, ...]] | None:
        """(P, (Q_1 .. Q_m)), or None where a child is not affine."""
        p: Times = 0.0
        qs: list[Times] = []
        for w, child in zip(self.weights(t), self.children, strict=True):
            scalars = child.affine(t, form)
            if scalars is None:
                return None
            p = p + _times(w, scalars[0])
            qs += [_times(w, q) for q in scalars[1]]
        return p, tuple(qs)

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        t = as_time(x, t)
        if self.affine(t, form) is not None:  # type: ignore[arg-type]
            return super()._as(form, x, t, cond)
        answer = torch.zeros_like(x)
        for w, child in zip(self.weights(t), self.children, strict=True):
            if not is_zero(w):
                answer = answer + coefficient(w, x) * child._as(form, x, t, cond)
        return answer


class Given(Composite):
    """A composite with some keywords fixed, whatever it is called with (of a leaf, ``given`` makes a leaf)."""

    def __init__(self, child: Denoiser, fixed: Mapping[str, Any]):
        super().__init__((child,))
        self.fixed = dict(fixed)

    def parts(self) -> tuple[Denoiser, ...]:
        """The leaves, each with the keywords fixed."""
        return tuple(given(leaf, self.fixed) for leaf in self.children[0].parts())

    def raw(self, x: torch.Tensor, t: Times, **cond: Any) -> tuple[torch.Tensor, ...]:
        """The child's outputs."""
        return self.children[0].raw(x, t, **filled(self.fixed, x, cond))

    def affine(self, t: Times, form: Form = "x0") -> tuple[Times, tuple[Times, ...]] | None:
        """The child's."""
        return self.children[0].affine(t, form)

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        return self.children[0]._as(form, x, t, filled(self.fixed, x, cond))


def given(d: Denoiser, fixed: Mapping[str, Any]) -> Denoiser:
    """``d`` with keywords fixed: numbers fill a batch, tensors are repeated over it, None leaves the keyword out.

    >>> from fewstep.models import GaussianMixture, paths
    >>> d = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 1e-6).denoiser(paths.flow())
    >>> given(d, {"label": 1})(torch.zeros(2, 1), 1.0).round(decimals=3).tolist()
    [[1.0], [1.0]]
    """
    if d.parts() != (d,):
        return Given(d, fixed)
    leaf, inner = copy.copy(d), d.call

    def call(x: torch.Tensor, tau: torch.Tensor, **cond: Any) -> Any:
        return inner(x, tau, **filled(fixed, x, cond))

    leaf.call = call
    return leaf


class Nulled(Composite):
    """A composite told the null that its condition carries (of a leaf, ``nulled`` makes a leaf)."""

    def __init__(self, child: Denoiser):
        super().__init__((child,))

    def parts(self) -> tuple[Denoiser, ...]:
        """The leaves, each told the null."""
        return tuple(nulled(leaf) for leaf in self.children[0].parts())

    def raw(self, x: torch.Tensor, t: Times, **cond: Any) -> tuple[torch.Tensor, ...]:
        """The child's outputs."""
        return self.children[0].raw(x, t, **null_of(cond, x))

    def affine(self, t: Times, form: Form = "x0") -> tuple[Times, tuple[Times, ...]] | None:
        """The child's."""
        return self.children[0].affine(t, form)

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        return self.children[0]._as(form, x, t, null_of(cond, x))


def nulled(d: Denoiser) -> Denoiser:
    """``d`` told ``cond["null"]`` in place of its condition: no text, or the text to keep away from.

    >>> from fewstep.models import paths
    >>> d = Denoiser(lambda x, tau, shift: x + shift[:, None], paths.flow(), predicts="x0")
    >>> cond = {"shift": torch.ones(1), "null": {"shift": torch.zeros(1)}}
    >>> nulled(d)(torch.ones(1, 1), 0.5, **cond).item(), d(torch.ones(1, 1), 0.5, **cond).item()
    (1.0, 2.0)
    """
    if d.parts() != (d,):
        return Nulled(d)
    leaf = copy.copy(d)
    leaf.raw = lambda x, t, **cond: d.raw(x, t, **null_of(cond, x))  # type: ignore[method-assign]
    return leaf


def null_of(cond: Mapping[str, Any], x: torch.Tensor) -> dict[str, Any]:
    """``cond`` with the null that it carries put over it; it goes on carrying it, for guidance inside of guidance."""
    null = cond.get(NULL)
    if not isinstance(null, Mapping):
        raise ValueError(
            "cond must hold null, what guidance leads away from, and this condition has none: cond = "
            "d.codec.embed(prompt, negative='..') makes one, and models whose guidance is distilled (Flux) want no cfg"
        )
    return filled(null, x, cond)


def filled(fixed: Mapping[str, Any], x: torch.Tensor, cond: Mapping[str, Any]) -> dict[str, Any]:
    """``cond`` with the keywords of ``fixed`` put over it, as wide as the batch of x."""
    answer = dict(cond)
    for key, value in fixed.items():
        if value is None:
            answer.pop(key, None)
        else:
            answer[key] = _wide(key, value, x, cond.get(key))
    return answer


def _wide(key: str, value: Any, x: torch.Tensor, like: Any) -> Any:
    if isinstance(value, Mapping):
        return filled(value, x, like if isinstance(like, Mapping) else {})
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(like, torch.Tensor):
            return torch.full_like(like, value)
        return torch.full((len(x),), value, device=x.device)
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(x.device)
    if isinstance(like, torch.Tensor) and value.ndim == like.ndim - 1 or value.ndim == 0:
        value = value[None]
    if value.shape[0] not in (1, len(x)):
        raise ValueError(
            f"{key} is fixed to a tensor of shape {tuple(value.shape)}: its first axis must be 1 or the batch, {len(x)}"
        )
    return value.expand(len(x), *value.shape[1:])


def is_zero(weight: Times) -> bool:
    """Whether a weight is a plain 0, known without asking the device."""
    return isinstance(weight, (float, int)) and weight == 0


def as_time(x: torch.Tensor, t: Times) -> Times:
    """A float or a tensor on the device of x."""
    if isinstance(t, np.ndarray):
        return torch.as_tensor(t, device=x.device)
    return float(t) if isinstance(t, int) else t


def _times(weight: Times, value: Times) -> Times:
    """weight * value, and 0 for the weight 0 though the value be infinite."""
    if isinstance(weight, torch.Tensor):
        return torch.where(weight == 0, torch.zeros_like(weight), weight * value)
    if isinstance(weight, np.ndarray):
        with np.errstate(invalid="ignore"):
            return np.where(weight == 0, 0.0, weight * value)
    return 0.0 if weight == 0 else weight * value


def _skipped(child: Denoiser, x: torch.Tensor, t: Times) -> list[torch.Tensor]:
    """What stands for the outputs of a child that is not called."""
    scalars = (leaf.affine(t, "x0") for leaf in child.parts())
    outputs = sum(1 if found is None else len(found[1]) for found in scalars)
    return [x.new_zeros(()).expand(x.shape)] * outputs


def _exponents(d: Denoiser, t: Times) -> tuple[Times, ...]:
    return d.exponents(t) if isinstance(d, Composite) else (1.0,) * len(d.parts())


def _constant(weights: Sequence[float], children: int) -> Weights:
    try:
        numbers = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        raise TypeError(f"weights must be numbers or a function of t, got {weights!r}") from None
    if len(numbers) != children or not np.isfinite(numbers).all() or not abs(sum(numbers) - 1) < 1e-9:
        raise ValueError(f"weights must be {children} finite numbers that sum to 1, got {numbers}")
    return lambda t: numbers


def _no_call(*_: Any, **__: Any) -> Any:
    raise TypeError("a composite has no network of its own: call it, or its parts()")


def _check_together(one: str, a: Denoiser, other: str, b: Denoiser) -> None:
    if a.shape is not None and b.shape is not None and a.shape != b.shape:
        raise ValueError(
            f"{one} and {other} must have samples of one shape, got {a.shape} for {one} and {b.shape} for {other}"
        )
    apart = _first_difference(a.path, b.path)
    if apart is not None:
        raise ValueError(
            f"{one} and {other} must lie on one path: {one} is on {a.path.name} and {other} on {b.path.name}, and at "
            f"t = {apart:g} their alpha and sigma are {_at(a.path, apart)} and {_at(b.path, apart)}"
        )


def _at(path: Path, t: float) -> str:
    return f"({path.alpha(t):.4g}, {path.sigma(t):.4g})"


def _first_difference(a: Path, b: Path) -> float | None:
    """A time at which two paths are different curves; a flow's shift is no part of the curve."""
    if a == b:
        return None
    t = np.linspace(max(a.t_clean, b.t_clean), min(a.t_max, b.t_max), 33)
    same = np.isclose(a.alpha(t), b.alpha(t), rtol=1e-9, atol=1e-12) & np.isclose(
        a.sigma(t), b.sigma(t), rtol=1e-9, atol=1e-12
    )
    return None if same.all() else float(t[int(np.argmin(same))])
