"""A plan's rows as one kernel reads them: what ``apply`` does on a GPU, by ``kernels/solver_step.py``.

The weights of all rows are one float32 table on the device, and a row is read by a counter that stands there too, so
nothing is sent to the device or waited for while a batch is sampled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..kernels import solver_step as kernel
from ..kernels.dispatch import choose, idle
from .noise import seed_on

if TYPE_CHECKING:
    from .loop import State
    from .plan import Plan


class Clip(NamedTuple):
    """x0 clipped to [-limit, limit]: a ``transform`` that the fused step does itself.

    >>> Clip(1.0)(torch.tensor([-3.0, 0.5]))
    tensor([-1.0000,  0.5000])
    """

    limit: float

    def __call__(self, x0: torch.Tensor, t: Any = None) -> torch.Tensor:
        return x0.clamp(-self.limit, self.limit)


class Rows(NamedTuple):
    """All rows of a plan on a device, and which sources each reads: ``masks`` (R, L, 4 or 6), and of all rows
    together."""

    table: torch.Tensor
    slots: torch.Tensor
    counters: torch.Tensor
    masks: np.ndarray
    union: list[int]


def takes(state: State, outputs: tuple[torch.Tensor, ...], z: torch.Tensor | None = None) -> bool:
    """Whether the kernel does this step: by default on a GPU, where no gradient flows and nothing is compiled."""
    if idle(state.x) or torch.compiler.is_compiling():  # who compiles has torch fuse the sums
        return False
    reason = kernel.unsupported(state.x, state.y, state.d, outputs, z)
    return choose("solver_step", None, [state.x], reason) == "triton"


def rows(plan: Plan, device: torch.device, source: str, pair: np.ndarray | None = None) -> Rows:
    """The plan's rows for steps made of the network's "outputs", of an "x0" of ours, or of outputs to "clip" first.

    ``pair`` (R, L, 2, sources): two more sums, whose inner products such a step takes.
    """
    weights = plan.weights(source != "outputs")
    table = np.stack([np.zeros_like(weights.x), *weights], axis=2)  # (R, L, 4, sources)
    if source == "clip":
        p, q = plan.to_x0
        table = np.pad(table, [(0, 0)] * 3 + [(0, q.shape[-1] - 1)])
        where_y_is_x = plan.joined[:-1, None]
        table[:, :, kernel.CONVERT, kernel.X] = np.where(where_y_is_x, p, 0)
        table[:, :, kernel.CONVERT, kernel.Y] = np.where(where_y_is_x, 0, p)
        table[:, :, kernel.CONVERT, table.shape[-1] - q.shape[-1] :] = q
    if pair is not None:
        table = np.concatenate([table, pair], axis=2)
    reads = table != 0
    reads[:, :, kernel.NEW] &= plan.kept[:, None, None]
    # y' of a row that leaves y' = x' is not made; of any other it is, also where it is zero
    reads[:, :, kernel.YS, kernel.X] |= ~reads[:, :, kernel.YS].any(-1)
    one_by_one = reads.copy()
    one_by_one[plan.joined[1:], :, kernel.YS] = False
    if plan.joined.all():
        reads[:, :, kernel.YS] = False
    bits = 1 << np.arange(table.shape[-1])
    return Rows(
        torch.as_tensor(table, dtype=torch.float32).to(device),
        torch.as_tensor(plan.table.slot.copy()).to(device),
        torch.arange(max(table.shape[:2]), device=device),
        (one_by_one * bits).sum(-1),
        (reads.any((0, 1)) * bits).sum(-1).tolist(),
    )


def step(
    plan: Plan,
    state: State,
    row: int | torch.Tensor,
    lane: int | torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    source: str,
    z: torch.Tensor | None = None,
    seed: Any = None,
    clip: Clip | None = None,
) -> State:
    """The state after row ``row`` in lane ``lane``: ints for the whole batch, or tensors with one a sample."""
    return stepped(plan, plan.fused(state.x.device, source), state, row, lane, outputs, z, seed, clip)[0]


def stepped(
    plan: Plan,
    on: Rows,
    state: State,
    row: int | torch.Tensor,
    lane: int | torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    z: torch.Tensor | None = None,
    seed: Any = None,
    clip: Clip | None = None,
) -> tuple[State, torch.Tensor | None]:
    """``step`` by rows that are ``on`` the device; where these hold a pair, with its inner products (B, 3)."""
    device = state.x.device
    if isinstance(row, int) and isinstance(lane, int):
        masks = on.masks[row, lane].tolist()
        slot = int(plan.table.slot[row]) if plan.kept[row] else kernel.NOWHERE
    else:
        masks, slot = on.union, kernel.APART if plan.kept.any() else kernel.NOWHERE
    draws = z is None and masks[kernel.XS] >> kernel.Z & 1 | masks[kernel.YS] >> kernel.Z & 1
    after = kernel.solver_step(
        state.x, state.y, state.d, outputs, on.table, _counter(on, row), _counter(on, lane), masks=masks, slot=slot,
        slots=on.slots, z=z, seed=seed_on(seed, device) if draws else None, ids=state.ids if draws else None,
        limit=None if clip is None else torch.full((1,), clip.limit, device=device),
    )  # fmt: skip
    return state._replace(x=after.x, y=after.y, d=after.history, row=state.row + 1), after.products


def _counter(on: Rows, index: int | torch.Tensor) -> torch.Tensor:
    return on.counters.narrow(0, index, 1) if isinstance(index, int) else index.to(on.counters)
