"""Gaussian mixtures, exact on every path: the ground truth of samplers, guidance and distillers.

With  x_t = alpha x0 + sigma eps  and components N(m_k, S_k), S_k = V_k diag(s_k) V_k', all marginals share
the eigenvectors V_k:

    x_t | k ~ N(alpha m_k, V_k diag(alpha^2 s_k + sigma^2) V_k')
    E[x0 | x_t, k] = m_k + V_k diag(alpha s_k / (alpha^2 s_k + sigma^2)) V_k' (x_t - alpha m_k)

so nothing is ever inverted, and both ends are plain numbers: the mean at alpha = 0, x / alpha at sigma = 0.

    >>> from fewstep.models import paths
    >>> mixture = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.25)
    >>> d = mixture.denoiser(paths.flow())
    >>> d(torch.zeros(1, 1, dtype=torch.float64), 0.5), mixture.denoiser(paths.flow())(torch.ones(1, 1), 0.0)
    (tensor([[0.]], dtype=torch.float64), tensor([[1.]]))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..kernels.dispatch import choose
from ..kernels.mixture_score import mixture_score, unsupported
from .denoiser import Denoiser, Predicts, combination
from .paths import Path, Times

LOG_2PI = math.log(2 * math.pi)
MAX_COMPONENTS = 20_000  # of a product or a power: beyond it the expansion is a mistake rather than a mixture
_BLOCK = 16


class GaussianMixture:
    """sum_k w_k N(m_k, S_k) in D dimensions.

    Args:
        weights: (K,) positive; they are normalised.
        means: (K, D).
        covs: a number or (K,) isotropic variances, (K, D) diagonals or (K, D, D) full covariances, all
            positive definite.
        device, dtype: where and in what everything is computed; answers come back in the dtype of x.

    ``log_mass`` of a mixture made by ``product``, ``power`` or ``tilt`` is the logarithm of that expression's
    integral before it was normalised; 0 for a mixture made by hand.
    """

    def __init__(
        self,
        weights: Any,
        means: Any,
        covs: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        weights, means, covs = (
            torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in (weights, means, covs)
        )
        if means.ndim != 2 or means.numel() == 0:
            raise ValueError(f"means must have shape (K, D), got {tuple(means.shape)}")
        components, dim = means.shape
        if weights.shape != (components,):
            raise ValueError(
                f"weights must have shape ({components},) as means does, got {tuple(weights.shape)}"
            )
        if not (weights > 0).all() or not torch.isfinite(weights).all():
            raise ValueError("weights must be positive and finite")
        if covs.ndim == 0:
            covs = covs.expand(components)
        allowed = ((components,), (components, dim), (components, dim, dim))
        if tuple(covs.shape) not in allowed:
            shapes = " or ".join(map(str, allowed))
            raise ValueError(f"covs must be a number or have shape {shapes}, got {tuple(covs.shape)}")
        vectors = None
        if covs.ndim == 3:
            if not torch.allclose(covs, covs.mT, rtol=1e-10, atol=1e-12 * float(covs.abs().max())):
                raise ValueError("covs must be symmetric")
            values, vectors = torch.linalg.eigh((covs + covs.mT) / 2)
        else:
            values = covs.reshape(components, -1)
        if not (values > 0).all() or not torch.isfinite(values).all():
            raise ValueError(
                f"covs must be positive definite, got an eigenvalue of {float(values.min()):.3g}"
            )
        self._assign((weights / weights.sum()).log(), means, values, vectors, 0.0, dtype)

    def _assign(self, log_weights, means, values, vectors, log_mass, dtype):
        self.log_weights = log_weights.to(dtype)  # (K,)
        self.means = means.to(dtype)  # (K, D)
        self.values = values.to(dtype)  # (K, D) eigenvalues, or (K, 1) where all components are isotropic
        self.vectors = None if vectors is None else vectors.to(dtype)  # (K, D, D) columns; None: the axes
        self.log_mass = float(log_mass)
        self._turned_means = self.means
        if self.vectors is not None:
            self._turned_means = torch.einsum("kd,kde->ke", self.means, self.vectors)
            self._turn = _padded(self.vectors.permute(1, 0, 2).reshape(self.dim, -1))  # D, K D
            self._turn_back = _padded(self.vectors.permute(0, 2, 1).reshape(-1, self.dim))  # K D, D
        return self

    @classmethod
    def _made(cls, log_weights, means, values, vectors, log_mass, dtype) -> GaussianMixture:
        return cls.__new__(cls)._assign(log_weights, means, values, vectors, log_mass, dtype)

    # --- what it is ---------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    @property
    def components(self) -> int:
        """K."""
        return self.means.shape[0]

    @property
    def weights(self) -> torch.Tensor:
        """(K,), summing to one."""
        return self.log_weights.exp()

    @property
    def covs(self) -> torch.Tensor:
        """(K, D, D), whatever they were given as."""
        values = self.values.expand(self.components, self.dim)
        if self.vectors is None:
            return torch.diag_embed(values)
        return (self.vectors * values[:, None]) @ self.vectors.mT

    @property
    def mean(self) -> torch.Tensor:
        """(D,): the mean of the whole mixture."""
        return self.weights @ self.means

    @property
    def cov(self) -> torch.Tensor:
        """(D, D): the covariance of the whole mixture."""
        centred = self.means - self.mean
        between = (self.weights[:, None] * centred).mT @ centred
        return torch.einsum("k,kde->de", self.weights, self.covs) + between

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> GaussianMixture:
        """The same mixture elsewhere, or computing in another dtype."""
        dtype = self.means.dtype if dtype is None else dtype
        arrays = (self.log_weights, self.means, self.values, self.vectors)
        return self._made(*(None if a is None else a.to(device) for a in arrays), self.log_mass, dtype)

    def __repr__(self) -> str:
        return f"GaussianMixture(components={self.components}, dim={self.dim})"

    def sample(self, n: int, seed: int = 0) -> torch.Tensor:
        """(n, D) independent draws."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights.cpu().double(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        which, noise = which.to(self.means.device), noise.to(self.means)
        turned = noise * self.values[which].sqrt()
        if self.vectors is not None:
            turned = torch.einsum("nde,ne->nd", self.vectors[which], turned)
        return self.means[which] + turned

    def marginal(self, path: Path, t: float) -> GaussianMixture:
        """The mixture that x_t follows."""
        alpha, sigma = path.alpha(float(t)), path.sigma(float(t))
        values = alpha * alpha * self.values + sigma * sigma
        return self._made(self.log_weights, alpha * self.means, values, self.vectors, 0.0, self.means.dtype)

    # --- densities and estimates --------------------------------------------------------------------------

    def log_prob(self, x: torch.Tensor, path: Path | None = None, t: Times | None = None) -> torch.Tensor:
        """log p_t(x), (...), for x (..., D) and t a number or (...); without a path, of the mixture itself."""
        flat, alpha, sigma = self._arguments(x, path, t)
        if (found := self._by_kernel(flat, alpha, sigma)) is not None:
            return found[1].reshape(x.shape[:-1]).to(x.dtype)
        variance, residual = self._residuals(flat, alpha, sigma)
        return self._logits(variance, residual).logsumexp(-1).reshape(x.shape[:-1]).to(x.dtype)

    def responsibilities(
        self, x: torch.Tensor, path: Path | None = None, t: Times | None = None
    ) -> torch.Tensor:
        """p(k | x_t = x): (..., K)."""
        flat, alpha, sigma = self._arguments(x, path, t)
        variance, residual = self._residuals(flat, alpha, sigma)
        share = self._logits(variance, residual).softmax(-1)
        return share.reshape(*x.shape[:-1], self.components).to(x.dtype)

    def score(self, x: torch.Tensor, path: Path | None = None, t: Times | None = None) -> torch.Tensor:
        """The gradient of log p_t at x: (..., D)."""
        flat, alpha, sigma = self._arguments(x, path, t)
        return self._score(self._pulls(flat, alpha, sigma)[1]).reshape(x.shape).to(x.dtype)

    def posterior(self, x: torch.Tensor, path: Path, t: float) -> GaussianMixture:
        """The mixture that x0 follows given x_t = x, for one x of shape (D,); needs sigma > 0."""
        alpha, sigma = path.alpha(float(t)), path.sigma(float(t))
        if sigma == 0:
            raise ValueError(f"t must lie where sigma > 0: at t = {t} x_t is alpha x0 itself")
        return self.tilt(alpha / sigma**2 * x, -((alpha / sigma) ** 2))

    def denoiser(self, path: Path, predicts: Predicts = "x0") -> Denoiser:
        """The exact Denoiser on a path; x is (B, D), or (B, ...) with D numbers a sample.

        ``predicts`` says what its raw output is, equally exact for all wherever they exist. A keyword ``label``
        (B,) keeps only the component of that number; -1 keeps all. In float64 on a CPU the answer for a sample
        is the same bits in any batch.
        """
        if not isinstance(path, Path):
            raise TypeError(f"path must be a fewstep path, e.g. paths.flow(), got {type(path).__name__}")

        def call(x: torch.Tensor, tau: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
            if x[0].numel() != self.dim:
                raise ValueError(f"x must hold {self.dim} numbers a sample, got shape {tuple(x.shape)}")
            if tau.ndim != 1:
                raise ValueError(f"t must be a number or one a sample, got shape {tuple(tau.shape)}")
            if x.device.type == "cpu" and not tau.requires_grad and bool((tau == tau[0]).all()):
                tau = tau[:1]  # most calls: one log-determinant instead of B
            alpha, sigma = path.alpha(tau).to(self.means), path.sigma(tau).to(self.means)
            flat = x.reshape(len(x), -1).to(self.means)
            if predicts == "x0" and (found := self._by_kernel(flat, alpha, sigma, label)) is not None:
                return found[0].reshape(x.shape).to(x.dtype)
            share, pull = self._pulls(flat, alpha, sigma, label)
            if predicts in ("x0", "score"):
                out = self._x0(flat, alpha, sigma, share, pull) if predicts == "x0" else self._score(pull)
            else:
                g_x, g_e = (
                    torch.as_tensor(g).to(flat).reshape(-1, 1) for g in combination(predicts, path, tau)
                )
                x0 = (
                    self._x0(flat, alpha, sigma, share, pull) if predicts != "eps" else torch.zeros_like(flat)
                )
                out = g_x * x0 - g_e * sigma[:, None] * self._score(pull)
            return out.reshape(x.shape).to(x.dtype)

        return Denoiser(call, path, predicts=predicts, shape=(self.dim,))

    def _arguments(self, x, path, t):
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have {self.dim} numbers on its last axis, got shape {tuple(x.shape)}")
        if (path is None) != (t is None):
            raise ValueError("path and t go together: give both, or neither for the mixture itself")
        if path is None:
            alpha, sigma = self.means.new_ones(1), self.means.new_zeros(1)
        else:
            time = torch.as_tensor(t, dtype=torch.float64, device=self.means.device)
            time = time.reshape(1) if time.ndim == 0 else time.expand(x.shape[:-1]).reshape(-1)
            alpha, sigma = path.alpha(time).to(self.means), path.sigma(time).to(self.means)
        return x.reshape(-1, self.dim).to(self.means), alpha, sigma

    def _residuals(self, x, alpha, sigma):
        """x (B, D), alpha and sigma (B,) or (1,) -> alpha^2 s + sigma^2 and V'(x - alpha m), (B, K, D)."""
        if self.vectors is None:
            turned = x[:, None]
        else:
            turned = _rowwise_product(x, self._turn)[:, : self.components * self.dim]
            turned = turned.reshape(len(x), self.components, self.dim)
        a, s = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        return a * a * self.values + s * s, turned - a * self._turned_means

    def _logits(self, variance, residual):
        """log of w_k N(x; k): (B, K)."""
        repeats = self.dim // variance.shape[-1]
        log_det = variance.log().sum(-1) * repeats
        distance = (residual * residual / variance).sum(-1)
        return self.log_weights - 0.5 * (self.dim * LOG_2PI + log_det + distance)

    def _pulls(self, x, alpha, sigma, label=None):
        """p(k | x), (B, K, 1), and minus each component's share of the score in its own axes, (B, K, D)."""
        variance, residual = self._residuals(x, alpha, sigma)
        logits = self._logits(variance, residual)
        if label is not None:
            label = self._checked(label, x)
            kept = (torch.arange(self.components, device=x.device) == label[:, None]) | (label[:, None] == -1)
            logits = logits.masked_fill(~kept, -math.inf)
        share = logits.softmax(-1)[..., None]
        return share, share * residual / variance

    def _by_kernel(self, x, alpha, sigma, label=None):
        """E[x0 | x] and log p(x) in O(B D) memory, where there is a kernel for it: isotropic, float32, on a GPU."""
        if self.vectors is not None or self.values.shape[1] != 1:
            return None
        fused = {"rows": self.means, "log_weights": self.log_weights, "variances": self.values[:, 0]}
        fused |= {"x": x, "alpha": alpha.expand(len(x)), "sigma": sigma.expand(len(x))}
        if choose("mixture_score", None, [x], unsupported(**fused)) == "reference":
            return None
        if label is not None:
            fused["label"] = self._checked(label, x)
            fused["labels"] = torch.arange(self.components, device=x.device)
        return mixture_score(**fused)

    def _checked(self, label, x):
        label = torch.as_tensor(label, device=x.device)
        if label.shape != x.shape[:1] or (label < -1).any() or (label >= self.components).any():
            last = self.components - 1
            raise ValueError(f"label must hold a number from -1 to {last} for each of {len(x)} samples")
        return label

    def _score(self, pull):
        return -self._from_axes(pull)

    def _x0(self, x, alpha, sigma, share, pull):
        gain = alpha.reshape(-1, 1, 1) * self.values * pull
        x0 = (share * self.means).sum(1) + self._from_axes(gain)
        clean = (sigma == 0)[:, None]
        return torch.where(clean, x / torch.where(clean, alpha[:, None], 1.0), x0)

    def _from_axes(self, turned):
        """sum_k V_k turned_k: (B, D)."""
        if self.vectors is None:
            return turned.sum(1)
        return _rowwise_product(turned.flatten(1), self._turn_back)[:, : self.dim]

    # --- closed forms -------------------------------------------------------------------------------------

    def gaussian_trajectory(self, path: Path, x: torch.Tensor, t_from: float, t_to: float) -> torch.Tensor:
        """Where the probability-flow ODE carries x (..., D) from ``t_from`` to ``t_to``; one component only.

        x_n = alpha_n m + ((alpha_n^2 S + sigma_n^2) / (alpha_s^2 S + sigma_s^2))^(1/2) (x - alpha_s m)
        """
        if self.components != 1:
            raise ValueError(f"gaussian_trajectory needs one component, this mixture has {self.components}")
        a_s, s_s, a_n, s_n = (f(float(t)) for t in (t_from, t_to) for f in (path.alpha, path.sigma))
        flat = x.reshape(-1, self.dim).to(self.means)
        scale = ((a_n * a_n * self.values + s_n * s_n) / (a_s * a_s * self.values + s_s * s_s)).sqrt()
        if self.vectors is None:
            moved = scale * (flat - a_s * self.means)
        else:
            moved = ((flat - a_s * self.means) @ self.vectors[0] * scale) @ self.vectors[0].mT
        return (a_n * self.means + moved).reshape(x.shape).to(x.dtype)

    def power(self, beta: float) -> GaussianMixture:
        """p^beta, normalised: any beta > 0 for one component, whole numbers (by expansion) for more.

        >>> GaussianMixture([1.0], [[3.0]], 2.0).power(4.0).covs.item()
        0.5
        """
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta must be positive and finite, got {beta}")
        if self.components == 1:
            counts = self.means.new_full((1, 1), float(beta))
        else:
            if beta != int(beta):
                raise ValueError(
                    f"beta must be a whole number for a mixture of {self.components} components, got {beta}: "
                    "other powers of a sum of Gaussians have no closed form"
                )
            size = math.comb(self.components + int(beta) - 1, int(beta))
            if size > MAX_COMPONENTS:
                raise ValueError(f"beta = {beta} makes {size} components, more than {MAX_COMPONENTS}")
            sets = itertools.combinations_with_replacement(range(self.components), int(beta))
            counts = np.stack([np.bincount(chosen, minlength=self.components) for chosen in sets])
            counts = torch.as_tensor(counts).to(self.means)
        multinomial = torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)
        if self.components == 1:
            multinomial = torch.zeros_like(multinomial)
        constant, linear, precision = self._canonical()
        precision = torch.tensordot(counts, precision, dims=1)
        return self._from_canonical(multinomial + counts @ constant, counts @ linear, precision, "beta")

    def product(self, other: GaussianMixture) -> GaussianMixture:
        """p q, normalised: a component for every pair."""
        if not isinstance(other, GaussianMixture) or other.dim != self.dim:
            raise ValueError(f"other must be a GaussianMixture of dimension {self.dim}, got {other!r}")
        if self.components * other.components > MAX_COMPONENTS:
            size = self.components * other.components
            raise ValueError(f"other makes {size} components with this mixture, more than {MAX_COMPONENTS}")
        mine, theirs = self._canonical(), other.to(self.means.device, self.means.dtype)._canonical()
        if mine[2].ndim != theirs[2].ndim:
            mine, theirs = ((c, h, torch.diag_embed(p) if p.ndim == 2 else p) for c, h, p in (mine, theirs))
        sums = ((a[:, None] + b[None]).flatten(0, 1) for a, b in zip(mine, theirs, strict=True))
        return self._from_canonical(*sums, "other")

    def tilt(self, a: Any, B: Any = None) -> GaussianMixture:
        """p(x) exp(a.x + x'Bx / 2), normalised; B a number (times I), (D,) or symmetric (D, D), below all S^-1.

        >>> GaussianMixture([1.0], [[0.0]], 1.0).tilt([0.5], -1.0).mean.item()
        0.25
        """
        a = torch.as_tensor(a, dtype=self.means.dtype, device=self.means.device)
        if a.shape not in ((self.dim,), ()):
            raise ValueError(f"a must be a number or have shape ({self.dim},), got {tuple(a.shape)}")
        constant, linear, precision = self._canonical()
        if B is not None:
            B = torch.as_tensor(B, dtype=self.means.dtype, device=self.means.device)
            if B.shape not in ((), (self.dim,), (self.dim, self.dim)):
                shapes = f"({self.dim},) or ({self.dim}, {self.dim})"
                raise ValueError(f"B must be a number or have shape {shapes}, got {tuple(B.shape)}")
            if B.ndim == 2:
                if not torch.allclose(B, B.mT):
                    raise ValueError("B must be symmetric")
                precision = torch.diag_embed(precision) if precision.ndim == 2 else precision
            elif precision.ndim == 3:
                B = torch.diag_embed(B.expand(self.dim))
            precision = precision - B
        return self._from_canonical(constant, linear + a, precision, "B")

    def _canonical(self):
        """(c, h, P) with  w_k N(x; k) = exp(c_k + h_k.x - x'P_k x / 2); P is (K, D) where S is diagonal."""
        values = self.values.expand(self.components, self.dim)
        turned = self._turned_means / values
        distance = (self._turned_means * turned).sum(-1)
        constant = self.log_weights - 0.5 * (self.dim * LOG_2PI + values.log().sum(-1) + distance)
        if self.vectors is None:
            return constant, turned, 1 / values
        linear = torch.einsum("kde,ke->kd", self.vectors, turned)
        return constant, linear, (self.vectors / values[:, None]) @ self.vectors.mT

    def _from_canonical(self, constant, linear, precision, argument: str) -> GaussianMixture:
        vectors = None
        if precision.ndim == 3:
            precision, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
        if not (precision > 0).all():
            raise ValueError(
                f"{argument} must leave every component a positive definite precision (S^-1 - B for a tilt), "
                f"got an eigenvalue of {float(precision.min()):.3g}"
            )
        turned = linear if vectors is None else torch.einsum("kd,kde->ke", linear, vectors)
        centres = turned / precision
        distance = (centres * turned).sum(-1)
        log_weights = constant + 0.5 * (self.dim * LOG_2PI - precision.log().sum(-1) + distance)
        means = centres if vectors is None else torch.einsum("kde,ke->kd", vectors, centres)
        log_mass = log_weights.logsumexp(0)
        return self._made(log_weights - log_mass, means, 1 / precision, vectors, log_mass, self.means.dtype)


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    """With zeros, to whole blocks both ways."""
    rows, columns = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -columns % _BLOCK, 0, -rows % _BLOCK)).contiguous()


def _rowwise_product(rows: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    """rows @ matrix, rounded alike wherever a row stands.

    BLAS rounds differently in products of other shapes, and differently again where a shape does not fill its
    blocks: on a CPU all products here have one shape, in whole blocks.
    """
    count, width = rows.shape
    if rows.device.type != "cpu":
        return rows @ padded[:width]
    rows = torch.nn.functional.pad(rows, (0, len(padded) - width, 0, -count % _BLOCK))
    return torch.cat([block @ padded for block in rows.split(_BLOCK)])[:count]


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.15) -> GaussianMixture:
    """Equal isotropic Gaussians on a circle in the plane.

    >>> ring(modes=4).mean.abs().max().item() < 1e-15
    True
    """
    angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = radius * torch.stack([angles.cos(), angles.sin()], -1)
    return GaussianMixture(torch.ones(modes), means, std * std)


def random_mixture(
    dim: int, components: int, seed: int = 0, spread: float = 1.0, stds: Sequence[float] = (0.1, 0.6)
) -> GaussianMixture:
    """Components of random weight, centre (standard deviation ``spread``) and full covariance.

    The eigenvalues' roots are log-uniform between the two ``stds``; the seed fixes everything.
    """
    if dim < 1 or components < 1:
        raise ValueError(f"dim and components must be at least 1, got {dim} and {components}")
    low, high = stds
    if not 0 < low <= high:
        raise ValueError(f"stds must be two numbers with 0 < low <= high, got {tuple(stds)}")
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, components)
    means = spread * rng.standard_normal((components, dim))
    turns = np.linalg.qr(rng.standard_normal((components, dim, dim)))[0]
    roots = np.exp(rng.uniform(math.log(low), math.log(high), (components, dim)))
    return GaussianMixture(weights, means, (turns * roots[:, None] ** 2) @ turns.transpose(0, 2, 1))
