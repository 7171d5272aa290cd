"""A network that always sees the same number of samples.

Matrix products round by the shape of what they multiply: on a CPU the same sample gives other last bits alone than
in a batch of 64. Called in blocks of one fixed size, the last one filled up, a network's answer to a sample no longer
depends on the batch (nor does the memory that it takes).

    >>> from fewstep.models import paths
    >>> seen = []
    >>> d = Denoiser(lambda x, tau: seen.append(len(x)) or 0.5 * x, paths.flow(), predicts="x0")
    >>> in_blocks(d, 16)(torch.ones(40, 2), 0.3).shape, seen
    (torch.Size([40, 2]), [16, 16, 16])
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from .denoiser import Denoiser


def in_blocks(d: Denoiser, size: int = 16) -> Denoiser:
    """``d`` with its network called on exactly ``size`` samples at a time, the last block filled up.

    Every condition that is a tensor of one entry a sample, or a mapping of such, is cut along; all else is passed on.
    Below 16 or so blocks cost time; ``d`` itself stays as it is. A composite is made of denoisers in blocks, not put
    into blocks itself.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive integer, got {size!r}")
    if len(d.parts()) != 1:
        raise ValueError("d is a composite: put the denoisers that it is made of into blocks")
    call = d.call

    def blocked(x: torch.Tensor, tau: torch.Tensor, **cond: Any) -> Any:
        batch, pieces = x.shape[0], []
        for begin in range(0, batch, size):
            index = torch.arange(begin, begin + size, device=x.device)
            index = torch.where(index < batch, index, begin)
            cut = _cut(cond, index, batch)
            out = call(x[index], tau[index], **cut)
            pieces.append(tuple(o[: batch - begin] for o in (out if isinstance(out, tuple) else (out,))))
        if not pieces:
            return call(x, tau, **cond)
        joined = tuple(torch.cat(parts) for parts in zip(*pieces))
        return joined if isinstance(out, tuple) else joined[0]

    twin = copy.copy(d)
    twin.call = blocked
    return twin


def _cut(value: Any, index: torch.Tensor, batch: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(inner, index, batch) for key, inner in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch:
        return value[index]
    return value
