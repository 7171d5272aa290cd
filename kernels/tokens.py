"""Tokens and what modulates them, in the shapes that the kernels of norms and gates take.

x is (batch, tokens, channels); a scale, shift or gate is (batch, 1 or tokens, channels): one for all tokens of a
sample or one a token. Nothing is copied but what is not contiguous in its channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .lang import ceil_div, next_power_of_2

HALF = (torch.float16, torch.bfloat16)
WIDEST = 16_384  # channels that a program can hold


def tokens(x: torch.Tensor, name: str = "x") -> torch.Tensor:
    """x (B, ..., C) as (B, L, C) with its channels side by side."""
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be floating point (B, ..., C), got {x.dtype} {tuple(x.shape)}")
    if x.ndim != 3:
        count = x.shape[1:-1].numel()
        x = x.reshape(x.shape[0], count, x.shape[-1])
    return side_by_side(x)


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y in the shape of x, and y itself where it has that: in-place code and FSDP stumble over views of results."""
    return y if y.shape == x.shape else y.view(x.shape)


def modulation(v: torch.Tensor | None, x: torch.Tensor, name: str) -> torch.Tensor | None:
    """``v`` of shape (B, C), (B, 1, ..., C) or x's own as (B, 1 or L, C); a batch of 1 serves all of x's.

    >>> x = torch.zeros(2, 5, 8)
    >>> modulation(torch.zeros(2, 8), x, "scale").shape, modulation(torch.zeros(1, 5, 8), x, "scale").shape
    (torch.Size([2, 1, 8]), torch.Size([2, 5, 8]))
    """
    if v is None:
        return None
    batch, count, channels = x.shape[0], x.shape[1:-1].numel(), x.shape[-1]
    if v.ndim >= 2 and v.shape[-1] == channels and v.shape[0] in (1, batch):
        between = v.shape[1:-1]
        if between.numel() == 1 or between == x.shape[1:-1]:
            v = v.reshape(v.shape[0], between.numel(), channels)
            return side_by_side(v.expand(batch, -1, -1))
    each = f" or {(batch, count, channels)}" if count > 1 else ""
    raise ValueError(
        f"{name} must be {(batch, channels)}, {(batch, 1, channels)}{each}, got {tuple(v.shape)}"
    )


def affine(v: torch.Tensor | None, channels: int, name: str) -> torch.Tensor | None:
    """A weight or bias of shape (C,), contiguous."""
    if v is not None and v.shape != (channels,):
        raise ValueError(f"{name} must be ({channels},), got {tuple(v.shape)}")
    return None if v is None else v.contiguous()


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """x with its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strange(*given: torch.Tensor | None) -> str | None:
    """Which of these tensors has a dtype that kernels do not take; None where all have one that they do."""
    for t in given:
        if t is not None and t.dtype not in (*HALF, torch.float32):
            return f"a tensor is {str(t.dtype).removeprefix('torch.')}, kernels take float32, float16 and bfloat16"
    return None


def unsupported(*given: torch.Tensor | None) -> str | None:
    """Why kernels do not take these tokens and modulations; None where they do."""
    for t in given:
        if t is not None and t.shape[-1] > WIDEST:
            return f"{t.shape[-1]} channels are more than {WIDEST}"
        if t is not None and t.ndim == 3 and t.shape[1] * max(t.stride(1), t.shape[2]) >= 2**31:
            return f"a sample of {tuple(t.shape)} spans 2^31 elements or more"
    if given[0] is not None and given[0].shape[0] > 65_535:
        return f"a batch of {given[0].shape[0]}: kernels take up to 65535"
    return strange(*given)


def precise(*given: torch.Tensor | None) -> torch.dtype:
    """What a reference computes in: float64 if anything is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in given) else torch.float32


def result_type(*given: torch.Tensor | None) -> torch.dtype:
    """The dtype that sums and products of these tensors have."""
    dtypes = [t.dtype for t in given if t is not None]
    for other in dtypes[1:]:
        dtypes[0] = torch.promote_types(dtypes[0], other)
    return dtypes[0]


class Tiles(NamedTuple):
    """How rows are cut: a program takes ``steps`` tiles of ``rows`` tokens x ``block`` channels, one sample's."""

    rows: int
    block: int
    steps: int
    programs: int
    warps: int


def tiles(
    batch: int, count: int, channels: int, steps: int = 1, elements: int = 4096, each: int = 512
) -> Tiles:
    """Tiles of about ``elements``, ``each`` a warp; up to ``steps`` of them in turn, as long as a GPU is still filled.

    A function of shapes alone: the same sums in the same order on every device.
    """
    block = max(16, next_power_of_2(channels))
    rows = max(1, min(elements // block, next_power_of_2(count)))
    while steps > 1 and batch * ceil_div(count, rows * steps) < 1024:
        steps //= 2
    warps = min(16, max(1, rows * block // each))
    return Tiles(rows, block, steps, ceil_div(count, rows * steps), warps)
