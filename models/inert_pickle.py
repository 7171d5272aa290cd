"""Reads a pickle without running what is in it: tensors, arrays and plain data come out, objects come out as records.

A pickle is a program that may name and call any function there is. Here a name is looked up in the table below and
nowhere else, so nothing is imported, and what is called are functions of this file. An object of a class becomes a
``Record`` of its name and state. The persistent objects of the EDM repositories (2206.00364, 2312.02696), which carry
the source code of their module to be executed by the reader, become records too; the source is text that nobody runs.

    >>> import io, pickle
    >>> read(io.BytesIO(pickle.dumps({"steps": 18, "scale": np.float64(0.5)})))
    {'steps': 18, 'scale': 0.5}
    >>> read(io.BytesIO(b"cos\\nsystem\\n(S'echo hello'\\ntR."))
    Traceback (most recent call last):
    ValueError: the pickle asks for os.system, which a file of weights does not need; nothing was called
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


class Record:
    """An object that was not made: the name of its class, and its state as it stands in the pickle.

    >>> Record("SongUNet", {"_init_kwargs": {"img_resolution": 32}})["_init_kwargs"]
    {'img_resolution': 32}
    """

    def __init__(self, name: str, state: dict[str, Any] | None = None):
        self.name, self.state = name, state or {}

    def __getitem__(self, key: str) -> Any:
        return self.state[key]

    def get(self, key: str, default: Any = None) -> Any:
        """An entry of the state."""
        return self.state.get(key, default)

    def __repr__(self) -> str:
        return f"Record({self.name!r}, {sorted(map(str, self.state))})"


def read(file: BinaryIO) -> Any:
    """The content of a pickle; ``ValueError`` where it is broken, or asks for what is not in the table."""
    try:
        return _Reader(file).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        RuntimeError,
    ) as error:
        raise ValueError(f"the pickle cannot be read: {error}") from error


def tensors(module: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters and buffers of a recorded ``torch.nn.Module``, named as its ``state_dict`` would name them.

    >>> leaf = Record("Linear", {"_parameters": {"weight": torch.ones(1), "bias": None}, "_buffers": {}})
    >>> tensors(Record("Net", {"_modules": {"out": leaf}}))
    {'out.weight': tensor([1.])}
    """
    if not isinstance(module, Record):
        raise ValueError(
            f"{prefix or 'the network'} must be a module, the pickle has {type(module).__name__}"
        )
    found = {}
    for group in ("_parameters", "_buffers"):
        for name, value in (module.get(group) or {}).items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
    for name, child in (module.get("_modules") or {}).items():
        if child is not None:
            found |= tensors(child, f"{prefix}{name}.")
    return found


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[f"{module}.{name}"]
        except KeyError:
            raise ValueError(
                f"the pickle asks for {module}.{name}, which a file of weights does not need; nothing was called"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError(f"the pickle asks for {str(pid)[:60]!r} outside of itself, which is not supported")


class _Function:
    """A function that a pickle can call but not change (a function has attributes, which BUILD would set)."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("functions are not changed")

    def __setstate__(self, state: Any) -> None:
        raise AttributeError("functions are not changed")


def _stub(name: str) -> type:
    """A class whose instances are records: what ``cls.__new__(cls)`` and a state make."""

    class Stub(Record):
        def __new__(cls, *args: Any) -> Stub:
            made = super().__new__(cls)
            Record.__init__(made, name)
            return made

        def __init__(self, *args: Any):
            pass

        def __setstate__(self, state: Any) -> None:
            if not isinstance(state, dict):
                raise ValueError(
                    f"the state of a {name} must be a dict, the pickle has {type(state).__name__}"
                )
            self.state = state

    return Stub


def _persistent(meta: Any) -> Record:
    """EDM's objects: {type, version, module_src, class_name, state}."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise ValueError("the pickle has a persistent object without a state")
    return Record(str(meta.get("class_name")), meta["state"])


def _storage(content: bytes) -> Any:
    """A tensor's memory: a pickle within the pickle, which torch reads by its own short list."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError(f"the pickle makes a tensor of a {type(storage).__name__}")
    last = offset + sum(s * (n - 1) for n, s in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= storage._size()):
        raise ValueError(f"the pickle has a tensor {tuple(size)} that does not fit into its memory")
    made = torch.empty((0,), dtype=storage.dtype)
    return made.set_(storage._untyped_storage, offset, tuple(size), tuple(stride))


class _Dtype:
    def __init__(self, kind: str, *_: Any):
        self.kind, self.order = kind, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        if self.kind not in DTYPES or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"the pickle has an array of {self.kind!r}; numbers alone are read")
        return np.dtype(self.order + self.kind)


class _Array(Record):
    """An array while it is read: ``plain`` makes one of it."""

    def __init__(self, *_: Any):
        super().__init__("ndarray")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, columns_first, content = state
        self.state = {"value": _array(content, dtype, shape, "F" if columns_first else "C")}


def _array(content: bytes, dtype: _Dtype, shape: tuple, order: str = "C") -> np.ndarray:
    return np.frombuffer(content, dtype.numpy()).reshape(shape, order=order)


def plain(value: Any) -> Any:
    """An array or a number as numpy or Python has it, anything else as it is."""
    return value["value"] if isinstance(value, _Array) else value


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "dnnlib.util.EasyDict": dict,
    "torch_utils.persistence._reconstruct_persistent_obj": _Function(_persistent),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch._utils._rebuild_parameter": _Function(lambda data, *_: data),
    "torch.storage._load_from_bytes": _Function(_storage),
    "torch.nn.modules.container.ModuleDict": _stub("ModuleDict"),
    "torch.nn.modules.container.ModuleList": _stub("ModuleList"),
    "torch.nn.modules.container.Sequential": _stub("Sequential"),
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Function(lambda *_: None),
}
for _module in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_module}.multiarray._reconstruct"] = _Array
    _KNOWN[f"{_module}.multiarray.scalar"] = _Function(
        lambda dtype, content: np.frombuffer(content, dtype.numpy())[0].item()
    )
    _KNOWN[f"{_module}.numeric._frombuffer"] = _Function(
        lambda content, dtype, shape, order: _array(content, dtype, shape, order)
    )
