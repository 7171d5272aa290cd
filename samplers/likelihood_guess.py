"""What a linear observation says of a denoised estimate, were the data Gaussian; and a step towards it.

With x_t = alpha x0 + sigma eps and data of covariance S, what is left open of x0 has covariance V, and the estimate of
it moves with x_t by G:

    V = sigma^2 S (alpha^2 S + sigma^2)^-1,    G = alpha S (alpha^2 S + sigma^2)^-1

so for y = A x0 + noise a good guess is  psi_t(x) = N(y; A x0_hat(x), R),  R = noise^2 + A V A',  and about a step that
goes to N(mu, c^2)  it is  N(y; A x0_hat + A G (x' - mu), R):  the step times that is a Gaussian again,

    x' ~ N(mu + K (y - A x0_hat), c^2 (1 - K A G)),   K = c^2 G'A' (R + c^2 A G G'A')^-1

    Isotropic    S = std^2, in the axes of the operator: number by number, samples of any size
    Full         S of a data set's own: matrices, for samples of a few thousand numbers

    >>> from fewstep.models import paths
    >>> from fewstep.samplers.operators import dense
    >>> A, y, path = dense(torch.tensor([[1.0, 2.0]]), (2,)), torch.ones(3, 1, dtype=torch.float64), paths.flow()
    >>> one, two = Isotropic(A, y, 0.5, 1.0), Full(A, y, 0.5, torch.eye(2, dtype=torch.float64))
    >>> x0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    >>> bool(torch.allclose(one.log(one.gap(x0), path, 0.6), two.log(two.gap(x0), path, 0.6)))
    True
"""

from __future__ import annotations

import math

import torch

from ..models.paths import Path
from .operators import Operator

LOG_2PI = math.log(2 * math.pi)


class Isotropic:
    """Data of covariance std^2."""

    def __init__(self, operator: Operator, y: torch.Tensor, noise_std: float, std: float):
        self.operator, self.values = operator, operator.values.to(y)
        self.noise, self.data = noise_std**2, std**2
        self.seen = operator.seen(y)

    def gap(self, x0: torch.Tensor) -> torch.Tensor:
        """y - A x0, in the operator's axes."""
        return self.seen - self.values * self.operator.axes(x0)

    def _parts(self, path: Path, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = path.alpha(t), path.sigma(t)
        total = self.data * alpha**2 + sigma**2
        return self.values * (self.data * alpha / total), self.noise + self.values**2 * (
            self.data * sigma**2 / total
        )

    def log(self, gap: torch.Tensor, path: Path, t: float) -> torch.Tensor:
        """log psi_t: (B,) in float64."""
        variance = self._parts(path, t)[1]
        terms = (gap**2 / variance + variance.log() + LOG_2PI) * (self.values > 0)
        return -0.5 * terms.double().flatten(1).sum(1)

    def step(
        self, mu: torch.Tensor, gap: torch.Tensor, path: Path, t: float, c: float, n: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x' by standard normals n, and the log of N(x'; mu, c^2) over the density that it was drawn from."""
        gain, variance = self._parts(path, t)
        pull = c**2 * gain / (variance + gain**2 * c**2)
        root = (1 - pull * gain).clamp_min(1e-12).sqrt()
        n = self.operator.axes(n)
        moved = pull * gap / c + root * n
        ratio = 0.5 * (n**2 - moved**2).double().flatten(1).sum(1) + root.double().log().sum()
        return mu + c * self.operator.back(moved), ratio


class Full:
    """Data of that covariance (D, D), of flattened samples."""

    def __init__(self, operator: Operator, y: torch.Tensor, noise_std: float, covariance: torch.Tensor):
        size = math.prod(operator.shape)
        if covariance.shape != (size, size):
            raise ValueError(
                f"covariance must be of samples of {size} numbers, got {tuple(covariance.shape)}"
            )
        basis = torch.eye(size, dtype=torch.float64, device=y.device).reshape(size, *operator.shape)
        here = operator.values.flatten().to(y.device) > 0
        self.matrix = (
            (operator.values.to(basis) * operator.axes(basis)).flatten(1).mT[here]
        )  # U'A, its zeros left out
        self.seen = operator.seen(y).flatten(1)[:, here].double()
        values, self.turn = torch.linalg.eigh(covariance.to(self.matrix))
        self.values, self.noise = values.clamp_min(0), noise_std**2

    def gap(self, x0: torch.Tensor) -> torch.Tensor:
        """y - A x0, in the operator's axes."""
        return self.seen - x0.flatten(1).double() @ self.matrix.mT

    def _parts(self, path: Path, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = path.alpha(t), path.sigma(t)
        inverse = 1 / (alpha**2 * self.values + sigma**2).clamp_min(1e-300)
        turned = self.matrix @ self.turn
        variance = turned * (sigma**2 * self.values * inverse) @ turned.mT
        variance.diagonal().add_(self.noise)
        return turned * (alpha * self.values * inverse) @ self.turn.mT, variance

    def log(self, gap: torch.Tensor, path: Path, t: float) -> torch.Tensor:
        """log psi_t: (B,) in float64."""
        root = torch.linalg.cholesky(self._parts(path, t)[1])
        white = torch.linalg.solve_triangular(root, gap.mT, upper=False)
        return -0.5 * (white.square().sum(0) + 2 * root.diagonal().log().sum() + len(root) * LOG_2PI)

    def step(
        self, mu: torch.Tensor, gap: torch.Tensor, path: Path, t: float, c: float, n: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x' by standard normals n, and the log of N(x'; mu, c^2) over the density that it was drawn from."""
        gain, variance = self._parts(path, t)
        pull = c**2 * torch.linalg.solve(variance + c**2 * gain @ gain.mT, gain).mT
        spread, turn = torch.linalg.eigh(
            torch.eye(len(pull)).to(pull) - (pull @ gain + gain.mT @ pull.mT) / 2
        )
        roots = spread.clamp_min(1e-12).sqrt()
        n = n.flatten(1).double()
        moved = gap @ pull.mT / c + n @ (turn * roots @ turn.mT)
        ratio = 0.5 * (n.square() - moved.square()).sum(1) + roots.log().sum()
        return mu + (c * moved).reshape(mu.shape).to(mu.dtype), ratio
