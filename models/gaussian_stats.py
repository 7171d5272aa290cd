"""The Gaussian that a data set looks like from far away: mean and covariance, low rank plus a tail.

    x0 ~ N(mu, U diag(L) U' + l (I - U U'))

At high noise the score of real data is all but that of this Gaussian (2412.09726, 2311.10892), and on any path the
probability-flow ODE of a Gaussian is solved in closed form (``transport``): with z = x_s - alpha_s mu

    x_n = alpha_n mu + g(l) (z - U U'z) + U (g(L) U'z)
    g(L) = ((alpha_n^2 L + sigma_n^2) / (alpha_s^2 L + sigma_s^2))^(1/2)

The tail l is the mean of the discarded eigenvalues (probabilistic PCA), or 0 as in 2412.09726, where it leaves no
variance at all in the other directions: fine at sigma >> sqrt(l), wrong below.

    >>> from fewstep.models import gaussian, paths
    >>> data = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> stats = gaussian(data, rank=4); stats.rank, stats.shape, stats.count
    (4, (1, 4, 4), (500,))
    >>> stats.transport(paths.edm(), 80 * data[:2], 80.0, 0.0).shape
    torch.Size([2, 1, 4, 4])
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .checkpoint import write_atomically
from .denoiser import Denoiser
from .mixture import _padded, _rowwise_product
from .paths import Path

VERSION = 1


@dataclass(frozen=True, eq=False)
class GaussianStats:
    """C Gaussians in D dimensions, one for all data or one a class; all float64.

    ``mean`` (C, D), ``vectors`` U (C, D, r) of orthonormal columns (or of zeros, where a class has fewer), ``values`` L
    (C, r) falling, ``rest`` l (C,), ``count`` samples behind each, ``shape`` of one sample.
    """

    mean: torch.Tensor
    vectors: torch.Tensor
    values: torch.Tensor
    rest: torch.Tensor
    count: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self):
        classes, dim = len(self.count), math.prod(self.shape)
        rank = self.values.shape[-1]
        wanted = {
            "mean": (classes, dim),
            "vectors": (classes, dim, rank),
            "values": (classes, rank),
            "rest": (classes,),
        }
        for name, shape in wanted.items():
            array = getattr(self, name)
            if tuple(array.shape) != shape or not torch.isfinite(array).all():
                raise ValueError(f"{name} must be finite and of shape {shape}, got {tuple(array.shape)}")
        if (self.values < 0).any() or (self.rest < 0).any():
            raise ValueError("values and rest are variances: they must not be negative")

    @property
    def dim(self) -> int:
        """D."""
        return self.mean.shape[1]

    @property
    def rank(self) -> int:
        """r: how many eigenvectors are kept."""
        return self.values.shape[1]

    @property
    def classes(self) -> int:
        """C: 1 where all data share one Gaussian."""
        return len(self.count)

    def covariance(self, label: int = 0) -> torch.Tensor:
        """(D, D), written out: for small D.

        >>> from fewstep.models import gaussian
        >>> gaussian(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).covariance().tolist()
        [[1.0, 0.0], [0.0, 0.0]]
        """
        u, rest = self.vectors[label], self.rest[label]
        return rest * torch.eye(self.dim).to(u) + (u * (self.values[label] - rest)) @ u.mT

    def to(self, device: torch.device | str) -> GaussianStats:
        """The same on a device; float64 wherever it exists."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        names = ("mean", "vectors", "values", "rest")
        return replace(self, **{name: getattr(self, name).to(device, dtype) for name in names})

    def transport(
        self, path: Path, x: torch.Tensor, t_from: float, t_to: float, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where the probability-flow ODE of the Gaussian carries x (B, ...) from ``t_from`` to ``t_to``, either way.

        Both ends may be the path's: alpha = 0, where x is all noise, and sigma = 0, where it is a sample.
        """
        scalars = []
        for name, t in (("t_from", t_from), ("t_to", t_to)):
            if (
                isinstance(t, bool)
                or not isinstance(t, (int, float, np.number))
                or not path.t_clean <= t <= path.t_max
            ):
                raise ValueError(
                    f"{name} must lie in [{path.t_clean:g}, {path.t_max:g}] on {path.name}, got {t!r}"
                )
            scalars.append((path.alpha(float(t)), path.sigma(float(t))))
        (a_s, s_s), (a_n, s_n) = scalars
        if s_s == 0 and bool((self.values == 0).any() | ((self.rest == 0).any() & (self.rank < self.dim))):
            raise ValueError(
                f"t_from must lie where sigma > 0, got {t_from:g}: this Gaussian has directions without any variance"
            )
        if t_from == t_to:
            return x

        def gain(variance: torch.Tensor) -> torch.Tensor:
            return ((a_n * a_n * variance + s_n * s_n) / (a_s * a_s * variance + s_s * s_s)).sqrt()

        return self._linear(x, a_s, a_n, gain, label)

    def denoiser(self, path: Path) -> Denoiser:
        """The exact E[x0 | x_t] of the Gaussian, as a Denoiser on any path: with z = x - alpha mu

            x0 = mu + q(l) (z - U U'z) + U (q(L) U'z),      q(L) = alpha L / (alpha^2 L + sigma^2)

        The keyword ``label`` chooses the class; all others are ignored.

        >>> from fewstep.models import gaussian, paths
        >>> d = gaussian(torch.tensor([[1.0], [-1.0]])).denoiser(paths.edm())
        >>> d(torch.ones(1, 1), 1.0)
        tensor([[0.5000]])
        """

        def call(
            x: torch.Tensor, tau: torch.Tensor, label: torch.Tensor | None = None, **_: Any
        ) -> torch.Tensor:
            alpha, sigma = (f(tau).to(self.mean).reshape(-1, 1) for f in (path.alpha, path.sigma))

            def gain(variance: torch.Tensor, a=alpha, s=sigma) -> torch.Tensor:
                total = a * a * variance + s * s
                # at sigma = 0 a direction without variance is known, and whatever z says there is passed on
                return torch.where(total > 0, a * variance / torch.where(total > 0, total, 1.0), 1 / a)

            return self._linear(x, alpha, 1.0, gain, label)

        return Denoiser(call, path, predicts="x0", shape=self.shape)

    def _linear(
        self,
        x: torch.Tensor,
        alpha: float | torch.Tensor,
        alpha_out: float,
        gain: Callable[[torch.Tensor], torch.Tensor],
        label: torch.Tensor | None,
    ) -> torch.Tensor:
        """alpha_out mu + gain(l) (z - U U'z) + U (gain(L) U'z), z = x - alpha mu; alpha and gains (B or 1, ...)."""
        if x.ndim < 2 or x[:1].numel() != self.dim * min(len(x), 1):
            raise ValueError(
                f"x must have shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}"
            )
        flat = x.flatten(1).to(self.mean)
        out = torch.empty_like(flat)
        for which, rows in self._groups(label, len(flat)):
            z = (
                flat[rows]
                - (alpha if isinstance(alpha, float) else alpha.expand(len(flat), 1)[rows]) * self.mean[which]
            )
            u = self.vectors[which]
            along, across = gain(self.values[which].reshape(1, -1)), gain(self.rest[which].reshape(1, 1))
            along, across = (g.expand(len(flat), -1)[rows] for g in (along, across))
            turned = _rowwise_product(z, _padded(u))[:, : self.rank]
            moved = _rowwise_product((along - across) * turned, _padded(u.mT))[:, : self.dim]
            out[rows] = alpha_out * self.mean[which] + across * z + moved
        return out.reshape(x.shape).to(x.dtype)

    def _groups(self, label: torch.Tensor | None, batch: int) -> list[tuple[int, Any]]:
        """(class, its rows of the batch) .."""
        if self.classes == 1:
            return [(0, slice(None))]
        if label is None or tuple(label.shape) != (batch,) or label.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"label must be integers of shape ({batch},), since there is a Gaussian a class, "
                f"got {None if label is None else (label.dtype, tuple(label.shape))}"
            )
        present = label.unique().tolist()
        if present and not 0 <= present[0] <= present[-1] < self.classes:
            raise ValueError(f"label must lie in 0 .. {self.classes - 1}, got {present}")
        return [(which, label == which) for which in present]

    def save(self, file: str | os.PathLike) -> None:
        """Write an .npz, whole or not at all."""
        if os.path.splitext(file)[1] != ".npz":
            raise ValueError(f"file must end in .npz, got {os.fspath(file)!r}")
        content = io.BytesIO()
        arrays = {
            name: getattr(self, name).cpu().double().numpy() for name in ("mean", "vectors", "values", "rest")
        }
        np.savez(content, fewstep_gaussian=VERSION, count=self.count, shape=self.shape, **arrays)
        write_atomically(file, content.getvalue())

    @staticmethod
    def load(file: str | os.PathLike) -> GaussianStats:
        """Read what ``save`` wrote; everything is checked again."""
        name = os.fspath(file)
        try:
            with np.load(name, allow_pickle=False) as content:
                arrays = dict(content)
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(
                f"{name} holds no Gaussian statistics: it is no .npz of arrays ({error})"
            ) from None
        missing = {"fewstep_gaussian", "mean", "vectors", "values", "rest", "count", "shape"} - set(arrays)
        if missing:
            raise ValueError(f"{name} holds no Gaussian statistics: {', '.join(sorted(missing))} missing")
        if arrays["fewstep_gaussian"] != VERSION:
            raise ValueError(f"{name} has format {arrays['fewstep_gaussian']}; this version reads {VERSION}")
        count, shape = (tuple(arrays[key].tolist()) for key in ("count", "shape"))
        rest = {key: torch.as_tensor(arrays[key]).double() for key in ("mean", "vectors", "values", "rest")}
        return GaussianStats(count=count, shape=shape, **rest)
