"""The one loop: ``sample`` folds ``step`` over a table's rows, starting from what ``init`` makes of unit noise.

>>> import torch
>>> from fewstep.models import GaussianMixture, paths
>>> from fewstep.samplers import ddim, grids, sample, starting_noise
>>> d = GaussianMixture([1.0], [[2.0, 0.0]], [1e-12]).denoiser(paths.flow())      # all data at one point
>>> x = sample(d, starting_noise(0, 3, (2,)), ddim(d.path, grids.uniform(d.path, 5)))
>>> bool((x - torch.tensor([2.0, 0.0])).abs().max() < 1e-5)
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.paths import coefficient
from . import fused
from .fused import Clip
from .noise import STEP, Seed, check_ids, normal
from .plan import HISTORY, Gathered, Plan, Row, Terms, X, joined
from .table import Table


class State(NamedTuple):
    """Everything a sample carries between calls, batch first; ``row`` counts calls, one int or one a sample.

    Where the table has y = x both are one tensor: who changes it between two steps replaces both.
    """

    x: torch.Tensor
    y: torch.Tensor
    d: tuple[torch.Tensor | None, ...]
    row: int | torch.Tensor
    ids: torch.Tensor


class Info(NamedTuple):
    """What one call saw: the point ``y``, the network's ``outputs`` there, and x0 where a transform changed it."""

    row: int | torch.Tensor
    t: float | torch.Tensor
    y: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    denoiser: Denoiser
    transformed: torch.Tensor | None = None
    clip: Clip | None = None

    @property
    def sigma(self) -> float | torch.Tensor:
        """The noise level of the call."""
        return self.denoiser.path.sigma(self.t)

    @property
    def x0(self) -> torch.Tensor:
        """The estimate of x0 at this call, transformed if it was, made from the outputs without calling again."""
        if self.transformed is not None:
            return self.transformed
        scalars = self.denoiser.affine(self.t, "x0")
        if scalars is None:
            return self.outputs[0]
        p, qs = scalars
        answer = self.y * coefficient(p, self.y)
        for q, output in zip(qs, self.outputs, strict=True):
            answer = answer + coefficient(q, self.y) * output.to(self.y.dtype)
        return answer if self.clip is None else self.clip(answer)

    @property
    def finite(self) -> torch.Tensor:
        """Whether all outputs are finite: a 0-d bool on the device, which nobody waits for here."""
        return torch.isfinite(_total(self.outputs))


def init(
    table: Table | Plan,
    noise: torch.Tensor,
    ids: torch.Tensor | None = None,
    lane: int | torch.Tensor = 0,
    seed: Seed = 0,
) -> State:
    """The opening state from standard normal ``noise`` (B, ...); the state is float32 unless the noise is float64."""
    table = table.table if isinstance(table, Plan) else table
    if not isinstance(table, Table):
        raise TypeError(
            f"table must be a Table or a Plan, e.g. ddim(d.path, times), got {type(table).__name__}"
        )
    if not isinstance(noise, torch.Tensor) or not noise.is_floating_point() or noise.ndim < 2:
        got = (
            f"{noise.dtype} of shape {tuple(noise.shape)}"
            if isinstance(noise, torch.Tensor)
            else type(noise).__name__
        )
        raise ValueError(f"noise must be a floating-point tensor (batch, ...) of standard normals, got {got}")
    noise = noise if noise.dtype == torch.float64 else noise.float()
    batch, device = noise.shape[0], noise.device
    ids = torch.arange(batch, device=device) if ids is None else check_ids(ids, batch).to(device)
    lane = _check_lane(lane, table.lanes, batch)
    a, c = table.a[0].sum(-1), table.c[0]  # both registers hold the noise
    z = normal(seed, ids, noise.shape[1:], 0, STEP, noise.dtype) if c.any() else None
    registers = []
    for out in (0,) if joined(table)[0] else (0, 1):
        value = noise * _per_sample(a[:, out], lane, noise)
        registers.append(value if z is None else value + z * _per_sample(c[:, out], lane, noise))
    return State(registers[0], registers[-1], (None,) * table.slots, 0, ids)


def _per_sample(values: np.ndarray, lane: int | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    if isinstance(lane, int):
        return float(values[lane])
    return coefficient(torch.as_tensor(values.copy())[lane].to(like.device), like)


def _check_lane(lane: int | torch.Tensor, lanes: int, batch: int) -> int | torch.Tensor:
    """An int or one a sample, on the CPU; else ``ValueError``."""
    if isinstance(lane, torch.Tensor):
        if lane.shape != (batch,) or lane.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"lane must be an int or integers of shape ({batch},), got {lane.dtype} of shape {tuple(lane.shape)}"
            )
        lane = lane.cpu()
        if batch and not 0 <= int(lane.min()) <= int(lane.max()) < lanes:
            raise ValueError(f"lane must lie in 0 .. {lanes - 1}, got {lane.tolist()}")
        return lane
    if isinstance(lane, bool) or not isinstance(lane, int) or not 0 <= lane < lanes:
        raise ValueError(f"lane must be an int in 0 .. {lanes - 1}, or one a sample, got {lane!r}")
    return lane


def step(
    d: Denoiser,
    table: Table | Plan,
    state: State,
    *,
    cond: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    lane: int | torch.Tensor = 0,
    transform: Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor] | None = None,
    z: torch.Tensor | None = None,
) -> tuple[State, Info]:
    """One network call and the row that follows it.

    ``state.row`` and ``lane`` are ints, or tensors with one entry a sample. ``transform(x0, t)`` clips or otherwise
    changes the estimate of x0 before it is stored. ``z`` replaces the row's own noise. Given a ``Table`` the plan is
    made anew in every call: who steps by hand makes it once, ``plan = table.on(d, device)``.
    """
    plan = table if isinstance(table, Plan) else table.on(d, state.x.device)
    if isinstance(state.row, int) and isinstance(lane, int):
        if not 0 <= state.row < plan.table.calls:
            raise ValueError(
                f"the table has {plan.table.calls} calls and state.row is {state.row}: "
                "sampling is over, init() begins anew"
            )
        return _step_together(d, plan, state, cond or {}, seed, lane, transform, z)
    return _step_apart(d, plan, state, cond or {}, seed, lane, transform, z)


def _call(
    d: Denoiser, plan: Plan, state: State, row, t, cond: Mapping, transform
) -> tuple[Info, tuple[torch.Tensor, ...]]:
    """The network's answer, and what the row is made of: its outputs (``info.clip``: yet to be clipped), or our x0."""
    outputs = d.raw(state.y, t, **cond) if plan.affine else (d(state.y, t, **cond),)
    for output in outputs:
        if output.shape != state.y.shape:
            raise ValueError(
                f"the network answered shape {tuple(output.shape)} to an input of shape {tuple(state.y.shape)}"
            )
    info = Info(row, t, state.y, outputs, d)
    if transform is None:
        return info, outputs
    if isinstance(transform, Clip) and plan.affine and fused.takes(state, outputs):
        return info._replace(clip=transform), outputs
    x0 = transform(info.x0, t)
    if x0.shape != state.y.shape:
        raise ValueError(
            f"transform answered shape {tuple(x0.shape)} to an x0 of shape {tuple(state.y.shape)}"
        )
    return info._replace(transformed=x0), (x0,)


def _step_together(
    d: Denoiser, plan: Plan, state: State, cond: Mapping, seed: Seed, lane: int, transform, z
) -> tuple[State, Info]:
    row = plan.row(state.row, lane, transform is not None)
    info, outputs = _call(d, plan, state, state.row, row.t, cond, transform)
    return apply(row, state, outputs, z, seed, info.clip), info


def apply(
    row: Row,
    state: State,
    outputs: tuple[torch.Tensor, ...],
    z: torch.Tensor | None = None,
    seed: Seed = 0,
    clip: Clip | None = None,
) -> State:
    """What follows a network call that gave ``outputs``: for whoever called the network himself.

    ``row`` is ``plan.row(state.row)``; ``z`` is the row's fresh noise where ``row.draws``, else drawn from ``seed``.
    ``clip``, where ``fused.takes`` the step: the row is one ``from_x0``, and the outputs' x0 is clipped first.
    """
    if fused.takes(state, outputs, z):
        source = "clip" if clip else row.source
        return fused.step(row.plan, state, row.index, row.lane, outputs, source, z, seed, clip)
    if z is None and row.draws:
        z = normal(seed, state.ids, state.x.shape[1:], state.row + 1, STEP, state.x.dtype)
    history = state.d
    sources = [state.x, state.y, z, *history, *outputs]
    if row.slot is not None:
        sources[HISTORY + row.slot] = _combine(sources, row.new)
        history = tuple(sources[HISTORY : HISTORY + len(history)])
    x = _combine(sources, row.x)
    y = x if row.y is None else _combine(sources, row.y)
    return State(x, y, history, state.row + 1, state.ids)


def _combine(sources: list, terms: Terms) -> torch.Tensor:
    """The weighted sum in the state's precision: one multiplication, then an axpy a term."""
    like = sources[X]
    if not terms:
        return torch.zeros_like(like)
    source, weight = terms[0]
    out = sources[source]
    if out.dtype != like.dtype:
        out = out.to(like.dtype)
    if len(terms) == 1 and weight == 1.0:
        return out
    out = torch.mul(out, weight)
    for source, weight in terms[1:]:
        out.add_(sources[source], alpha=weight)
    return out


def _step_apart(
    d: Denoiser, plan: Plan, state: State, cond: Mapping, seed: Seed, lane, transform, z
) -> tuple[State, Info]:
    """Samples at rows (and lanes) of their own: the same sums in the same order, every weight one a sample."""
    batch, device, dtype = state.x.shape[0], state.x.device, state.x.dtype
    index, lane = (torch.as_tensor(v, device=device).expand(batch) for v in (state.row, lane))
    info, outputs = _call(d, plan, state, index, plan.times(index, lane), cond, transform)
    if fused.takes(state, outputs, z):
        source = "clip" if info.clip else "outputs" if transform is None else "x0"
        state = state._replace(row=index)
        return fused.step(plan, state, index, lane, outputs, source, z, seed, info.clip), info
    row = plan.gather(index, lane, dtype, transform is not None)
    if z is None and plan.draws:
        z = normal(seed, state.ids, state.x.shape[1:], index + 1, STEP, dtype)
    return apply_apart(row, state._replace(row=index), outputs, z, bool(plan.kept.any())), info


def apply_apart(
    row: Gathered,
    state: State,
    outputs: tuple[torch.Tensor, ...],
    z: torch.Tensor | None = None,
    keeps: bool = True,
) -> State:
    """``apply`` with weights in tensors, one set a sample or one for all; ``keeps``: whether history is read at all."""
    sources = [state.x, state.y, z, *state.d, *outputs]
    if keeps:
        new = _combine_apart(sources, row.new)
        for slot, old in enumerate(state.d):
            here = coefficient(row.slot == slot, new).bool()
            sources[HISTORY + slot] = torch.where(here, new, torch.zeros_like(new) if old is None else old)
    x = _combine_apart(sources, row.x)
    y = x if row.y is None else _combine_apart(sources, row.y)
    return State(x, y, tuple(sources[HISTORY : HISTORY + len(state.d)]), state.row + 1, state.ids)


def _combine_apart(sources: list, weights: torch.Tensor) -> torch.Tensor:
    """The sum with weights (B, sources). ``addcmul`` rounds as an axpy does: the bits are those of ``_combine``."""
    like, out = sources[X], None
    for source, weight in zip(sources, weights.unbind(1), strict=True):
        if source is not None:
            source, weight = source.to(like.dtype), coefficient(weight, like)
            out = source * weight if out is None else torch.addcmul(out, source, weight)
    return out


def _total(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum of all elements, 0-d: finite if and only if they are."""
    total = outputs[0].detach().sum(dtype=None if outputs[0].dtype == torch.float64 else torch.float32)
    for output in outputs[1:]:
        total = total + output.detach().sum(dtype=total.dtype)
    return total


def take(state: State, index: torch.Tensor, ids: torch.Tensor | None = None) -> State:
    """The samples at ``index``, history and all; clones want fresh ``ids``, or they will draw the same noise."""
    row = state.row if isinstance(state.row, int) else state.row[index]
    x = state.x[index]
    y = x if state.y is state.x else state.y[index]
    ids = state.ids[index] if ids is None else check_ids(ids, x.shape[0]).to(x.device)
    return State(x, y, tuple(None if s is None else s[index] for s in state.d), row, ids)


def sample(
    d: Denoiser,
    noise: torch.Tensor,
    table: Table | Plan,
    *,
    cond: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    ids: torch.Tensor | None = None,
    lane: int | torch.Tensor = 0,
    transform: Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor] | None = None,
    callback: Callable[[Info], None] | None = None,
    progress: bool = False,
    grad: Literal["none", "last", "all"] = "none",
    check: Literal["end", "each", "off"] = "end",
) -> torch.Tensor:
    """Samples (B, ...) from standard normal ``noise`` (B, ...), by the table's solver.

    Args:
        cond: keyword arguments of the network, e.g. ``{"label": labels}``.
        seed, ids: key the noise of stochastic rows; ids are 0 .. B - 1 unless given, so a batch may be split freely.
        lane: which lane of the table, one for all or one a sample.
        transform: ``f(x0, t) -> x0`` at every call, e.g. ``Clip(1.0)``, which a GPU does in the step itself.
        callback: gets an ``Info`` after every call (row, t, sigma, y, x0, outputs).
        grad: through which calls gradients flow.
        check: when a non-finite network output is reported: at the end (one wait on a GPU), at once, or never.
    """
    if not isinstance(d, Denoiser):
        raise TypeError(
            f"d must be a Denoiser, e.g. load('digits') or Denoiser(call, path), got {type(d).__name__}"
        )
    if grad not in ("none", "last", "all"):
        raise ValueError(f"grad must be 'none', 'last' or 'all', got {grad!r}")
    if check not in ("end", "each", "off"):
        raise ValueError(f"check must be 'end', 'each' or 'off', got {check!r}")
    if d.shape is not None and isinstance(noise, torch.Tensor) and tuple(noise.shape[1:]) != d.shape:
        raise ValueError(
            f"noise must have shape (batch, {', '.join(map(str, d.shape))}) for this model, got {tuple(noise.shape)}"
        )
    with torch.set_grad_enabled(grad == "all"):
        state = init(table, noise, ids, lane, seed)
    plan = table if isinstance(table, Plan) else table.on(d, noise.device)
    calls = plan.table.calls
    totals = []
    for index in _bar(calls, progress):
        with torch.set_grad_enabled(grad == "all" or (grad == "last" and index == calls - 1)):
            state, info = step(d, plan, state, cond=cond, seed=seed, lane=lane, transform=transform)
        if check == "each":
            _raise_unless_finite([_total(info.outputs)], plan, index, lane)
        elif check == "end":
            totals.append(_total(info.outputs))
        if callback is not None:
            callback(info)
    if totals:
        _raise_unless_finite(totals, plan, 0, lane)
    return state.x


def _bar(calls: int, progress: bool):
    if not progress:
        return range(calls)
    from tqdm.auto import tqdm

    return tqdm(range(calls), desc="sampling", unit="call")


def _raise_unless_finite(
    totals: list[torch.Tensor], plan: Plan, first: int, lane: int | torch.Tensor
) -> None:
    finite = torch.isfinite(torch.stack(totals))
    if bool(finite.all()):
        return
    row = first + int((~finite).float().argmax())
    lane = lane if isinstance(lane, int) else int(lane[0])
    t, sigma = plan.table.t[row, lane], plan.table.sigma[row, lane]
    raise ValueError(
        f"the network's output is not finite at step {row} of {plan.table.calls}, t = {t:g}, sigma = {sigma:g}"
    )
