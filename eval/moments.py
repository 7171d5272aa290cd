"""Mean and covariance of a stream of features, accumulated without cancellation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from .checks import sample_matrix
from .ranks import Ranks

BLOCK = 512  # rows that a stream multiplies at once: fewer would spend their time on fetching the scatter
PANEL = 256  # columns of the scatter's lower triangle that are computed at once


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
    and parts from several processes merge in any grouping. A long stream goes through `stream_stats`.

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


def stream_stats(batches: Iterable) -> Stats:
    """The Stats of batches (n, D) that come one after another, each seen once.

    Equal to updating with each, and cheaper: the term of the means joins the rows as one more of them,
    so that a block costs a single product, of which only the lower triangle is formed, in place.

    >>> x = torch.randn(700, 3, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(stream_stats(x.split(100)).finish().cov, gaussian_stats(x).cov, atol=1e-14)
    True
    """
    total, mean, scatter = 0, None, None
    for rows in _blocks(batches):
        if mean is None or scatter is None:
            mean, scatter = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
        centre = rows.mean(dim=0)
        delta, joint = centre - mean, total + len(rows)
        between = delta * (total * len(rows) / joint) ** 0.5
        _add_products(scatter, torch.cat([rows - centre, between[None]]))
        mean += delta * (len(rows) / joint)
        total = joint
    if scatter is not None:
        scatter = scatter.tril() + scatter.tril(-1).T
    return Stats(total, mean, scatter)


def over_ranks(stats: Stats, ranks: Ranks) -> Stats:
    """The Stats of what all ranks saw, on every rank; some may have seen nothing, and need not know D.

    The means go round first, so that each rank's scatter is taken about the common mean before they are
    summed: nothing cancels, and one sum of D^2 numbers is all there is to send.
    """
    if ranks.world == 1:
        return stats
    seen = torch.tensor([stats.n, 0 if stats.mean is None else len(stats.mean)], device=ranks.device)
    counts, dims = torch.stack(ranks.each(seen)).T.tolist()
    if sum(counts) == 0:
        return Stats()
    if len({dim for dim in dims if dim}) > 1:
        raise ValueError(f"ranks saw features of {dims} dimensions; expected one number for all")
    mean, scatter = torch.zeros(max(dims), dtype=torch.float64), torch.zeros(max(dims), max(dims)).double()
    if stats.mean is not None and stats.scatter is not None:
        mean, scatter = stats.mean, stats.scatter
    mean, scatter = mean.to(ranks.device), scatter.to(ranks.device)
    shares = torch.tensor(counts, dtype=torch.float64, device=ranks.device) / sum(counts)
    means = torch.stack(ranks.each(mean))
    # About the first mean, so that equal means give exactly that mean.
    common = means[0] + shares @ (means - means[0])
    delta = mean - common
    return Stats(sum(counts), common, ranks.sum(scatter + stats.n * torch.outer(delta, delta)))


def _blocks(batches: Iterable) -> Iterator[torch.Tensor]:
    """The rows of the batches in float64, at least BLOCK at once but for the last."""
    held: list[torch.Tensor] = []
    dim = None
    for batch in batches:
        batch = sample_matrix(batch, "batch", least=0, dim=dim)
        dim = batch.shape[1]
        held.append(batch)
        if sum(map(len, held)) >= BLOCK:
            yield torch.cat(held) if len(held) > 1 else held[0]
            held = []
    if sum(map(len, held)):
        yield torch.cat(held)


def _add_products(total: torch.Tensor, rows: torch.Tensor) -> None:
    """rows^T rows added to the lower triangle of `total` (D, D), in place; what is above it is anything."""
    for first in range(0, len(total), PANEL):
        last = min(first + PANEL, len(total))
        total[first:last, :last].addmm_(rows[:, first:last].T, rows[:, :last])
