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

from typing import Any

import torch

from ..kernels.mixture_score import mixture_score
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
        dtype: what it computes in: float64 by default, float32 for speed (up to 128 dimensions in one pass on a GPU).
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
        self._counts = torch.tensor([len(rows)], device=rows.device)  # rows of each class; the last: of all
        self.labels = None
        if labels is not None:
            self.labels = torch.as_tensor(labels, device=dataset.device)
            if (
                self.labels.shape != (len(dataset),)
                or self.labels.is_floating_point()
                or (self.labels < 0).any()
            ):
                raise ValueError(f"labels must be {len(dataset)} whole numbers from 0, one a row of dataset")
            self._counts = torch.cat([torch.bincount(self.labels), self._counts])

    def log_prob(self, x: torch.Tensor, t: Times, label: torch.Tensor | None = None) -> torch.Tensor:
        """log p_t(x): (B,), for x (B, ...) and sigma(t) > 0."""
        tau = self._network_time(x, t)
        if (self.path.sigma(tau) == 0).any():
            raise ValueError("t must lie where sigma > 0: at the clean end a data set has no density")
        _, density = self._posterior(x, tau, label)
        counts = self._counts[-1] if label is None else self._counts[torch.as_tensor(label, device=x.device)]
        return (density - counts.to(density).log()).to(x.dtype)

    def _mean(self, x: torch.Tensor, tau: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        mean, _ = self._posterior(x, tau, label)
        return (self._centre + mean).reshape(x.shape).to(x.dtype)

    def _posterior(self, x: torch.Tensor, tau: torch.Tensor, label: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean less the set's, (B, D), and the log of the kept rows' densities, summed: (B,)."""
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}"
            )
        if tau.ndim != 1:
            raise ValueError(f"t must be a number or one a sample, got shape {tuple(tau.shape)}")
        label = self._label(x, label)
        alpha, sigma = self.path.alpha(tau).to(self._rows), self.path.sigma(tau).to(self._rows)
        query = x.flatten(1).to(self._rows) - alpha[:, None] * self._centre
        labels = None if label is None else self.labels
        return mixture_score(
            query,
            alpha,
            sigma,
            self._rows,
            label=label,
            labels=labels,
            squares=self._squares,
            chunk=self.chunk,
        )

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
