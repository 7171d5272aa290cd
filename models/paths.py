"""Gaussian paths  x_t = alpha(t) x0 + sigma(t) eps,  with time running from noise (``t_max``) to data (``t_clean``).

A path answers, in float64 and for a float, a NumPy array or a tensor alike (the same kind comes out):

    alpha(t)  sigma(t)  rho = sigma/alpha  lam = log(alpha/sigma)  time(lam)  alpha_prime(t)  sigma_prime(t)

``t_min`` is the last time at which a network is meant to be called; ``t_clean`` is where sigma is exactly 0.

    >>> path = vp_linear()
    >>> abs(path.time(path.lam(0.3)) - 0.3) < 1e-14
    True
    >>> path.sigma(path.t_clean), flow().alpha(1.0)
    (0.0, 0.0)
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

Times = Any  # float | np.ndarray | torch.Tensor


def _same_kind(method):
    """Run ``method(self, xp, t)`` in float64 with xp = numpy or torch, and hand back the kind that came in."""

    @functools.wraps(method)
    def call(self, t):
        if isinstance(t, torch.Tensor):
            return method(self, torch, t.double())
        with np.errstate(divide="ignore", over="ignore"):
            out = method(self, np, np.asarray(t, dtype=np.float64))
        return out if isinstance(t, np.ndarray) else float(out)

    return call


def _softplus(xp, z):
    """log(1 + exp(z)). Not logaddexp: torch rounds it by where a number stands in its tensor."""
    return xp.maximum(z, xp.zeros_like(z)) + xp.log1p(xp.exp(-xp.abs(z)))


class Path:
    """What the paths share: everything that follows from alpha, sigma and lam."""

    name: str
    t_max: float
    t_min: float
    t_clean: float = 0.0

    def alpha(self, t: Times) -> Times:
        """The signal's coefficient."""
        raise NotImplementedError

    def sigma(self, t: Times) -> Times:
        """The noise's coefficient."""
        raise NotImplementedError

    def lam(self, t: Times) -> Times:
        """log(alpha / sigma): +inf where sigma = 0, -inf where alpha = 0."""
        raise NotImplementedError

    def time(self, lam: Times) -> Times:
        """The time at which ``lam`` is reached: the inverse of ``lam(t)``, at both ends too."""
        raise NotImplementedError

    def alpha_prime(self, t: Times) -> Times:
        """d alpha / dt."""
        raise NotImplementedError

    def sigma_prime(self, t: Times) -> Times:
        """d sigma / dt."""
        raise NotImplementedError

    @_same_kind
    def rho(self, xp, t):
        """sigma / alpha, the noise level of x / alpha."""
        return self.sigma(t) / self.alpha(t)

    def time_of_rho(self, rho: Times) -> Times:
        """The time at which sigma / alpha = rho."""
        if isinstance(rho, torch.Tensor):
            return self.time(-torch.log(rho.double()))
        with np.errstate(divide="ignore"):
            lam = -np.log(np.asarray(rho, dtype=np.float64))
        return self.time(lam if isinstance(rho, np.ndarray) else float(lam))

    def add_noise(self, x0: torch.Tensor, t: Times, eps: torch.Tensor) -> torch.Tensor:
        """alpha(t) x0 + sigma(t) eps, for t a float or a tensor whose leading axes are those of x0."""
        return coefficient(self.alpha(t), x0) * x0 + coefficient(self.sigma(t), x0) * eps

    def to_config(self) -> dict:
        """A JSON-able description; ``from_config`` reads it back."""
        config: dict = {"path": self.name}
        for key, value in asdict(self).items():  # type: ignore[call-overload]
            config[key] = value
        return config


def coefficient(value: Times, like: torch.Tensor) -> float | torch.Tensor:
    """A scalar as it is; one value a sample as a tensor of ``like``'s dtype that broadcasts against it."""
    if isinstance(value, (float, int)):
        return value
    value = torch.as_tensor(value, device=like.device)
    if value.ndim > like.ndim:
        raise ValueError(f"t must broadcast to x: t has shape {tuple(value.shape)}, x {tuple(like.shape)}")
    return value.to(like.dtype).reshape(value.shape + (1,) * (like.ndim - value.ndim))


@dataclass(frozen=True)
class VPLinear(Path):
    """alpha = exp(-t^2 (b1 - b0)/4 - t b0/2), the continuous DDPM (2011.13456)."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    t_max: float = 1.0
    t_min: float = 1e-3
    name = "vp_linear"

    def __post_init__(self):
        if not 0 < self.beta_0 <= self.beta_1:
            raise ValueError(
                f"must have 0 < beta_0 <= beta_1, got beta_0 = {self.beta_0}, beta_1 = {self.beta_1}"
            )

    def _log_alpha(self, t):
        return -t * t * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2

    @_same_kind
    def alpha(self, xp, t):
        return xp.exp(self._log_alpha(t))

    @_same_kind
    def sigma(self, xp, t):
        return xp.sqrt(-xp.expm1(2 * self._log_alpha(t)))

    @_same_kind
    def lam(self, xp, t):
        log_alpha = self._log_alpha(t)
        return log_alpha - 0.5 * xp.log(-xp.expm1(2 * log_alpha))

    @_same_kind
    def time(self, xp, lam):
        log_alpha = -0.5 * _softplus(xp, -2 * lam)
        b = self.beta_0 / 2
        return -2 * log_alpha / (b + xp.sqrt(b * b - (self.beta_1 - self.beta_0) * log_alpha))

    @_same_kind
    def sigma_prime(self, xp, t):
        return self.alpha(t) ** 2 * (t * (self.beta_1 - self.beta_0) + self.beta_0) / 2 / self.sigma(t)

    @_same_kind
    def alpha_prime(self, xp, t):
        return -self.alpha(t) * (t * (self.beta_1 - self.beta_0) + self.beta_0) / 2


_COSINE_OFFSET = 0.008
_COSINE_F0 = _COSINE_OFFSET / (1 + _COSINE_OFFSET) * math.pi / 2


@dataclass(frozen=True)
class VPCosine(Path):
    """alpha = cos(f)/cos(f0), f = (t + .008)/1.008 pi/2 (2102.09672).

    ``t_max`` stops at lam = -5.1: beyond it alpha vanishes and an eps-model says nothing of x0.
    """

    t_max: float = 0.9946
    t_min: float = 1e-3
    name = "vp_cosine"

    def _f(self, t):
        return (t + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * (math.pi / 2)

    @_same_kind
    def alpha(self, xp, t):
        return xp.cos(self._f(t)) / math.cos(_COSINE_F0)

    @_same_kind
    def sigma(self, xp, t):
        # 1 - alpha^2 as a product, so that nothing cancels near t = 0
        f, step = self._f(t), t / (1 + _COSINE_OFFSET) * (math.pi / 2)
        return xp.sqrt(xp.sin(step) * xp.sin(f + _COSINE_F0)) / math.cos(_COSINE_F0)

    @_same_kind
    def lam(self, xp, t):
        return xp.log(self.alpha(t)) - xp.log(self.sigma(t))

    @_same_kind
    def time(self, xp, lam):
        # sin^2 f = sin^2 f0 + sigma^2 cos^2 f0, hence sin(f - f0) = sigma^2 cos^2 f0 / sin(f + f0)
        sigma2 = xp.exp(-_softplus(xp, 2 * lam))
        alpha = xp.exp(-0.5 * _softplus(xp, -2 * lam))
        cos0, sin0 = math.cos(_COSINE_F0), math.sin(_COSINE_F0)
        sine = xp.sqrt(sin0**2 + sigma2 * cos0**2)
        cosine = alpha * cos0
        sin_sum = sine * cos0 + cosine * sin0
        cos_difference = cosine * cos0 + sine * sin0
        step = xp.arctan2(sigma2 * cos0**2 / sin_sum, cos_difference)
        return step * (1 + _COSINE_OFFSET) / (math.pi / 2)

    @_same_kind
    def alpha_prime(self, xp, t):
        rate = math.pi / 2 / (1 + _COSINE_OFFSET)
        return -rate * xp.sin(self._f(t)) / math.cos(_COSINE_F0)

    @_same_kind
    def sigma_prime(self, xp, t):
        return -self.alpha(t) * self.alpha_prime(t) / self.sigma(t)


@dataclass(frozen=True)
class VPDiscrete(Path):
    """A DDPM given by its table ``alphas_cumprod``: t is the index k, networks are called at t = k.

    Between indices lam is linear in t; from t = 0 to the clean end at t = -1, rho is.
    """

    alphas_cumprod: tuple[float, ...]
    t_clean = -1.0
    t_min = 0.0
    name = "vp_discrete"

    def __post_init__(self):
        abar = np.asarray(self.alphas_cumprod, dtype=np.float64)
        if abar.ndim != 1 or len(abar) < 2 or not (np.diff(abar) < 0).all() or abar[0] >= 1 or abar[-1] < 0:
            raise ValueError("alphas_cumprod must be a falling 1-d sequence of at least two values in [0, 1)")
        if abar[-1] == 0:
            raise ValueError(
                "alphas_cumprod must not end at 0 (zero terminal SNR): lam has no linear table there"
            )
        object.__setattr__(self, "alphas_cumprod", tuple(float(a) for a in abar))
        object.__setattr__(self, "_lams", 0.5 * (np.log(abar) - np.log1p(-abar)))

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return float(len(self.alphas_cumprod) - 1)

    def _table(self, xp, like):
        lams = self._lams  # type: ignore[attr-defined]
        return lams if xp is np else torch.as_tensor(lams, device=like.device)

    @_same_kind
    def lam(self, xp, t):
        lams = self._table(xp, t)
        k = xp.clip(xp.floor(t), 0, len(lams) - 2)
        k = k.astype(int) if xp is np else k.long()
        inside = lams[k] + (t - k) * (lams[k + 1] - lams[k])
        with np.errstate(invalid="ignore"):
            below = lams[0] - xp.log1p(xp.where(t < 0, t, xp.zeros_like(t)))
        return xp.where(t < 0, below, inside)

    @_same_kind
    def time(self, xp, lam):
        lams = self._table(xp, lam)
        rising = -lams
        flat = (-lam).reshape(-1) if xp is torch else -lam
        k = xp.searchsorted(rising, flat)
        k = k.reshape(lam.shape) if xp is torch else k
        k = xp.clip(k - 1, 0, len(lams) - 2)
        finite = xp.where(lam > lams[0], xp.zeros_like(lam) + lams[0], lam)
        inside = k + (finite - lams[k]) / (lams[k + 1] - lams[k])
        below = xp.expm1(-xp.where(lam > lams[0], lam - lams[0], xp.zeros_like(lam)))
        return xp.where(lam > lams[0], below, inside)

    @_same_kind
    def alpha(self, xp, t):
        lam = self.lam(t)
        return xp.exp(-0.5 * _softplus(xp, -2 * lam))

    @_same_kind
    def sigma(self, xp, t):
        lam = self.lam(t)
        return xp.exp(-0.5 * _softplus(xp, 2 * lam))

    def _rates(self, xp, t):
        """d lam/dt inside the table, and rho at t = 0, the slope of rho below it."""
        lams = self._table(xp, t)
        k = xp.clip(xp.floor(t), 0, len(lams) - 2)
        k = k.astype(int) if xp is np else k.long()
        return lams[k + 1] - lams[k], xp.exp(-lams[0])

    @_same_kind
    def alpha_prime(self, xp, t):
        alpha, sigma = self.alpha(t), self.sigma(t)
        lam_prime, rho_prime = self._rates(xp, t)
        return xp.where(t < 0, -sigma * alpha**2 * rho_prime, alpha * sigma**2 * lam_prime)

    @_same_kind
    def sigma_prime(self, xp, t):
        alpha, sigma = self.alpha(t), self.sigma(t)
        lam_prime, rho_prime = self._rates(xp, t)
        return xp.where(t < 0, alpha**3 * rho_prime, -sigma * alpha**2 * lam_prime)


@dataclass(frozen=True)
class EDM(Path):
    """alpha = 1, sigma = t (2206.00364): the variance-exploding path, in EDM's units."""

    t_max: float = 80.0
    t_min: float = 0.002
    name = "edm"

    @_same_kind
    def alpha(self, xp, t):
        return xp.ones_like(t)

    @_same_kind
    def sigma(self, xp, t):
        return t

    @_same_kind
    def lam(self, xp, t):
        return -xp.log(t)

    @_same_kind
    def time(self, xp, lam):
        return xp.exp(-lam)

    @_same_kind
    def alpha_prime(self, xp, t):
        return xp.zeros_like(t)

    @_same_kind
    def sigma_prime(self, xp, t):
        return xp.ones_like(t)


@dataclass(frozen=True)
class Flow(Path):
    """alpha = 1 - t, sigma = t (2209.03003, 2210.02747).

    ``shift`` is not part of the curve: it says how times are meant to be spread, t' = s t / (1 + (s - 1) t)
    (2403.03206), for ``grids.shifted`` and for training.
    """

    shift: float = 1.0
    t_max: float = 1.0
    t_min: float = 1e-3
    name = "flow"

    def __post_init__(self):
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    @_same_kind
    def alpha(self, xp, t):
        return 1 - t

    @_same_kind
    def sigma(self, xp, t):
        return t

    @_same_kind
    def lam(self, xp, t):
        return xp.log1p(-t) - xp.log(t)

    @_same_kind
    def time(self, xp, lam):
        return xp.exp(-_softplus(xp, lam))

    @_same_kind
    def alpha_prime(self, xp, t):
        return -xp.ones_like(t)

    @_same_kind
    def sigma_prime(self, xp, t):
        return xp.ones_like(t)


def vp_linear(beta_0: float = 0.1, beta_1: float = 20.0, t_min: float = 1e-3) -> VPLinear:
    """The continuous DDPM of 2011.13456, t in [0, 1]."""
    return VPLinear(float(beta_0), float(beta_1), 1.0, float(t_min))


def vp_cosine(t_min: float = 1e-3) -> VPCosine:
    """The cosine schedule of 2102.09672 in continuous time, stopped at lam = -5.1."""
    return VPCosine(t_max=VPCosine().time(-5.1), t_min=float(t_min))


def vp_discrete(alphas_cumprod) -> VPDiscrete:
    """A DDPM by its table, e.g. ``scheduler.alphas_cumprod`` of a diffusers pipeline.

    >>> path = vp_discrete(ddpm_alphas_cumprod())
    >>> path.t_max, path.sigma(-1.0), path.time(path.lam(500.25))
    (999.0, 0.0, 500.25)
    """
    if isinstance(alphas_cumprod, torch.Tensor):
        alphas_cumprod = alphas_cumprod.detach().double().cpu().numpy()
    return VPDiscrete(tuple(alphas_cumprod))


def ddpm_alphas_cumprod(
    betas: str = "linear", start: float = 1e-4, end: float = 0.02, steps: int = 1000
) -> np.ndarray:
    """The usual tables: ``linear`` (2006.11239) or ``scaled_linear`` (Stable Diffusion: .00085 to .012)."""
    if betas == "linear":
        b = np.linspace(start, end, steps)
    elif betas == "scaled_linear":
        b = np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2
    else:
        raise ValueError(f"betas must be 'linear' or 'scaled_linear', got {betas!r}")
    return np.exp(np.cumsum(np.log1p(-b)))


def edm(sigma_max: float = 80.0, sigma_min: float = 0.002) -> EDM:
    """The variance-exploding path with t = sigma."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"must have 0 < sigma_min < sigma_max, got sigma_min = {sigma_min}, sigma_max = {sigma_max}"
        )
    return EDM(float(sigma_max), float(sigma_min))


def flow(shift: float = 1.0, t_min: float = 1e-3) -> Flow:
    """The straight path of flow matching, t from 1 (noise) to 0 (data)."""
    return Flow(float(shift), 1.0, float(t_min))


_CLASSES = {c.name: c for c in (VPLinear, VPCosine, VPDiscrete, EDM, Flow)}
NAMES = tuple(_CLASSES)


def from_config(config: dict) -> Path:
    """The inverse of ``path.to_config()``.

    >>> from_config(flow(shift=3.0).to_config())
    Flow(shift=3.0, t_max=1.0, t_min=0.001)
    """
    arguments = dict(config)
    name = arguments.pop("path", None)
    if name not in _CLASSES:
        raise ValueError(f"path must be one of {', '.join(NAMES)}, got {name!r}")
    try:
        return _CLASSES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"a config of path {name!r} holds a wrong key: {error}") from None


def by_name(name: str, shift: float | None = None) -> Path:
    """A path by its name, with its usual constants (what a shell user means by it)."""
    if name == "vp_discrete":
        return vp_discrete(ddpm_alphas_cumprod())
    makers = {"vp_linear": vp_linear, "vp_cosine": vp_cosine, "edm": edm}
    if name == "flow":
        return flow(1.0 if shift is None else shift)
    if name not in makers:
        raise ValueError(f"path must be one of {', '.join(NAMES)}, got {name!r}")
    return makers[name]()
