"""The Frechet distance between two Gaussians, from features or from their moments.

    FD(a, b) = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2

With the Inception network's pool features this is FID (arXiv:1706.08500); with any other features it is
"the FD of those features". It is the *squared* 2-Wasserstein distance of the Gaussians.

With any factors A = F_a F_a^T and B = F_b F_b^T the last trace is the nuclear norm of F_a^T F_b, the sum
of its singular values. No root of the unsymmetric product A B is ever taken, nothing has to be jittered,
and small singular values keep their digits, where the eigenvalues of a product would lose half of them.
"""

from __future__ import annotations

import torch

from .checks import sample_matrix
from .moments import Gaussian, Stats, gaussian_stats

# A covariance stored in float32 (the published reference files) has eigenvalues negative by about 1e-7 of the
# largest; anything a thousand times beyond is no covariance.
NEGATIVE_ALLOWED = 1e-4


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
    mean_a, factor_a = _mean_and_factor(a, "a")
    mean_b, factor_b = _mean_and_factor(b, "b")
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"b has {len(mean_b)} dimensions; expected {len(mean_a)}, as a has")
    mean_b, factor_b = mean_b.to(mean_a.device), factor_b.to(mean_a.device)
    shift = (mean_a - mean_b).square().sum()
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
    cov = sample_matrix(cov, "cov")
    dim = len(cov)
    if cov.shape != (dim, dim):
        raise ValueError(f"cov has shape {tuple(cov.shape)}; expected a square (D, D)")
    scale = float(cov.abs().max())
    if float((cov - cov.T).abs().max()) > 1e-5 * scale:
        raise ValueError("cov is not symmetric; expected a covariance matrix")
    cov = (cov + cov.T) / 2
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


def _mean_and_factor(x, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(x, Stats):
        x = x.finish()
    if not isinstance(x, Gaussian):
        x = sample_matrix(x, name, least=2)
        if len(x) <= x.shape[1]:
            mean = x.mean(dim=0)
            return mean, (x - mean).T / (len(x) - 1) ** 0.5
        x = gaussian_stats(x)
    mean = torch.as_tensor(x.mean)
    if mean.ndim != 1 or tuple(x.cov.shape) != (len(mean), len(mean)):
        raise ValueError(
            f"{name} has a mean of shape {tuple(mean.shape)} and a cov of shape {tuple(x.cov.shape)}; "
            "expected (D,) and (D, D)"
        )
    try:
        mean = sample_matrix(mean[None], "mean")[0]
        return mean, covariance_factor(x.cov, x.n).to(mean.device)
    except (TypeError, ValueError) as err:
        raise type(err)(f"{name}: {err}") from None
