"""The Frechet distance between two Gaussians, from features or from their moments.

    FD(a, b) = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2

With the Inception network's pool features this is FID (arXiv:1706.08500); with any other features it is
"the FD of those features". It is the *squared* 2-Wasserstein distance of the Gaussians.

With any factors A = F_a F_a^T and B = F_b F_b^T the last trace is the nuclear norm of F_a^T F_b, the sum
of its singular values. No root of the unsymmetric product A B is ever taken, and nothing has to be jittered.

With A = L L^T these are the roots of the eigenvalues of the symmetric L^T B L, which take a third of the
time; but a root loses half the digits of an eigenvalue that is small beside the largest. What is lost is
estimated from the eigenvalues themselves, and where it matters the singular values are taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import sample_matrix
from .moments import Gaussian, Stats, gaussian_stats

# A covariance stored in float32 (the published reference files) has eigenvalues negative by about 1e-7 of the
# largest; anything a thousand times beyond is no covariance.
NEGATIVE_ALLOWED = 1e-4
# What the trace may lose to rounding, beside the spread of both Gaussians.
LOSS_ALLOWED = 1e-9
PANEL = 512  # columns of a triangular factor that are multiplied at once


def frechet_distance(a, b) -> float:
    """FD between `a` and `b`; each is features (N, D), a `Gaussian`, or a `Stats`. At least 2 samples each.

    Features with N <= D are factored as they are, F = (x - mean)^T / sqrt(N - 1), which costs
    O(N_a N_b D) and is exact for their rank-deficient covariances. FD of finite samples is biased upward,
    by about tr(cov) / N for each side: compare at equal N, beside the FD of held-out data.

    >>> a = Gaussian(torch.zeros(2), torch.diag(torch.tensor([4.0, 1.0])))
    >>> b = Gaussian(torch.tensor([3.0, 0.0]), torch.eye(2))
    >>> round(frechet_distance(a, b), 12)          # 3^2 + (2 - 1)^2 + (1 - 1)^2
    10.0
    """
    a, b = _moments(a, "a"), _moments(b, "b")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b has {len(b.mean)} dimensions; expected {len(a.mean)}, as a has")
    shift = (a.mean - b.mean.to(a.mean.device)).square().sum()
    if isinstance(a, Gaussian) and isinstance(b, Gaussian):
        spread = a.cov.trace() + b.cov.trace().to(a.cov.device)
        overlap = trace_term(a, b._replace(cov=b.cov.to(a.cov.device)))
    else:
        factor_a, factor_b = _factor(a, "a"), _factor(b, "b").to(a.mean.device)
        spread = factor_a.square().sum() + factor_b.square().sum()
        overlap = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    # Exactly equal arguments come out as rounding of either sign.
    return max(0.0, float(shift + spread - 2 * overlap))


def covariance_factor(cov: torch.Tensor, n: int | None = None) -> torch.Tensor:
    """F (D, r) with F F^T = cov: Cholesky where it succeeds, else eigenvectors with negatives clipped.

    A covariance of n samples has rank n - 1 at most, so for n <= D only that many eigenvalues are kept;
    the others are rounding, whose square roots would not be small.

    >>> covariance_factor(torch.tensor([[4.0, 2.0], [2.0, 2.0]])).tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    cov = _symmetric(cov)
    dim, scale = len(cov), float(cov.abs().max())
    if n is None or n > dim:
        factor, failed = torch.linalg.cholesky_ex(cov)
        if not int(failed):
            return factor
    values, vectors = torch.linalg.eigh(cov)
    if float(values[0]) < -NEGATIVE_ALLOWED * scale:
        raise ValueError(
            f"cov has an eigenvalue {float(values[0]):.3g} beside a largest of {float(values[-1]):.3g}; "
            "expected a covariance, positive semi-definite"
        )
    rank = dim if n is None else min(dim, n - 1)
    return vectors[:, dim - rank :] * values[dim - rank :].clamp_min(0).sqrt()


def trace_term(a: Gaussian, b: Gaussian) -> torch.Tensor:
    """tr (A^1/2 B A^1/2)^1/2: by eigenvalues where they are good enough, else by singular values.

    >>> a, b = torch.tensor([4.0, 9.0]).double(), torch.tensor([1.0, 16.0]).double()
    >>> float(trace_term(Gaussian(a, a.diag()), Gaussian(b, b.diag())))          # 2 * 1 + 3 * 4
    14.0
    """
    dim = len(a.mean)
    if all(n is None or n > dim for n in (a.n, b.n)):
        lower, failed = torch.linalg.cholesky_ex(a.cov)
        if not int(failed):
            values = torch.linalg.eigvalsh(_congruent(lower, b.cov))
            # An eigenvalue is off by some eps of the largest, either way; half of that over a root is its root's.
            error = 8 * torch.finfo(values.dtype).eps * values[-1]
            root = values.clamp_min(0).sqrt()
            loss = torch.minimum(error / (2 * root), error.sqrt()).square().sum().sqrt()
            spread = a.cov.trace() + b.cov.trace()
            if bool(values[0] > -error) and bool(loss <= LOSS_ALLOWED * spread):
                return root.sum()
    return torch.linalg.svdvals(_factor(a, "a").T @ _factor(b, "b")).sum()


class _Centred(NamedTuple):
    """Few samples as they are: their mean, and the factor (x - mean)^T / sqrt(N - 1) of their covariance."""

    mean: torch.Tensor
    factor: torch.Tensor


def _moments(x, name: str) -> Gaussian | _Centred:
    """Checked float64 moments of whatever came."""
    if isinstance(x, Stats):
        x = x.finish()
    if not isinstance(x, Gaussian):
        x = sample_matrix(x, name, least=2)
        if len(x) <= x.shape[1]:
            mean = x.mean(dim=0)
            return _Centred(mean, (x - mean).T / (len(x) - 1) ** 0.5)
        x = gaussian_stats(x)
    mean = torch.as_tensor(x.mean)
    if mean.ndim != 1 or tuple(x.cov.shape) != (len(mean), len(mean)):
        raise ValueError(
            f"{name} has a mean of shape {tuple(mean.shape)} and a cov of shape {tuple(x.cov.shape)}; "
            "expected (D,) and (D, D)"
        )
    try:
        mean = sample_matrix(mean[None], "mean")[0]
        return Gaussian(mean, _symmetric(x.cov).to(mean.device), x.n)
    except (TypeError, ValueError) as err:
        raise type(err)(f"{name}: {err}") from None


def _symmetric(cov: torch.Tensor) -> torch.Tensor:
    cov = sample_matrix(cov, "cov")
    if cov.shape != (len(cov), len(cov)):
        raise ValueError(f"cov has shape {tuple(cov.shape)}; expected a square (D, D)")
    skew = cov - cov.T
    if float(skew.abs().max()) > 1e-5 * float(cov.abs().max()):
        raise ValueError("cov is not symmetric; expected a covariance matrix")
    return torch.sub(cov, skew, alpha=0.5)


def _factor(x: Gaussian | _Centred, name: str) -> torch.Tensor:
    if isinstance(x, _Centred):
        return x.factor
    try:
        return covariance_factor(x.cov, x.n)
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from None


def _congruent(lower: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The lower triangle of L^T B L for a lower triangular L, without multiplying what is zero."""
    dim = len(lower)
    cuts = [(first, min(first + PANEL, dim)) for first in range(0, dim, PANEL)]
    right = torch.cat([b[:, first:] @ lower[first:, first:last] for first, last in cuts], dim=1)
    out = torch.zeros_like(b)
    for first, last in cuts:
        torch.mm(lower[first:, first:last].T, right[first:, :last], out=out[first:last, :last])
    return out
