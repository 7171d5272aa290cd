"""A scalar whose gradient with respect to a sample is a tensor that was worked out elsewhere.

Score distillation knows d loss / d x, not the loss. Both forms below have the gradient g / B / n on x of n elements a
sample ("mean") or g / B ("sum"):

    dot:   sum(sg[g] x)                          its value means nothing
    mse:   1/2 sum((x - sg[x - g])^2)            its value is |g|^2 / 2, what DMD2 and FastGen log

In bf16 ``x - (x - g)`` is nothing where |g| < |x| / 256, so ``mse`` silently drops small gradients; ``dot`` does not.
"""

from __future__ import annotations

from typing import Literal

import torch


def surrogate(
    x: torch.Tensor,
    gradient: torch.Tensor,
    kind: Literal["dot", "mse"] = "dot",
    reduction: Literal["mean", "sum"] = "mean",
) -> torch.Tensor:
    """The scalar; x and gradient (B, ...) of one shape.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> surrogate(x, torch.full((2, 3), 6.0)).backward(); x.grad[0]
    tensor([1., 1., 1.])
    """
    if x.shape != gradient.shape:
        raise ValueError(f"gradient must have x's shape {tuple(x.shape)}, got {tuple(gradient.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    gradient = gradient.detach()
    if kind == "dot":
        terms = gradient * x
    elif kind == "mse":
        terms = 0.5 * (x - (x - gradient).detach()).square()
    else:
        raise ValueError(f"kind must be 'dot' or 'mse', got {kind!r}")
    return terms.mean() if reduction == "mean" else terms.flatten(1).sum(1).mean()
