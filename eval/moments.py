"""Mean and covariance of a stream of features, accumulated without cancellation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import sample_matrix


class Gaussian(NamedTuple):
    """Mean (D,), covariance (D, D), and the number of samples they came from (None: they are exact)."""

    mean: torch.Tensor
    cov: torch.Tensor
    n: int | None = None


class Stats(NamedTuple):
    """Running count, mean and scatter sum (x - mean)(x - mean)^T; starts empty as ``Stats()``.

    Every batch is centred on its own mean, and two parts a, b join by

        delta = mean_b - mean_a
        scatter = scatter_a + scatter_b + delta delta^T n_a n_b / (n_a + n_b)

    (Chan, Golub and LeVeque, 1979). Sums of E[x x^T] - mean mean^T, or of x about any fixed shift, lose
    the covariance to cancellation when the mean drifts far from the origin of the sums; here every term
    is positive semi-definite, so nothing cancels. Immutable: `update` and `merge` return a new Stats,
    and parts from several processes merge in any grouping.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    >>> stats = Stats().update(x[:1]).merge(Stats().update(x[1:]))
    >>> stats.n, stats.finish().mean.tolist(), stats.finish().cov.tolist()
    (3, [2.0, 2.0], [[4.0, 3.0], [3.0, 3.0]])
    """

    n: int = 0
    mean: torch.Tensor | None = None
    scatter: torch.Tensor | None = None

    def update(self, batch) -> Stats:
        """With a batch (N, D) of any float dtype added; N may be 0."""
        batch = sample_matrix(batch, "batch", least=0, dim=None if self.mean is None else len(self.mean))
        if len(batch) == 0:
            return self
        mean = batch.mean(dim=0)
        centred = batch - mean
        return self.merge(Stats(len(batch), mean, centred.T @ centred))

    def merge(self, other: Stats) -> Stats:
        """The Stats of both samples together; either may be empty."""
        if not isinstance(other, Stats):
            raise TypeError(f"other is a {type(other).__name__}; expected a Stats")
        if other.mean is None or other.scatter is None:
            return self
        if self.mean is None or self.scatter is None:
            return other
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"other has {len(other.mean)} dimensions; expected {len(self.mean)}, as this Stats has"
            )
        n = self.n + other.n
        delta = other.mean.to(self.mean.device) - self.mean
        joined = self.scatter + other.scatter.to(self.mean.device)
        joined = joined + torch.outer(delta, delta) * (self.n * other.n / n)
        return Stats(n, self.mean + delta * (other.n / n), joined)

    def finish(self) -> Gaussian:
        """Mean and unbiased covariance, scatter / (n - 1)."""
        if self.mean is None or self.scatter is None or self.n < 2:
            raise ValueError(f"Stats has seen {self.n} samples; a covariance needs at least 2")
        return Gaussian(self.mean, self.scatter / (self.n - 1), self.n)


def gaussian_stats(x) -> Gaussian:
    """Mean, unbiased covariance and count of the rows of x (N, D), in float64; N >= 2.

    >>> gaussian_stats(torch.tensor([[1.0], [3.0]]))
    Gaussian(mean=tensor([2.], dtype=torch.float64), cov=tensor([[2.]], dtype=torch.float64), n=2)
    """
    return Stats().update(sample_matrix(x, "x", least=2)).finish()
