"""Linear observations  y = A x + noise  of images, by the axes in which they act: A = U diag(s) V'.

    inpaint(mask)                  some pixels, V = 1
    blur(shape, std)               a Gaussian along rows and columns, ends repeated
    downsample(shape, factor)      means of blocks: super-resolution's observation
    dense(A, shape)                any function that is linear, or a matrix; small samples only

An operator maps (B, *shape) to (B, *observed) by calling it. ``axes(x)`` is V'x, ``back(z)`` is V z, ``seen(y)`` is U'y
laid out like V'x, and ``values`` are s there, 0 where nothing is seen: so whoever conditions a Gaussian on y does it
number by number.

    >>> A = downsample((1, 8, 8), 2)
    >>> x = torch.arange(64.0, dtype=torch.float64).reshape(1, 1, 8, 8)
    >>> A(x).shape, bool(torch.allclose(A.values * A.axes(x), A.seen(A(x))))
    (torch.Size([1, 1, 4, 4]), True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


class Operator:
    """A = U diag(values) V', by functions; ``shape`` of samples, ``observed`` of what is seen of one."""

    def __init__(
        self,
        shape: Sequence[int],
        observed: Sequence[int],
        values: torch.Tensor,
        apply: Callable[[torch.Tensor], torch.Tensor],
        axes: Callable[[torch.Tensor], torch.Tensor],
        back: Callable[[torch.Tensor], torch.Tensor],
        seen: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.shape, self.observed, self.values = tuple(shape), tuple(observed), values
        self._apply, self.axes, self.back, self.seen = apply, axes, back, seen

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A x."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}"
            )
        return self._apply(x)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """A'y."""
        return self.back(self.values.to(y) * self.seen(y))

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        """The smallest x with A x nearest to y."""
        values = self.values.to(y)
        gain = torch.where(values > 1e-6 * values.max(), 1 / values.clamp_min(1e-30), 0.0)
        return self.back(gain * self.seen(y))


def inpaint(mask: torch.Tensor) -> Operator:
    """The pixels where ``mask`` (*shape) is True; the others are seen as 0."""
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool or not mask.any():
        raise ValueError(
            f"mask must be booleans with at least one True, got {mask.dtype} {tuple(mask.shape)}"
        )
    values = mask.double()

    def keep(x: torch.Tensor) -> torch.Tensor:
        return x * values.to(x)

    return Operator(mask.shape, mask.shape, values, keep, lambda x: x, lambda z: z, keep)


def blur(shape: Sequence[int], std: float) -> Operator:
    """A Gaussian of standard deviation ``std`` pixels along the last two axes."""
    if not std > 0:
        raise ValueError(f"std must be positive, in pixels, got {std!r}")

    def smear(size: int) -> torch.Tensor:
        at = torch.arange(size, dtype=torch.float64)
        reach = math.ceil(4 * std)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        for step in range(-reach, reach + 1):
            column = (at + step).clamp(0, size - 1).long()
            matrix[at.long(), column] += math.exp(-0.5 * (step / std) ** 2)
        return matrix / matrix.sum(1, keepdim=True)

    return separable(shape, smear(shape[-2]), smear(shape[-1]))


def downsample(shape: Sequence[int], factor: int) -> Operator:
    """Means of ``factor`` x ``factor`` blocks of the last two axes."""
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor must be a positive integer, got {factor!r}")
    if shape[-2] % factor or shape[-1] % factor:
        raise ValueError(f"factor must divide the sides {tuple(shape[-2:])}, got {factor}")

    def means(size: int) -> torch.Tensor:
        eye = torch.eye(size // factor, dtype=torch.float64)
        return eye.repeat_interleave(factor, 1) / factor

    return separable(shape, means(shape[-2]), means(shape[-1]))


def separable(shape: Sequence[int], rows: torch.Tensor, columns: torch.Tensor) -> Operator:
    """x -> rows x columns' on the last two axes, for matrices (h, H) and (w, W)."""
    shape = tuple(shape)
    if len(shape) < 2 or rows.shape[-1] != shape[-2] or columns.shape[-1] != shape[-1]:
        raise ValueError(f"shape must end in {rows.shape[-1]}, {columns.shape[-1]}, got {shape}")
    (u, s, vt), (p, q, wt) = (torch.linalg.svd(m.double(), full_matrices=True) for m in (rows, columns))
    values = torch.zeros(shape, dtype=torch.float64)
    values[..., : len(s), : len(q)] = s[:, None] * q

    def between(left: torch.Tensor, right: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: left.to(x) @ x @ right.to(x).mT

    def seen(y: torch.Tensor) -> torch.Tensor:
        turned = u.mT.to(y) @ y @ p.to(y)
        out = y.new_zeros(*y.shape[:-2], *shape[-2:])
        out[..., : len(s), : len(q)] = turned[..., : len(s), : len(q)]
        return out

    observed = (*shape[:-2], len(rows), len(columns))
    return Operator(
        shape, observed, values, between(rows, columns), between(vt, wt), between(vt.mT, wt.mT), seen
    )


def dense(matrix: torch.Tensor | Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int]) -> Operator:
    """Any linear map: a matrix (m, D) of flattened samples, or a function of (B, *shape), which is probed.

    >>> A = dense(lambda x: x.sum(1, keepdim=True), (3,))
    >>> A(torch.ones(2, 3)).tolist(), round(float(A.values.max()), 4)
    ([[3.0], [3.0]], 1.7321)
    """
    shape = tuple(shape)
    size = math.prod(shape)
    if callable(matrix) and not isinstance(matrix, torch.Tensor):
        basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
        columns = matrix(basis) - matrix(torch.zeros_like(basis))
        observed = tuple(columns.shape[1:])
        check = torch.linspace(-1, 1, size, dtype=torch.float64).reshape(1, *shape)
        direct, rebuilt = matrix(check).flatten(), columns.flatten(1).mT @ check.flatten()
        if not torch.allclose(direct, rebuilt, rtol=1e-4, atol=1e-6):
            raise ValueError("matrix must be linear: this function of x is not")
        matrix = columns.flatten(1).mT
    else:
        matrix = torch.as_tensor(matrix).double()
        if matrix.ndim != 2 or matrix.shape[1] != size:
            raise ValueError(f"matrix must have shape (m, {size}), got {tuple(matrix.shape)}")
        observed = (len(matrix),)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=True)
    values = torch.zeros(size, dtype=torch.float64)
    values[: len(s)] = s

    def seen(y: torch.Tensor) -> torch.Tensor:
        out = y.new_zeros(len(y), size)
        out[:, : len(s)] = (y.flatten(1) @ u.to(y))[:, : len(s)]
        return out.reshape(len(y), *shape)

    return Operator(
        shape, observed, values.reshape(shape),
        lambda x: (x.flatten(1) @ matrix.to(x).mT).reshape(len(x), *observed),
        lambda x: (x.flatten(1) @ vt.to(x).mT).reshape(x.shape),
        lambda z: (z.flatten(1) @ vt.to(z)).reshape(z.shape), seen,
    )  # fmt: skip
