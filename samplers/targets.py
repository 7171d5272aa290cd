"""What particles are to follow: products of powers of what models know, and rewards on top.

A target says which noised densities q_i enter with which exponents b_i; the particles' law at every noise level is then

    pi_t(x)  ~  prod_i q_i,t(x)^(b_i)  exp(beta_t scale r(x / alpha_t)),          B = sum_i b_i

and at the clean end the combination of the models' own densities. It is not the noised version of it: no prediction
from a blend of scores is.

    anneal(beta)                p^beta                          B = beta
    product()                   p_1 p_2 ..                      B = how many
    product(beta=2)             (p_1 p_2 ..)^beta
    geometric(scale)            p_1^(1 - scale) p_2^scale       B = 1
    cfg(cond, uncond, scale)    p(x | uncond)^(1 - scale) p(x | cond)^scale
    rlg(base, tuned, scale)     p_base^(1 - scale) p_tuned^scale = p_base exp(scale r / kl): RL guidance, unbiased
    tilt(reward)                p exp(scale r)
    tilt(reward, of=target)     any of these, times exp(scale r)
    own()                       what the denoiser says itself: of cfg(d, 3) that geometric mean

Exponents below 0 ask for a narrower density elsewhere: p_c^w p_u^(1-w) exists where p_u is the broader in every tail.

>>> from fewstep.models import load
>>> target = anneal(2.0)
>>> target.name, target.bind((load("digits"),)).total
('anneal', 2.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..models.denoiser import NULL, Denoiser
from ..models.paths import Path
from ..models.rewards import Reward, Space, checked
from . import guidance
from .blend import Blend, Composite, given
from .guidance import ClassifierFree, number
from .powers import Powers

Denoisers = tuple[Denoiser, ...]
Condition = Mapping[str, Any]
Spread = Callable[[Condition], dict[str, Any]]
Gradient = Literal["none", "half", "full"]

ONE_BRANCH = (
    "target {} needs a model with an unconditional branch, or uncond=..: this one has none (guidance that was "
    "distilled into a network, as Flux's, leaves one branch)"
)


@dataclass(frozen=True)
class Tilt:
    """exp(beta_t scale r(x / alpha)), where beta rises from 0 to 1 in log rho between noise levels ``ramp``."""

    reward: Reward
    scale: float
    ramp: tuple[float, float]
    gradient: Gradient
    space: Space

    def beta(self, path: Path, times: np.ndarray) -> np.ndarray:
        """beta scale at each time."""
        low, high = (math.log(level) for level in self.ramp)
        with np.errstate(divide="ignore"):
            level = -path.lam(np.asarray(times, dtype=np.float64))
        return self.scale * np.clip((high - level) / (high - low), 0.0, 1.0)

    def score(self, codec: Any) -> Reward:
        """The reward as it is asked: of decoded images where there is a codec, finite and one number a sample."""
        return checked(self.reward, codec, self.space)


@dataclass(frozen=True)
class Target:
    """``powers(denoisers)`` are the factors and their exponents; ``tilt`` what multiplies them. See the functions."""

    name: str
    powers: Callable[[Denoisers, Spread], tuple[Sequence[Denoiser], Sequence[float]]]
    tilt: Tilt | None = None

    def bind(self, denoisers: Denoisers, spread: Spread = dict) -> Powers:
        """The product of powers for these models; ``spread`` gives a target's own conditions a row a particle."""
        for k, d in enumerate(denoisers):
            if not isinstance(d, Denoiser):
                raise TypeError(
                    f"d must be a Denoiser or a list of them, e.g. load('digits'), got {type(d).__name__} at {k}"
                )
        children, powers = self.powers(denoisers, spread)
        bound = Powers(children, powers)
        if bound.affine(bound.path.time(0.0)) is None:
            raise ValueError(
                f"target {self.name} needs models whose score is a weighted sum: guidance with rescale or a changed "
                "estimate of x0 is none; set rescale to 0"
            )
        return bound

    def check_branches(self, d: Denoiser, cond: Condition) -> None:
        """``ValueError`` where guidance in d leads away from a null that the condition does not carry."""
        if isinstance(d, ClassifierFree) and d.null is None and cond.get(NULL) is None:
            raise ValueError(ONE_BRANCH.format(self.name))
        for child in d.children if isinstance(d, Composite) else ():
            self.check_branches(child, cond)


def own() -> Target:
    """What the denoiser stands for; with ``cfg`` or ``rlg`` round it, the density that these aim at and miss."""
    return Target("own", lambda ds, _: (_only("own", ds, 1), (1.0,)))


def anneal(beta: float) -> Target:
    """p^beta: colder for beta > 1, warmer below."""
    beta = _positive("beta", beta)
    return Target("anneal", lambda ds, _: (_only("anneal", ds, 1), (beta,)))


def product(beta: float = 1.0, powers: Sequence[float] | None = None) -> Target:
    """(p_1 p_2 ..)^beta, or prod_i p_i^powers[i].

    >>> from fewstep.models import load
    >>> d = load("digits")
    >>> product(powers=(2.0, -0.5)).bind((d, d)).total
    1.5
    """
    beta = _positive("beta", beta)
    if powers is not None:
        powers = tuple(number("powers", b) for b in powers)
        if beta != 1.0:
            raise ValueError(f"beta must be 1 where powers are given, got {beta}")

    def bind(ds: Denoisers, spread: Spread):
        if powers is None and len(ds) < 2:
            raise ValueError(f"target product needs two models or more, d = [d1, d2], got {len(ds)}")
        if powers is not None and len(powers) != len(ds):
            raise ValueError(f"powers must be one number a model, {len(ds)}, got {powers}")
        return ds, powers or (beta,) * len(ds)

    return Target("product", bind)


def geometric(scale: float) -> Target:
    """p_1^(1 - scale) p_2^scale of two models."""
    scale = number("scale", scale)
    return Target("geometric", lambda ds, _: _blend(_only("geometric", ds, 2), scale, None))


def cfg(
    cond: Condition | Denoiser | None = None,
    uncond: Condition | Denoiser | None = None,
    scale: float | None = None,
    interval: guidance.Interval | None = None,
) -> Target:
    """p(x | uncond)^(1 - scale) p(x | cond)^scale: the density that classifier-free guidance aims at.

    Args:
        cond, uncond: keywords of the network, or two Denoisers. By default the call's ``cond`` and what guidance
            takes for no condition; of a denoiser that is guided already, its own two.
        interval: noise levels outside which the scale is 1. The density jumps there, which no weight makes up for: the
            result is a better proposal, and not exact.
    """
    if isinstance(cond, Denoiser) or isinstance(uncond, Denoiser):
        if not (isinstance(cond, Denoiser) and isinstance(uncond, Denoiser)):
            raise TypeError("cond and uncond must be two Denoisers or two sets of keywords, got one of each")
        factor = number("scale", scale)
        return Target("cfg", lambda ds, _: _blend((uncond, cond), factor, interval))

    def bind(ds: Denoisers, spread: Spread):
        (d,) = _only("cfg", ds, 1)
        null = None if uncond is None else spread(uncond)
        if isinstance(d, ClassifierFree):
            if scale is None and uncond is None and interval is None:
                return (d if cond is None else given(d, spread(cond)),), (1.0,)
            d, null = d.children[1], d.null if null is None else null
        if scale is None:
            raise ValueError("scale must be given: this denoiser is not guided, so it has none of its own")
        try:
            guided = guidance.cfg(d, scale, null=null, interval=interval)
        except ValueError as error:
            if null is not None or "null" not in str(error):
                raise
            raise ValueError(f"{ONE_BRANCH.format('cfg')}. {error}") from None
        return (guided if cond is None else given(guided, spread(cond)),), (1.0,)

    return Target("cfg", bind)


def rlg(base: Denoiser | None, tuned: Denoiser | str, scale: float) -> Target:
    """p_base^(1 - scale) p_tuned^scale, which RL guidance (2508.21016) aims at; ``base`` None is the call's d.

    ``tuned`` may be the name of an adapter on the base's network.
    """
    scale = number("scale", scale)

    def bind(ds: Denoisers, spread: Spread):
        first = ds[0] if base is None else base
        return (guidance.rlg(first, tuned, scale),), (1.0,)

    return Target("rlg", bind)


def tilt(
    reward: Reward,
    scale: float = 1.0,
    of: Target | None = None,
    gradient: Gradient = "none",
    ramp: tuple[float, float] = (0.03, 3.0),
    reward_space: Space = "image",
) -> Target:
    """p exp(scale r), or another target times exp(scale r).

    Args:
        gradient: how the reward moves the particles that it weighs. ``"none"``: not at all, the weights are differences
            of beta r along the path. ``"half"``: by half the noise's variance times the gradient, with the weights of
            2503.02819 (proposition 3.4). ``"full"``: by all of it, with the ratio of the two Gaussian steps as weight,
            exact for the table's own chain; both need rows that draw noise.
        ramp: noise levels between which the reward comes on, in units of the data: it is asked about noisy samples.
    """
    if not callable(reward):
        raise TypeError(f"reward must be a function of images (B, C, H, W), got {type(reward).__name__}")
    if gradient not in ("none", "half", "full"):
        raise ValueError(f"gradient must be 'none', 'half' or 'full', got {gradient!r}")
    if gradient != "none" and not getattr(reward, "differentiable", True):
        raise ValueError(f"gradient must be 'none' for a reward without one, got {gradient!r}")
    if reward_space not in ("image", "latent"):
        raise ValueError(f"reward_space must be 'image' or 'latent', got {reward_space!r}")
    try:
        low, high = (float(level) for level in ramp)
    except (TypeError, ValueError):
        raise ValueError(f"ramp must be two noise levels (low, high), got {ramp!r}") from None
    if not 0 < low < high < math.inf:
        raise ValueError(f"ramp must be (low, high) with 0 < low < high, as sigma/alpha, got {ramp!r}")
    base = own() if of is None else of
    if base.tilt is not None:
        raise ValueError("of must be a target without a reward: add the two rewards up instead")
    tilted = Tilt(reward, number("scale", scale), (low, high), gradient, reward_space)
    name = "tilt" if of is None else f"tilt of {of.name}"
    return replace(base, name=name, tilt=tilted)


def _blend(pair: Sequence[Denoiser], scale: float, interval) -> tuple[Sequence[Denoiser], Sequence[float]]:
    weights = guidance.extrapolation(pair[0].path, scale, interval)
    return (Blend(pair, weights),), (1.0,)


def _only(name: str, ds: Denoisers, count: int) -> Denoisers:
    if len(ds) != count:
        wanted = "one model" if count == 1 else f"{count} models, d = [d1, d2]"
        raise ValueError(f"target {name} needs {wanted}, got {len(ds)}")
    return ds


def _positive(name: str, value: float) -> float:
    value = number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value
