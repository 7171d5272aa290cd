"""Scaled dot-product attention, by PyTorch's own operator or by xformers'.

softmax(q k^T / sqrt(D)) v        (1706.03762)
"""

from __future__ import annotations

import torch
from torch.nn import functional

IMPLEMENTATIONS = ("sdpa", "xformers")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, impl: str = "sdpa") -> torch.Tensor:
    """Attention over tokens; q, k, v and the answer have shape (batch, heads, tokens, head size).

    Args:
        impl: ``sdpa`` (PyTorch's, everywhere) or ``xformers`` (memory-efficient attention, where its operators load).

    >>> q = torch.zeros(1, 2, 3, 4)
    >>> attention(q, q, torch.ones_like(q)).sum()
    tensor(24.)
    """
    check_implementation(impl)
    if impl == "sdpa":
        return functional.scaled_dot_product_attention(q, k, v)
    from xformers import ops

    try:
        # xformers puts tokens before heads
        out = ops.memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        kind = f"{tuple(q.shape)} {str(q.dtype).removeprefix('torch.')} on {q.device.type}"
        raise RuntimeError(
            f"attention='xformers' has no operator for {kind} ({versions()}); use 'sdpa'"
        ) from error
    return out.transpose(1, 2)


def check_implementation(impl: str) -> str:
    """``impl`` if it can be had here; ValueError if it is no name, ImportError if it cannot be loaded."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "xformers":
        try:
            from xformers import ops  # noqa: F401
        except (ImportError, OSError) as error:
            raise ImportError(
                f"attention='xformers' cannot be loaded ({versions()}); use 'sdpa': {error}"
            ) from error
    return impl


def versions() -> str:
    """What is installed of the two, for error messages."""
    from importlib import metadata

    try:
        xformers = metadata.version("xformers")
    except metadata.PackageNotFoundError:
        xformers = "not installed"
    return f"xformers {xformers}, torch {torch.__version__}"
