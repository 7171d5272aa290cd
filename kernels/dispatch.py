"""Who runs an op: its Triton kernel or its torch reference.

The ``impl=`` of a call decides, then the innermost ``using(...)``, then ``FEWSTEP_KERNELS``. Where none of them speaks,
Triton runs what it can on a GPU (and on a CPU under TRITON_INTERPRET=1), and the reference the rest.

    >>> import torch
    >>> choose("an_op", None, [torch.zeros(3)])
    'reference'
    >>> choose("an_op", "triton", [torch.zeros(3)])
    Traceback (most recent call last):
    ...
    ValueError: impl='triton' is asked for, but an_op cannot run there: tensors are on the CPU (TRITON_INTERPRET=1 ...
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch.autograd import forward_ad

from .lang import available, interpreting

Impl = Literal["triton", "reference"]
IMPLS = ("triton", "reference")
VARIABLE = "FEWSTEP_KERNELS"
_using: list[Impl] = []  # the innermost last; a list because torch.compile reads and guards those


@contextlib.contextmanager
def using(impl: Impl) -> Iterator[None]:
    """``with using("reference"):`` every op inside is run so, in all threads, unless its call says otherwise."""
    _using.append(_check(impl, "impl"))
    try:
        yield
    finally:
        _using.pop()


def choose(
    op: str, impl: str | None, tensors: Sequence[torch.Tensor | None], unsupported: str | None = None
) -> Impl:
    """``"triton"`` or ``"reference"`` for a call of ``op`` on ``tensors``.

    ``unsupported`` is why the kernel does not take this call, None if it does. Where "triton" is asked for by name and
    cannot be, a ``ValueError`` says why; by default the reference runs it.
    """
    wanted, whose = _wanted(impl)
    if wanted == "reference":
        return "reference"
    places = [t.device for t in tensors if t is not None]
    reason = unsupported or absent(places[0] if places else torch.device("cpu"))
    if reason is None and forward_ad._current_level >= 0:  # custom ops would drop the tangents without a word
        reason = "forward-mode derivatives are taken here, and kernels have none"
    if reason is None:
        return "triton"
    if wanted == "triton":
        raise ValueError(f"{whose} is asked for, but {op} cannot run there: {reason}")
    return "reference"


def absent(device: torch.device) -> str | None:
    """Why no kernel can run on ``device``; None if one can."""
    if not available():
        return "Triton is not installed"
    if device.type == "cuda" or interpreting():
        return None
    if device.type == "cpu":
        return "tensors are on the CPU (TRITON_INTERPRET=1 interprets kernels there, slowly)"
    return f"tensors are on {device.type}, kernels run on CUDA and ROCm"


def idle(tensor: torch.Tensor) -> bool:
    """Whether ``choose`` would take the reference whatever the op: nobody asks, and no kernel runs where tensor is."""
    return tensor.device.type == "cpu" and not (_using or interpreting() or os.environ.get(VARIABLE))


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether a kernel can be launched on this tensor: what a custom op, called on its own, goes by."""
    return absent(tensor.device) is None


def direct(tensor: torch.Tensor) -> bool:
    """Whether nobody watches this call (torch.compile, a fake or tracing mode, a subclass), so that an op that has no
    gradient may launch its kernel itself and spare the way through the dispatcher."""
    return (
        type(tensor) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def why(device: torch.device | str | None = None) -> tuple[Impl, str]:
    """Who runs the ops on ``device`` (by default the GPU if there is one), and the reason, for people to read."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted, whose = _wanted(None)
    reason = absent(device)
    if wanted == "reference":
        return "reference", whose
    if reason is not None:
        return "reference", "there is no GPU here" if device.type == "cpu" and available() else reason
    if wanted == "triton":
        return "triton", whose
    return "triton", "TRITON_INTERPRET=1" if interpreting() else "a GPU and Triton are here"


def _wanted(impl: str | None) -> tuple[Impl | None, str]:
    """What is asked for, and the words for who asked."""
    if impl is not None:
        return _check(impl, "impl"), f"impl={impl!r}"
    if _using:
        return _using[-1], f"using({_using[-1]!r})"
    said = os.environ.get(VARIABLE)
    if said:
        return _check(said, VARIABLE), f"{VARIABLE}={said}"
    return None, ""


def _check(impl: str, name: str) -> Impl:
    if impl not in IMPLS:
        raise ValueError(f"{name} must be one of {', '.join(IMPLS)}, got {impl!r}")
    return impl  # type: ignore[return-value]
