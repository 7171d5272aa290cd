"""A table in somebody else's loop: who calls the network himself hands each answer to a ``Stepper``.

>>> from fewstep.models import GaussianMixture, paths
>>> from fewstep.samplers import dpmpp, grids, sample, starting_noise
>>> d = GaussianMixture([1.0], [[2.0]], 0.25).denoiser(paths.flow())
>>> table, noise = dpmpp(d.path, grids.uniform(d.path, 4)), starting_noise(0, 3, (1,))
>>> x, stepper = noise, Stepper(table, d.path, "x0")
>>> for t in table.t[:, 0].tolist():
...     x = stepper.step(d(x, t), x)
>>> bool((x - sample(d, noise, table)).abs().max() < 1e-6)
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ..models.denoiser import Denoiser, Predicts
from ..models.paths import Path
from . import fused
from .fused import Clip
from .loop import State, apply, apply_apart
from .noise import STEP, normal
from .plan import Gathered, Plan, X, Y
from .table import Table

HALVES = (torch.float16, torch.bfloat16)
Noise = Any  # an int, a torch.Generator, or a list of them with one a sample
Transform = Callable[[torch.Tensor], torch.Tensor]


class Stepper:
    """Carries the state between calls; the loop outside carries one tensor, the point where the network is called next.

    Everything a step reads is a plain number that is there before the first. The first sample is already at the
    table's first time: its opening row is the business of whoever made it.

    Args:
        predicts: what the network's outputs are on ``path``.
        transform: x0 -> x0, e.g. clipping, at every call.
        ids: of the samples, for noise that is drawn by counter: 0 .. batch - 1 unless given.
        precond, sigma_data: as of a ``Denoiser``.
    """

    def __init__(
        self,
        table: Table,
        path: Path,
        predicts: Predicts = "eps",
        transform: Transform | None = None,
        ids: torch.Tensor | None = None,
        precond: Literal["edm"] | None = None,
        sigma_data: float = 0.5,
    ):
        if table.lanes != 1:
            raise ValueError(f"table must have one lane, got {table.lanes}: pick one with table.lane(index)")
        d = Denoiser(_not_called, path, predicts=predicts, precond=precond, sigma_data=sigma_data)
        plan = table.on(d)
        self._rows = [plan.row(index, 0, transform is not None) for index in range(table.calls)]
        self._joined, self._slots, self._draws = plan.joined.tolist(), table.slots, plan.draws
        self._transform, self.ids = transform, ids
        self._to_x0 = [d.affine(t, "x0") for t in table.t[:, 0].tolist()] if transform else []
        self._compiled = _Compiled(plan, self._to_x0)
        self._state: State | None = None
        self._handed_out: tuple[torch.Tensor, int] | None = None
        self.calls, self.done = table.calls, 0

    def to(self, device: torch.device | str | None) -> Stepper:
        """Where steps that are compiled find their numbers."""
        self._compiled.to(device)
        return self

    def step(self, output: torch.Tensor, sample: torch.Tensor, noise: Noise = 0) -> torch.Tensor:
        """From the network's ``output`` at ``sample`` to where it is to be called next; at the end, the result.

        What the outside made of the sample counts: where the table has y = x, it is both. Half precision is float32
        inside, and a sample that comes back untouched goes on unrounded (unless the step is compiled).
        """
        if self.done >= self.calls:
            raise ValueError(f"all {self.calls} steps are done")
        if output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the shape of sample, {tuple(sample.shape)}, got {tuple(output.shape)}"
            )
        if self._state is not None and sample.shape != self._state.y.shape:
            raise ValueError(
                f"sample must keep its shape between steps, {tuple(self._state.y.shape)}, got {tuple(sample.shape)}"
            )
        compiling = torch.compiler.is_compiling()
        state = (self._compiled_step if compiling else self._step)(output, sample, noise)
        following = state.y.to(sample.dtype)
        self.done += 1
        self._state = state if self.done < self.calls else None  # the end needs no history
        if sample.dtype in HALVES and not compiling and not following.is_inference():  # those have no version
            self._handed_out = following, following._version
        return following

    def _step(self, output: torch.Tensor, sample: torch.Tensor, noise: Noise) -> State:
        row, state, clip = self._rows[self.done], self._taken_in(sample), None
        if isinstance(self._transform, Clip) and fused.takes(state, (output,)):
            clip = self._transform
        elif self._transform is not None:
            p, (q,) = self._to_x0[self.done]
            output = self._transform(p * state.y + q * output.to(state.y.dtype))
        if isinstance(noise, int) or not row.draws:
            return apply(row, state, (output,), None, noise, clip)
        return apply(row, state, (output,), fresh(noise, state), clip=clip)

    def _compiled_step(self, output: torch.Tensor, sample: torch.Tensor, noise: Noise) -> State:
        """The same with weights looked up in tensors: one graph for all rows, where floats would make one a row."""
        given = _at_least_float32(sample)
        old = self._opening(given) if self._state is None else self._state
        row = torch.full_like(old.ids, self.done)
        state = State(old.x, given, old.d, row, old.ids)
        numbers, p, q = self._compiled.row(self.done, given)
        if self._transform is not None:
            output = self._transform(p * given + q * output.to(given.dtype))
        z = fresh(noise, state) if self._draws else None
        return apply_apart(numbers, state, (output,), z, self._compiled.keeps)

    def _opening(self, given: torch.Tensor) -> State:
        ids = torch.arange(len(given), device=given.device) if self.ids is None else self.ids.to(given.device)
        return State(given, given, (None,) * self._slots, 0, ids)

    def _taken_in(self, sample: torch.Tensor) -> State:
        given, state = _at_least_float32(sample), self._state
        if state is None:
            return self._opening(given)
        if sample.dtype in HALVES and self._handed_out is not None:
            handed_out, version = self._handed_out
            if sample is handed_out and handed_out._version == version:
                return state
        return State(given if self._joined[self.done] else state.x, given, state.d, self.done, state.ids)


class _Compiled:
    """A plan's weights in tensors, read by a counter."""

    def __init__(self, plan: Plan, to_x0: list):
        weights = [torch.as_tensor(w[:, 0].copy()) for w in plan.weights(bool(to_x0))]
        joined = torch.as_tensor(plan.joined[:-1])
        for w in weights:  # one tensor stands in both registers, and what came back from outside is in y
            w[joined, Y], w[joined, X] = w[joined, X], 0.0
        self._weights = weights
        self._slot = torch.as_tensor(plan.table.slot.copy())
        scalars = [(p, q) for p, (q,) in to_x0] or [(0.0, 1.0)] * plan.table.calls
        self._to_x0 = torch.as_tensor(scalars, dtype=torch.float64)
        self._one = bool(plan.joined[1:].all())
        self.keeps = bool(plan.kept.any())

    def to(self, device: torch.device | str | None) -> None:
        self._weights = [w.to(device) for w in self._weights]
        self._slot, self._to_x0 = self._slot.to(device), self._to_x0.to(device)

    def row(self, index: int, like: torch.Tensor) -> tuple[Gathered, torch.Tensor, torch.Tensor]:
        new, x, y = (w[index][None].to(like.device, like.dtype) for w in self._weights)
        p, q = self._to_x0[index].to(like.device, like.dtype).unbind()
        slot = self._slot[index][None].to(like.device)
        return Gathered(p, slot, new, x, None if self._one else y), p, q


def _at_least_float32(sample: torch.Tensor) -> torch.Tensor:
    return sample if sample.dtype == torch.float64 else sample.float()


def fresh(noise: Noise, state: State) -> torch.Tensor:
    """Standard normals like the state's x: by counter from a seed, or from one generator, or from one a sample."""
    shape, like = state.x.shape, {"dtype": state.x.dtype}
    if isinstance(noise, int):
        return normal(noise, state.ids, shape[1:], state.row + 1, STEP, state.x.dtype)
    if isinstance(noise, torch.Generator):
        return torch.randn(shape, generator=noise, device=noise.device, **like).to(state.x.device)
    if len(noise) != shape[0]:
        raise ValueError(f"generator must be one or a list of {shape[0]}, one a sample, got {len(noise)}")
    drawn = [torch.randn(shape[1:], generator=g, device=g.device, **like).to(state.x.device) for g in noise]
    return torch.stack(drawn)


def _not_called(*_: Any) -> Any:
    raise RuntimeError("the network is called by the loop outside")
