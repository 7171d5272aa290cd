"""Derivatives of a network along a direction of its inputs, by forward-mode differentiation.

One pass gives the output and its derivative, at about twice the price of a forward pass and without a graph. It needs
operators that know their tangents: attention is PyTorch's own formula (the fused ones have none), our kernels step
aside for their references (``kernels.dispatch``), and autocast is off, since a derivative loses more to bf16 than a
value does.

>>> jvp(lambda x, t: x * t**2, (torch.tensor(3.0), torch.tensor(2.0)), (torch.tensor(1.0), torch.tensor(10.0)))
(tensor(12.), tensor(124.))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def jvp(
    function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], along: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(function(*inputs), d/dh function(*(inputs + h along)) at h = 0), both without a graph."""
    device = inputs[0].device.type
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False):
        return torch.func.jvp(function, inputs, along)
