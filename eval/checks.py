"""What a metric may be given: one place that refuses a bad sample and says why."""

from __future__ import annotations

import numpy as np
import torch


def sample_matrix(x, name: str, least: int = 1, dim: int | None = None) -> torch.Tensor:
    """`x` as a detached float64 (N, D) tensor on its own device, or an error that names the argument.

    least: the fewest rows that the caller can work with; dim: the D that the other argument has.

    >>> sample_matrix([[0.5, 1.0]], "x").dtype
    torch.float64
    >>> sample_matrix(torch.zeros(1, 3), "fake", least=2)
    Traceback (most recent call last):
    ...
    ValueError: fake has 1 rows; this needs at least 2
    """
    if isinstance(x, (np.ndarray, list, tuple)):
        try:
            x = torch.as_tensor(np.asarray(x))
        except (TypeError, ValueError) as err:
            raise TypeError(f"{name} holds no numbers ({err}); expected floats of shape (N, D)") from err
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor or an array of shape (N, D)")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {x.dtype}; expected a float dtype")
    if x.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (N, D); flatten images first")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected at least one dimension D")
    if dim is not None and x.shape[1] != dim:
        raise ValueError(f"{name} has {x.shape[1]} dimensions; expected {dim}, as the other argument has")
    if x.shape[0] < least:
        raise ValueError(f"{name} has {x.shape[0]} rows; this needs at least {least}")
    x = x.detach().to(torch.float64)
    finite = torch.isfinite(x).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        bad = int((~finite).sum())
        raise ValueError(
            f"{name} has NaN or infinity in {bad} of {len(x)} rows, first in row {row}; expected finite ones"
        )
    return x


def sample_pair(a, b, names: tuple[str, str], least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Both samples checked, of one dimension, on the first one's device."""
    a = sample_matrix(a, names[0], least)
    b = sample_matrix(b, names[1], least, dim=a.shape[1])
    return a, b.to(a.device)


def whole_number(value, name: str, least: int = 1) -> int:
    """`value` as an int of at least `least`.

    >>> whole_number(0, "chunk")
    Traceback (most recent call last):
    ...
    ValueError: chunk is 0; expected a whole number of at least 1
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return int(value)
