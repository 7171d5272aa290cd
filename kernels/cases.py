"""The calls on which an op is tested, compiled ahead of time and timed: every op's file has one list, ``CASES``.

An op's file ``kernels/<op>.py`` offers, by these names: ``reference(**arguments)``, its mathematics in torch;
``launch(**arguments)``, the Triton kernel on CUDA, interpreted or meta tensors; ``CASES``. Where there is something to
say, also ``flops(**arguments)``, and ``RIVALS``: {name: function of the same arguments} to be timed beside it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """One call of an op.

    ``make(device)`` gives its keyword arguments, small ones the same on every device, and shapes alone on "meta".
    ``real``: of the size that models have, for ahead-of-time checks and benchmarks; else small enough to interpret.
    ``tolerance``: the largest error against the reference in float64 that is right, relative to its largest value.
    ``waived``: {what does not hold ahead of time: why}: a target that cannot hold the case, or a check of ``aot`` by
    its name ("spills", "shared", "fp64", "wide").
    """

    name: str
    make: Callable[[torch.device | str], dict[str, Any]]
    real: bool = False
    tolerance: float = 1e-6
    waived: Mapping[str, str] = MappingProxyType({})


def ops() -> dict[str, ModuleType]:
    """Every file of this folder that has ``CASES``, by its name."""
    folder = importlib.import_module(__package__)
    names = sorted(found.name for found in pkgutil.iter_modules(folder.__path__))
    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "CASES")}


def randn(
    *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Standard normals that are the same on every device up to 2^22 of them; on "meta" their shape alone."""
    device = torch.device(device)
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    home = device if math.prod(shape) > 2**22 else torch.device("cpu")  # a CPU takes seconds for a video's
    drawn = torch.randn(shape, generator=torch.Generator(home).manual_seed(seed), device=home)
    return drawn.to(dtype).to(device)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument or a result: of lists, tuples and dicts as well."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors(inner)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def exact(value: Any) -> Any:
    """The same arguments in float64, for ``reference``."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        inner = [exact(v) for v in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    if isinstance(value, dict):
        return {k: exact(v) for k, v in value.items()}
    return value


def error(found: Any, expected: Any) -> float:
    """The largest difference of results, relative to the largest value expected of each tensor.

    >>> error(torch.tensor([2.0, 4.5]), torch.tensor([2.0, 4.0]))
    0.125
    """
    worst = 0.0
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        if one.shape != other.shape:
            raise ValueError(f"results have shapes {tuple(one.shape)} and {tuple(other.shape)}")
        if one.numel():
            one, other = one.detach().cpu().double(), other.detach().cpu().double()
            gap = (one - other).abs().amax() / other.abs().amax().clamp(min=1e-30)
            worst = max(worst, float(torch.nan_to_num(gap, nan=float("inf"))))
    return worst


def traffic(arguments: Any, result: Any) -> int:
    """The bytes that any implementation must move: every tensor read once or written once."""
    found = {id(t): t.numel() * t.element_size() for t in (*tensors(arguments), *tensors(result))}
    return sum(found.values())
