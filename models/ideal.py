"""The exact denoiser of a data set: what a network with no regularisation at all would learn.

For data y_1 .. y_N the posterior mean on a path is a softmax over the set,

    E[x0 | x_t = x] = sum_n softmax_n( -|x - alpha y_n|^2 / (2 sigma^2) ) y_n

the nearest row as sigma -> 0, the mean of the set as alpha / sigma -> 0. It is the score that 2206.00364 writes
down in its appendix B, and a mixture with one component a row whose covariance has gone to 0.

    >>> from fewstep.models import paths
    >>> ideal = IdealDenoiser(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), paths.edm())
    >>> ideal(torch.tensor([[0.3]], dtype=torch.float64), 0.1), ideal(torch.zeros(1, 1, dtype=torch.float64), 80.0)
    (tensor([[1.]], dtype=torch.float64), tensor([[0.]], dtype=torch.float64))
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .denoiser import Denoiser
from .paths import Path, Times


class IdealDenoiser(Denoiser):
    """The posterior mean of x0 over the rows of a data set.

    Args:
        dataset: (N, ...) the samples, each equally likely.
        path: any Gaussian path.
        labels: (N,) whole numbers from 0; then the keyword ``label`` (B,) keeps only the rows of that class, and
            -1 keeps all.
        chunk: rows of the data set looked at together; memory is O(B chunk) beside the set, at any N.
        dtype: what it computes in: float64 by default, float32 for speed.
    """

    def __init__(
        self,
        dataset: torch.Tensor,
        path: Path,
        labels: torch.Tensor | None = None,
        chunk: int = 4096,
        dtype: torch.dtype = torch.float64,
    ):
        if not isinstance(dataset, torch.Tensor) or dataset.ndim < 2 or len(dataset) == 0:
            came = tuple(dataset.shape) if isinstance(dataset, torch.Tensor) else type(dataset).__name__
            raise ValueError(f"dataset must be a tensor of shape (N, ...) with N >= 1, got {came}")
        if not torch.isfinite(dataset).all():
            raise ValueError("dataset must be finite")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        super().__init__(self._mean, path, predicts="x0", shape=dataset.shape[1:])
        rows = dataset.detach().flatten(1).double()
        centre = rows.mean(0)
        self.chunk = int(chunk)
        self._centre = centre.to(dtype)
        self._rows = (rows - centre).to(dtype)  # (N, D); centred, so that the products below cancel less
        self._squares = (self._rows * self._rows).sum(-1)
        self.labels = None
        if labels is not None:
            self.labels = torch.as_tensor(labels, device=dataset.device)
            if (
                self.labels.shape != (len(dataset),)
                or self.labels.is_floating_point()
                or (self.labels < 0).any()
            ):
                raise ValueError(f"labels must be {len(dataset)} whole numbers from 0, one a row of dataset")

    def log_prob(self, x: torch.Tensor, t: Times, label: torch.Tensor | None = None) -> torch.Tensor:
        """log p_t(x): (B,), for x (B, ...) and sigma(t) > 0."""
        tau = self._network_time(x, t)
        if (self.path.sigma(tau) == 0).any():
            raise ValueError("t must lie where sigma > 0: at the clean end a data set has no density")
        maximum, total, _, counts = self._softmax(x, tau, label)
        sigma = self.path.sigma(tau)
        normal = 0.5 * self._rows.shape[1] * torch.log(2 * math.pi * sigma * sigma)
        return (maximum + total.log() - counts.to(maximum).log() - normal.to(maximum)).to(x.dtype)

    def _mean(self, x: torch.Tensor, tau: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        _, total, weighted, _ = self._softmax(x, tau, label)
        return (self._centre + weighted / total[:, None]).reshape(x.shape).to(x.dtype)

    def _softmax(self, x: torch.Tensor, tau: torch.Tensor, label: Any):
        """One pass with a running maximum: max_n l_n, sum e^(l - max), sum e^(l - max) y, and the rows counted."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}"
            )
        if tau.ndim != 1:
            raise ValueError(f"t must be a number or one a sample, got shape {tuple(tau.shape)}")
        label = self._label(x, label)
        alpha, sigma = self.path.alpha(tau), self.path.sigma(tau)
        clean = sigma == 0  # the limit sigma -> 0: all of the mass on the nearest row
        query = x.flatten(1).to(self._rows) - alpha.to(self._rows)[:, None] * self._centre
        # -|q - alpha y|^2 / (2 sigma^2) = (alpha q.y - alpha^2 |y|^2/2 - |q|^2/2) / sigma^2
        precision = 1 / torch.where(clean, 1.0, sigma * sigma)
        slope = (alpha * precision).to(query)[:, None] * query
        bend = (0.5 * alpha * alpha * precision).to(query)[:, None]
        maximum = query.new_full((len(query),), -math.inf)
        total, weighted = torch.zeros_like(maximum), torch.zeros_like(query)
        counts = torch.zeros(len(query), dtype=torch.long, device=query.device)
        for start in range(0, len(self._rows), self.chunk):
            rows = self._rows[start : start + self.chunk]
            logits = slope @ rows.mT - bend * self._squares[start : start + self.chunk]
            if label is not None:
                kept = (label[:, None] == self.labels[start : start + self.chunk]) | (label[:, None] == -1)
                logits = logits.masked_fill(~kept, -math.inf)
                counts = counts + kept.sum(-1)
            else:
                counts = counts + len(rows)
            highest = torch.maximum(maximum, logits.detach().amax(-1))
            anchor = torch.where(highest == -math.inf, 0.0, highest)  # nothing kept so far: exp(-inf - 0) = 0
            shrink = torch.where(clean & (highest > maximum), 0.0, (maximum - anchor).exp())
            weights = (logits - anchor[:, None]).exp()
            weights = torch.where(clean[:, None], (logits == highest[:, None]).to(weights), weights)
            total = total * shrink + weights.sum(-1)
            weighted = weighted * shrink[:, None] + weights @ rows
            maximum = highest
        rest = (0.5 * precision).to(query) * (query * query).sum(-1)
        return maximum - rest, total, weighted, counts

    def _label(self, x: torch.Tensor, label: Any) -> torch.Tensor | None:
        if label is None:
            return None
        if self.labels is None:
            raise ValueError("label needs an IdealDenoiser made with labels=...")
        label = torch.as_tensor(label, device=x.device)
        if label.shape != x.shape[:1]:
            raise ValueError(f"label must have shape ({len(x)},), got {tuple(label.shape)}")
        known = torch.isin(label, self.labels) | (label == -1)
        if not known.all():
            raise ValueError(f"label must be -1 or a class of the data set, got {label[~known][0].item()}")
        return label
