"""What networks compute in: float32 as it is, or bf16 over float32 weights."""

from __future__ import annotations

import torch

PRECISIONS = ("fp32", "bf16")


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """A block whose matrix products are of ``precision``; weights and what optimizers see stay as they are.

    >>> with autocast("bf16", "cpu"): torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype
    torch.bfloat16
    """
    if precision not in PRECISIONS:
        raise ValueError(f"train.precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
