"""The whole loop, network and steps, recorded once as a CUDA graph and replayed: nothing is launched from Python.

What a small network waits for is Python, not the GPU. ``capture`` runs the loop on buffers of its own, and every call
copies noise, conditions, seed and ids there and replays it: other seeds and conditions need no new recording, another
shape does. On a CPU there are no graphs, and the call is ``sample``.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import capture, dpmpp, grids, sample, starting_noise
    >>> d = GaussianMixture([1.0], [[2.0]], 0.25).denoiser(paths.flow())
    >>> table, noise = dpmpp(d.path, grids.uniform(d.path, 4)), starting_noise(0, 3, (1,))
    >>> fast = capture(d, table, (3, 1))
    >>> bool((fast(noise) == sample(d, noise, table)).all())
    True
    >>> print(fast.report())
    4 calls of dpmpp on (3, 1), one by one: there is no CUDA graph on cpu
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.denoiser import Denoiser
from . import fused
from .loop import State, _raise_unless_finite, _total, init, sample, step
from .noise import Seed, seed_on
from .plan import Plan
from .table import Table

Transform = Callable[[torch.Tensor, Any], torch.Tensor]
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")


class Captured:
    """``fast(noise, cond, seed=..., ids=...)``: what ``sample`` answers, with the network and table of the recording.

    The network's parameters are read where they stood: changing them in place counts, replacing them does not.
    """

    def __init__(
        self,
        d: Denoiser,
        plan: Plan,
        shape: tuple[int, ...],
        cond: Mapping[str, Any],
        lane: int | torch.Tensor,
        transform: Transform | None,
        dtype: torch.dtype,
    ):
        self.d, self.plan, self.shape, self.dtype = d, plan, shape, dtype
        self._lane, self._transform = lane, transform
        self._burnt = dict(_leaves(cond))
        self._cond = _copied(cond, plan.device)
        self._places = dict(_leaves(self._cond))
        self._replay: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None
        if _records(plan.device):
            self._seed = torch.zeros(shape[0], dtype=torch.int64, device=plan.device)
            self._state = init(plan, torch.zeros(shape, dtype=dtype, device=plan.device), lane=lane)
            if isinstance(lane, torch.Tensor):
                self._lane_there = lane.to(plan.device)
            self._replay = _record(self._body, plan.device)

    def __call__(
        self,
        noise: torch.Tensor,
        cond: Mapping[str, Any] | None = None,
        *,
        seed: Seed = 0,
        ids: torch.Tensor | None = None,
        check: Literal["end", "off"] = "end",
    ) -> torch.Tensor:
        """Samples like ``noise``; ``check="off"`` leaves out the one wait, for whether all outputs were finite."""
        if check not in ("end", "off"):
            raise ValueError(f"check must be 'end' or 'off', got {check!r}")
        if tuple(noise.shape) != self.shape or noise.dtype != self.dtype:
            raise ValueError(
                f"noise must be {self.dtype} of shape {self.shape}, as captured, got {noise.dtype} of shape "
                f"{tuple(noise.shape)}: capture again for another"
            )
        cond = cond or {}
        given = self._checked(dict(_leaves(cond)))
        if self._replay is None:
            keep: dict[str, Any] = dict(
                cond=cond, seed=seed, ids=ids, lane=self._lane, transform=self._transform
            )
            return sample(self.d, noise, self.plan, **keep, check=check)
        state = init(self.plan, noise.to(self.plan.device), ids, self._lane, seed)
        self._state.x.copy_(state.x)
        if self._state.y is not self._state.x:
            self._state.y.copy_(state.y)
        self._state.ids.copy_(state.ids)
        self._seed.copy_(seed_on(seed, self.plan.device))
        for place, value in given.items():
            if isinstance(value, torch.Tensor):
                self._places[place].copy_(value)
        x, totals = self._replay()
        if check == "end":
            _raise_unless_finite(list(totals.unbind()), self.plan, 0, self._lane)
        return x.clone()

    def report(self) -> str:
        """Where the loop runs, in a line."""
        table = self.plan.table
        what = f"{table.calls} calls of {table.solver} on {self.shape}"
        if self._replay is None:
            return f"{what}, one by one: there is no CUDA graph on {self.plan.device}"
        by = "triton" if fused.takes(self._state, (self._state.x,)) else "torch"
        return f"{what} as one CUDA graph on {self.plan.device}, steps by {by}"

    def _body(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loop on the buffers: the result, and of each call a number that is finite if its outputs are."""
        state: State = self._state
        lane = self._lane if isinstance(self._lane, int) else self._lane_there
        totals = []
        with torch.no_grad():
            for _ in range(self.plan.table.calls):
                state, info = step(
                    self.d,
                    self.plan,
                    state,
                    cond=self._cond,
                    seed=self._seed,
                    lane=lane,
                    transform=self._transform,
                )
                totals.append(_total(info.outputs))
            return state.x, torch.stack(totals)

    def _checked(self, given: dict[tuple, Any]) -> dict[tuple, Any]:
        """The leaves of a call's ``cond``, which must be those that were captured."""
        if given.keys() != self._burnt.keys():
            odd = sorted({_name(place) for place in given.keys() ^ self._burnt.keys()})
            known = ", ".join(_name(place) for place in self._burnt) or "nothing"
            raise ValueError(f"cond must hold {known}, as captured; what differs: {', '.join(odd)}")
        for place, value in given.items():
            captured = self._burnt[place]
            if isinstance(captured, torch.Tensor):
                if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (
                    captured.shape,
                    captured.dtype,
                ):
                    raise ValueError(
                        f"cond[{_name(place)}] must be {captured.dtype} of shape {tuple(captured.shape)}, as captured, "
                        f"got {_told(value)}: capture again for another"
                    )
            elif isinstance(value, torch.Tensor) or value != captured:
                raise ValueError(
                    f"cond[{_name(place)}] must be {captured!r}, which is part of what was captured, got {_told(value)}"
                )
        return given


def capture(
    d: Denoiser,
    table: Table,
    shape: Sequence[int],
    cond: Mapping[str, Any] | None = None,
    *,
    lane: int | torch.Tensor = 0,
    transform: Transform | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Captured:
    """Record the loop for noise of ``shape`` (B, ...), and conditions like ``cond`` (their tensors may change later).

    Args:
        lane, transform: as in ``sample``; a transform must not wait for the device.
        device: by default where the network's parameters are.
        dtype: of the noise: float32 or float64.
    """
    if not isinstance(d, Denoiser):
        raise TypeError(f"d must be a Denoiser, got {type(d).__name__}")
    if not isinstance(table, Table):
        raise TypeError(f"table must be a Table, e.g. abm(d.path, times), got {type(table).__name__}")
    shape = tuple(int(n) for n in shape)
    if len(shape) < 2 or min(shape) < 1 or d.shape is not None and shape[1:] != d.shape:
        wanted = "(batch, ...)" if d.shape is None else f"(batch, {', '.join(map(str, d.shape))})"
        raise ValueError(f"shape must be {wanted}, got {shape}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    if device is None:
        parameters = iter(()) if d.net is None else d.net.parameters()
        found = (t.device for source in (parameters, _tensors(cond)) for t in source)
        device = next(found, torch.device("cpu"))
    return Captured(d, table.on(d, device), shape, cond or {}, lane, transform, dtype)


# --- recording -------------------------------------------------------------------------------------------------------


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


def _record(
    body: Callable[[], tuple], device: torch.device
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that replays what ``body`` launched, and answers the tensors that it wrote."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled, libraries choose theirs, tables are uploaded
            with Watch(device):
                body()
            body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = body()
        except RuntimeError as error:
            raise RuntimeError(
                f"the loop cannot be captured ({str(error).splitlines()[0]}): a network or transform in it waits for "
                "the device, or sends data there from the CPU"
            ) from error

    def replay() -> tuple[torch.Tensor, torch.Tensor]:
        graph.replay()
        return results

    return replay


class Watch(TorchDispatchMode):
    """Ends with a ``RuntimeError`` where an operation waits for ``device`` to know a value or a shape.

    >>> with Watch(torch.device("cpu")): float(torch.ones(3).sum())
    Traceback (most recent call last):
    ...
    RuntimeError: a CUDA graph cannot hold aten::_local_scalar_dense, ...
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = [a for a in _tensors(args) if a.device.type == self.device.type]
        masked = func.name().startswith("aten::index") and any(a.dtype == torch.bool for a in there)
        if there and (masked or func.name().partition(".")[0] in WAITS):
            raise RuntimeError(
                f"a CUDA graph cannot hold {func.name()}, which waits for the device: look above for the network or "
                "transform that calls .item(), float(tensor), if tensor, or indexes with a mask"
            )
        return func(*args, **(kwargs or {}))


# --- conditions ------------------------------------------------------------------------------------------------------


def _leaves(value: Any, place: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(place, value) of everything in nested dicts, lists and tuples."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*place, key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*place, index))
    else:
        yield place, value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for _, leaf in _leaves(value) if isinstance(leaf, torch.Tensor))


def _copied(value: Any, device: torch.device) -> Any:
    """The same nest, its tensors in buffers of their own on ``device``."""
    if isinstance(value, Mapping):
        return {key: _copied(inner, device) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        copied = [_copied(inner, device) for inner in value]
        return tuple(copied) if isinstance(value, tuple) else copied
    return value.detach().to(device, copy=True).contiguous() if isinstance(value, torch.Tensor) else value


def _name(place: tuple) -> str:
    return ".".join(map(str, place))


def _told(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
