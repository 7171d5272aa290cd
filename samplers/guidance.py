"""Guidance: two denoisers, one extrapolated away from the other,  d = (1 - w) d_guide + w d_main.

w = 0 is the guide, 1 the main model, beyond 1 more than either. All are ``Blend``s: they nest, any mixture of
predictions on one path will do, and ``parts()`` is (guide, main).

    cfg           one network with and without its condition (2207.12598)
    autoguidance  a model and a worse one of its kind (2406.02507)
    rlg           a base model and the one that RL made of it (2508.21016)

    >>> from fewstep.models import load
    >>> d = cfg(load("digits"), 2.0)
    >>> x = torch.zeros(2, 1, 8, 8)
    >>> d(x, 1.0, label=torch.tensor([3, 4])).shape, len(d.parts())
    (torch.Size([2, 1, 8, 8]), 2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np
import torch

from ..models.denoiser import Denoiser, Form
from ..models.paths import Path, Times, coefficient
from .adapters import adapted
from .blend import Blend, Composite, Weights, as_time, filled, given, is_zero, null_of, nulled
from .guide import Guide

Interval = tuple[float, float]


def cfg(
    d: Denoiser,
    scale: float,
    null: Mapping[str, Any] | None = None,
    interval: Interval | None = None,
    rescale: float = 0.0,
    forwards: Literal["one", "two"] = "one",
) -> Denoiser:
    """Classifier-free guidance (2207.12598):  (1 - scale) d(x, t, null) + scale d(x, t, cond).

    Args:
        scale: 0 is the unconditional model, 1 the conditional one, bit for bit and at the cost of one.
        null: the keywords that are the condition, and what each is without one: a number, a tensor (repeated over the
            batch), a mapping of such, or None to leave the keyword out. By default the network's ``null_label``; of a
            model with a codec the null that the condition carries, ``d.codec.embed("a fox", negative="blurry")``.
        interval: guide only at noise levels lo < sigma/alpha <= hi (2404.07724, whose sigma this is); elsewhere the
            scale is 1, and where all samples are at one time the second forward is saved.
        rescale: phi in 0 .. 1, shrink the guided prediction towards the conditional one's standard deviation
            (2305.08891): F' = (phi std F_cond / std F + 1 - phi) F, for what the network predicts (of an EDM net or a
            composite, x0). No longer affine: ``affine`` is None.
        forwards: ``"one"`` runs both halves as one batch where the condition allows it; ``"two"`` holds half the
            memory.

    >>> from fewstep.models import GaussianMixture, paths
    >>> mixture = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.5)
    >>> d = cfg(mixture.denoiser(paths.flow()), 1.5, null={"label": -1})
    >>> d(torch.zeros(1, 1), 1.0, label=torch.tensor([1])).item()
    1.5
    """
    check_denoiser("d", d)
    if forwards not in ("one", "two"):
        raise ValueError(f"forwards must be 'one' or 'two', got {forwards!r}")
    number("rescale", rescale)
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in 0 .. 1, got {rescale}")
    guided = ClassifierFree(d, _null(d, null), extrapolation(d.path, scale, interval), forwards)
    alone = scale in (0, 1)  # one model, whose spread is its own
    return Rescaled(guided, float(rescale)) if rescale and not alone else guided


@overload
def autoguidance(
    good: Denoiser, bad: Denoiser, scale: float, interval: Interval | None = None
) -> Denoiser: ...
@overload
def autoguidance(*, bad: Denoiser, scale: float, interval: Interval | None = None) -> Guide: ...
def autoguidance(
    good: Denoiser | None = None,
    bad: Denoiser | None = None,
    scale: float | None = None,
    interval: Interval | None = None,
) -> Denoiser | Guide:
    """Autoguidance (2406.02507):  (1 - scale) bad + scale good,  a smaller or less trained model as the guide.

    Without ``good`` it is a ``Guide`` for ``steer``.
    """
    scale = number("scale", scale)
    check_denoiser("bad", bad)
    if good is None:
        return Guide(lambda d: autoguidance(d, bad, scale, interval))
    check_denoiser("good", good)
    return Blend((bad, good), extrapolation(good.path, scale, interval), names=("bad", "good"))


@overload
def rlg(
    base: Denoiser, tuned: Denoiser | str, scale: float, interval: Interval | None = None
) -> Denoiser: ...
@overload
def rlg(base: str, *, scale: float, interval: Interval | None = None) -> Guide: ...
@overload
def rlg(*, tuned: Denoiser | str, scale: float, interval: Interval | None = None) -> Guide: ...
def rlg(
    base: Denoiser | str | None = None,
    tuned: Denoiser | str | None = None,
    scale: float | None = None,
    interval: Interval | None = None,
) -> Denoiser | Guide:
    """RL guidance (2508.21016):  (1 - scale) base + scale tuned.

    If tuned was made from base under a reward with KL coefficient beta, p_tuned = p_base exp(r / beta) / Z, the scale
    aims at p_base exp(scale r / beta) / Z: the coefficient divided by the scale. It hits that exactly where the two
    are Gaussians of one covariance. Elsewhere the blended scores are not the scores of any noised density, and the
    law is off. For N(0, 1) and N(1, 1/2) at scale 2, where N(4/3, 1/3) is aimed at, the ODE ends at mean 1.62 and
    variance 1/4, ancestral sampling in many steps at 3/2 and 7/24: too far, too narrow.

    Without a base, ``rlg("adapter", scale=1.6)`` or ``rlg(tuned=other, scale=1.6)``, it is a ``Guide`` for ``steer``.

    ``tuned`` may be the name of an adapter (LoRA) on ``base``'s network: then the base is that network with its
    adapters off, and no second copy is held (see ``adapted``). With text or class guidance on top, write
    ``cfg(rlg(base, tuned, w), g)``; with two rewards, ``Blend((base, one, two), (1 - v - w, v, w))``.

    >>> from fewstep.models import GaussianMixture, paths
    >>> base, tuned = (GaussianMixture([1.0], [[m]], 1.0).denoiser(paths.flow(), "flow") for m in (0.0, 1.0))
    >>> wanted = GaussianMixture([1.0], [[2.5]], 1.0).denoiser(paths.flow())
    >>> x = torch.ones(1, 1, dtype=torch.float64)
    >>> torch.allclose(rlg(base, tuned, 2.5)(x, 0.4), wanted(x, 0.4))
    True
    """
    scale = number("scale", scale)
    if tuned is None and isinstance(base, str):
        base, tuned = None, base
    if not isinstance(tuned, (str, Denoiser)):
        raise TypeError(f"tuned must be a Denoiser or the name of an adapter, got {type(tuned).__name__}")
    if base is None:
        return Guide(lambda d: rlg(d, tuned, scale, interval))
    check_denoiser("base", base)
    if isinstance(tuned, str):
        base, tuned = adapted(base, None), adapted(base, tuned)
    return Blend((base, tuned), extrapolation(base.path, scale, interval), names=("base", "tuned"))


class ClassifierFree(Blend):
    """(d without its condition, d with it), as one forward of a doubled batch where that is possible."""

    def __init__(self, d: Denoiser, null: Mapping[str, Any] | None, weights: Weights, forwards: str = "one"):
        without = nulled(d) if null is None else given(d, null)
        super().__init__((without, d), weights, names=("d without its condition", "d"))
        self.null, self.forwards = null, forwards

    def raw(self, x: torch.Tensor, t: Times, **cond: Any) -> tuple[torch.Tensor, ...]:
        """The outputs without the condition, then those with it."""
        self._check(cond)
        without, with_ = self.weights(t)
        if self.forwards == "two" or is_zero(without) or is_zero(with_):
            return super().raw(x, t, **cond)
        if self.null is None:
            cond = _wide(cond, len(x))
        apart = null_of(cond, x) if self.null is None else filled(self.null, x, cond)
        try:
            both = _doubled(apart, cond, len(x))
        except _Apart:
            return super().raw(x, t, **cond)
        if isinstance(t, torch.Tensor) and t.ndim and t.shape[0] == len(x):
            t = torch.cat([t, t])
        halves = [output.chunk(2) for output in self.children[1].raw(torch.cat([x, x]), t, **both)]
        return (*(half[0] for half in halves), *(half[1] for half in halves))

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        self._check(cond)
        return super()._as(form, x, t, cond)

    def _check(self, cond: Mapping[str, Any]) -> None:
        if missing := [key for key in self.null or () if key not in cond]:
            raise ValueError(f"cond must hold {', '.join(missing)}, which the guidance replaces by its null; "
                             f"got {', '.join(cond) or 'nothing'}")  # fmt: skip


class Rescaled(Composite):
    """Guidance whose prediction is shrunk towards the conditional one's standard deviation."""

    def __init__(self, guided: ClassifierFree, phi: float):
        super().__init__((guided,))
        self.phi = phi

    def affine(self, t: Times, form: Form = "x0") -> None:
        """None: the factor depends on x."""
        return None

    def _as(self, form: str, x: torch.Tensor, t: Times, cond: dict) -> torch.Tensor:
        t, guided, d = as_time(x, t), self.children[0], self.children[0].children[1]
        weights = guided.weights(t)
        if any(is_zero(w) for w in weights) or d.affine(t, "x0") is None:
            if not any(is_zero(w) for w in weights):
                raise ValueError("rescale must be 0 where d is itself not affine: rescale once, outermost")
            return guided._as(form, x, t, cond)
        outputs = guided.raw(x, t, **cond)
        half = len(outputs) // 2
        if d.parts() == (d,) and d.precond is None:
            kind, without, with_ = d.predicts, outputs[0].to(x.dtype), outputs[1].to(x.dtype)
        else:
            kind, (p, qs) = "x0", d.affine(t, "x0")
            without, with_ = (
                sum(
                    (coefficient(q, x) * output.to(x.dtype) for q, output in zip(qs, some)),
                    coefficient(p, x) * x,
                )
                for some in (outputs[:half], outputs[half:])
            )
        blend = coefficient(weights[0], x) * without + coefficient(weights[1], x) * with_
        axes = tuple(range(1, x.ndim))
        spread, wanted = (value.std(axes, correction=0, keepdim=True) for value in (blend, with_))
        ratio = torch.where(spread > 0, wanted / spread, 1.0)
        return self._from(kind, form, x, t, blend * (self.phi * ratio + (1 - self.phi)))


def extrapolation(path: Path, scale: float, interval: Interval | None) -> Weights:
    """t -> (1 - w, w) with w the scale at noise levels lo < sigma/alpha <= hi, and 1 outside."""
    scale = number("scale", scale)
    if interval is None:
        return lambda t: (1.0 - scale, scale)
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise ValueError(f"interval must be two noise levels (lo, hi), got {interval!r}") from None
    if not 0 <= low < high:
        raise ValueError(f"interval must be (lo, hi) with 0 <= lo < hi, as sigma/alpha, got {interval!r}")

    def weights(t: Times) -> tuple[Times, Times]:
        rho = path.rho(t)
        if isinstance(rho, torch.Tensor):
            inside = (rho > low) & (rho <= high)
            w = torch.where(inside, torch.full_like(rho, scale), torch.ones_like(rho))
        elif isinstance(rho, np.ndarray):
            w = np.where((rho > low) & (rho <= high), scale, 1.0)
        else:
            w = scale if low < rho <= high else 1.0
        return 1.0 - w, w

    return weights


def check_denoiser(name: str, d: Any) -> None:
    """``TypeError`` unless d is a Denoiser."""
    if not isinstance(d, Denoiser):
        raise TypeError(f"{name} must be a Denoiser, e.g. load('digits'), got {type(d).__name__}")


def number(name: str, value: Any) -> float:
    """A finite float; else ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _null(d: Denoiser, null: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What replaces the condition; None where every condition carries that itself."""
    if null is None and d.codec is not None:
        return d.codec.null
    if null is None:
        labels = {getattr(leaf.net, "null_label", None) for leaf in d.parts()}
        if len(labels) != 1 or None in labels:
            raise ValueError(
                "null must say what each condition is without one, e.g. null={'label': 10}: this network has no "
                f"null_label (found: {sorted(map(str, labels))})"
            )
        return {"label": labels.pop()}
    if not isinstance(null, Mapping) or not null:
        raise ValueError(
            f"null must be a mapping from keywords to values, e.g. {{'label': 10}}, got {null!r}"
        )
    return null


class _Apart(Exception):
    """Two conditions do not fit into one batch."""


def _wide(value: Any, batch: int) -> Any:
    """A condition with one row for all samples as one with a row a sample."""
    if isinstance(value, Mapping):
        return {key: _wide(inner, batch) for key, inner in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1:
        return value.expand(batch, *value.shape[1:])
    return value


def _doubled(a: Mapping[str, Any], b: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Two sets of keywords as those of one batch, a's half first."""
    if a.keys() != b.keys():
        raise _Apart
    return {key: _both(a[key], b[key], batch) for key in a}


def _both(a: Any, b: Any, batch: int) -> Any:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape[:1] == b.shape[:1] == (batch,):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise _Apart
            return torch.cat([a, b])
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return _doubled(a, b, batch)
    if a is b or (isinstance(a, (str, int, float)) and type(a) is type(b) and a == b):
        return a
    raise _Apart
