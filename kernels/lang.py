"""How a kernel is written without importing Triton: ``from .lang import jit, tl``.

``@jit`` keeps the function as it is; its first launch imports Triton and puts the real ``tl`` and the compiled kernels
into the file's globals. So a file with a kernel is imported in no time, on machines that have no Triton too.

    >>> @jit
    ... def kernel(x): tl.store(x, 1.0)
    >>> kernel
    <kernel 'kernel', not launched yet>
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

try:
    _INSTALLED = importlib.util.find_spec("triton") is not None
except (ImportError, ValueError):  # an import system that says no in its own way
    _INSTALLED = False
_INTERPRETS = _INSTALLED and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


class _Tl:
    """Stands for ``triton.language`` until a kernel of the file is launched."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"tl.{name} exists only inside a kernel")


tl: Any = _Tl()


class Kernel:
    """A function in Triton's language that has not been launched: ``kernel[grid](...)`` is where Triton comes in."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self.function, self.options = function, options

    def __getitem__(self, grid: Any) -> Callable:
        return self.real[grid]

    def __repr__(self) -> str:
        return f"<kernel {self.function.__name__!r}, not launched yet>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self.function.__name__} is a kernel: launch it as {self.function.__name__}[grid](...)"
        )

    @functools.cached_property
    def real(self) -> Any:
        """The function as ``triton.jit`` makes it, and likewise all that its globals name."""
        triton = require()
        made = triton.jit(self.function, **self.options)
        made.run = _on_its_gpu(made.run)
        self.__dict__["real"] = made  # before the others, which may name this one
        scope = self.function.__globals__
        for name, value in list(scope.items()):
            if value is tl:
                scope[name] = triton.language
            elif isinstance(value, Kernel):
                scope[name] = value.real
        return made


def _on_its_gpu(run: Callable) -> Callable:
    """Launches go to the GPU of the first tensor, which need not be the current one."""
    import torch

    @functools.wraps(run)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if first is None or not first.is_cuda:
            return run(*args, **kwargs)
        with torch.cuda.device_of(first):
            return run(*args, **kwargs)

    return guarded


def jit(function: Callable | None = None, **options: Any) -> Any:
    """``triton.jit`` put off until the first launch; takes its options, e.g. ``do_not_specialize``."""
    if function is None:
        return functools.partial(jit, **options)
    return Kernel(function, options)


def available() -> bool:
    """Whether Triton is installed; it is not imported to find out."""
    return _INSTALLED


def interpreting() -> bool:
    """Whether kernels run on a CPU, by Triton's interpreter."""
    return _INTERPRETS


def require() -> Any:
    """Triton, or an ``ImportError`` that says how to get it."""
    # fused multiply-adds as they are today: Triton 3.10 changes the default, and with it the last bits
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.language")
    except ImportError as error:
        raise ImportError(f"kernels need Triton ({error}): pip install triton") from error
    return triton


def ceil_div(a: int, b: int) -> int:
    """How many blocks of ``b`` cover ``a``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``: what ``tl.arange`` takes."""
    return 1 << max(n - 1, 0).bit_length()
