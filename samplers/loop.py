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

import torch

from ..models.denoiser import Denoiser
from ..models.paths import coefficient
from .noise import STEP, normal
from .plan import Plan, Row, Terms
from .table import Table


class State(NamedTuple):
    """Everything a sample carries between calls, batch first; ``row`` counts calls, one int or one a sample."""

    x: torch.Tensor
    y: torch.Tensor
    d: tuple[torch.Tensor | None, ...]
    row: int | torch.Tensor
    ids: torch.Tensor


class Info(NamedTuple):
    """What one call saw: the point ``y`` it was made at, the network's ``outputs``, and whether they are finite."""

    row: int | torch.Tensor
    t: float | torch.Tensor
    y: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    denoiser: Denoiser
    finite: torch.Tensor

    @property
    def sigma(self) -> float | torch.Tensor:
        """The noise level of the call."""
        return self.denoiser.path.sigma(self.t)

    @property
    def x0(self) -> torch.Tensor:
        """The estimate of x0 at this call, made from the outputs without calling again."""
        scalars = self.denoiser.affine(self.t, "x0")
        if scalars is None:
            return self.outputs[0]
        p, qs = scalars
        answer = self.y * coefficient(p, self.y)
        for q, output in zip(qs, self.outputs, strict=True):
            answer = answer + coefficient(q, self.y) * output.to(self.y.dtype)
        return answer


def init(table: Table | Plan, noise: torch.Tensor, ids: torch.Tensor | None = None, lane: int | torch.Tensor = 0, seed: int = 0) -> State:
    """The opening state from standard normal ``noise`` (B, ...); the state is float32 unless the noise is float64."""
    table = table.table if isinstance(table, Plan) else table
    if not isinstance(noise, torch.Tensor) or not noise.is_floating_point() or noise.ndim < 2:
        got = f"{noise.dtype} of shape {tuple(noise.shape)}" if isinstance(noise, torch.Tensor) else type(noise).__name__
        raise ValueError(f"noise must be a floating-point tensor (batch, ...) of standard normals, got {got}")
    noise = noise if noise.dtype == torch.float64 else noise.float()
    if ids is None:
        ids = torch.arange(noise.shape[0], device=noise.device)
    elif ids.shape != (noise.shape[0],):
        raise ValueError(f"ids must have one entry a sample: shape ({noise.shape[0]},), got {tuple(ids.shape)}")
    a, c = torch.as_tensor(table.a[0].copy()), torch.as_tensor(table.c[0].copy())
    z = normal(seed, ids, noise.shape[1:], 0, STEP, noise.dtype) if (table.c[0] != 0).any() else None
    registers = []
    for out in (0, 1):
        scale, fresh = a[:, out].sum(-1)[lane], c[:, out][lane]
        value = noise * _per_sample(scale, noise)
        registers.append(value if z is None else value + z * _per_sample(fresh, noise))
    x, y = registers
    if (table.a[0][:, 0].sum(-1) == table.a[0][:, 1].sum(-1)).all() and (table.c[0][:, 0] == table.c[0][:, 1]).all():
        y = x
    return State(x, y, (None,) * table.slots, 0, ids)


def _per_sample(value: torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    return float(value) if value.ndim == 0 else coefficient(value.to(like.device), like)


def step(
    d: Denoiser,
    table: Table | Plan,
    state: State,
    *,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    lane: int | torch.Tensor = 0,
    transform: Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor] | None = None,
    z: torch.Tensor | None = None,
) -> tuple[State, Info]:
    """One network call and the row that follows it.

    ``state.row`` and ``lane`` are ints, or tensors with one entry a sample. ``transform(x0, t)`` clips or otherwise
    changes the estimate of x0 before it is stored. ``z`` replaces the row's own noise.
    """
    plan = table if isinstance(table, Plan) else table.on(d, state.x.device)
    if isinstance(state.row, int) and isinstance(lane, int):
        if not 0 <= state.row < plan.table.calls:
            raise ValueError(f"the table has {plan.table.calls} calls and state.row is {state.row}: sampling is over, init() begins anew")
        return _step_together(d, plan, state, dict(cond or {}), seed, lane, transform, z)
    return _step_apart(d, plan, state, dict(cond or {}), seed, lane, transform, z)


def _combine(x: torch.Tensor, y: torch.Tensor, d: tuple, z: torch.Tensor | None, terms: Terms) -> torch.Tensor:
    """a_x x + a_y y + sum b_j d_j + c z, as few axpys as there are coefficients."""
    a_x, a_y, history, c = terms
    pairs: list[tuple[Any, float]] = []
    if a_x:
        pairs.append((x, a_x))
    if a_y:
        pairs.append((y, a_y))
    pairs += [(d[slot], b) for slot, b in history]
    if c:
        pairs.append((z, c))
    if not pairs:
        return torch.zeros_like(x)
    out = torch.mul(*pairs[0])
    for tensor, factor in pairs[1:]:
        out.add_(tensor, alpha=factor)
    return out


def _stored(row: Row, y: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """form = P y + sum Q_i F_i in the state's precision."""
    if row.p == 0.0 and len(outputs) == 1 and row.q[0] == 1.0:
        return outputs[0].to(y.dtype)
    out = torch.mul(outputs[0].to(y.dtype), row.q[0])
    for output, q in zip(outputs[1:], row.q[1:], strict=True):
        out.add_(output, alpha=q)
    return out.add_(y, alpha=row.p) if row.p else out


def _outputs(d: Denoiser, plan: Plan, y: torch.Tensor, t: float | torch.Tensor, cond: dict, transform) -> tuple[torch.Tensor, ...]:
    if plan.affine and transform is None:
        outputs = d.raw(y, t, **cond)
    else:
        x0 = d(y, t, **cond)
        outputs = (x0 if transform is None else transform(x0, t),)
    for output in outputs:
        if output.shape != y.shape:
            raise ValueError(f"the network answered shape {tuple(output.shape)} to an input of shape {tuple(y.shape)}")
    return outputs


def _finite(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A 0-d bool on the device: nobody waits for it here."""
    total = outputs[0].detach().sum(dtype=torch.float32)
    for output in outputs[1:]:
        total = total + output.detach().sum(dtype=torch.float32)
    return torch.isfinite(total)


def _step_together(d: Denoiser, plan: Plan, state: State, cond: dict, seed: int, lane: int, transform, z) -> tuple[State, Info]:
    index = int(state.row)
    row = plan.row(index, lane, from_x0=transform is not None)
    outputs = _outputs(d, plan, state.y, row.t, cond, transform)
    history = list(state.d)
    history[row.slot] = _stored(row, state.y, outputs)
    if z is None and (row.x[3] or (row.y is not None and row.y[3])):
        z = normal(seed, state.ids, state.x.shape[1:], index + 1, STEP, state.x.dtype)
    stored = tuple(history)
    x = _combine(state.x, state.y, stored, z, row.x)
    y = x if row.y is None else _combine(state.x, state.y, stored, z, row.y)
    info = Info(index, row.t, state.y, outputs, d, _finite(outputs))
    return State(x, y, stored, index + 1, state.ids), info


def _step_apart(d: Denoiser, plan: Plan, state: State, cond: dict, seed: int, lane, transform, z) -> tuple[State, Info]:
    """Samples at rows (and lanes) of their own: coefficients are gathered, slots are chosen by mask."""
    batch, device, dtype = state.x.shape[0], state.x.device, state.x.dtype
    index = torch.as_tensor(state.row, device=device).expand(batch)
    lanes = torch.as_tensor(lane, device=device).expand(batch)
    g = plan.gather(index, lanes, dtype, from_x0=transform is not None)
    outputs = _outputs(d, plan, state.y, g.t, cond, transform)
    new = coefficient(g.p, state.y) * state.y
    for q, output in zip(g.q, outputs, strict=True):
        new = new + coefficient(q, state.y) * output.to(dtype)
    history = []
    for slot, old in enumerate(state.d):
        here = (g.slot == slot).reshape(-1, *(1,) * (state.x.ndim - 1))
        history.append(torch.where(here, new, torch.zeros_like(new) if old is None else old))
    if z is None and plan.table.stochastic:
        z = normal(seed, state.ids, state.x.shape[1:], index + 1, STEP, dtype)
    registers = []
    for out in (0, 1):
        value = coefficient(g.a[:, out, 0], new) * state.x + coefficient(g.a[:, out, 1], new) * state.y
        for slot, stored in enumerate(history):
            value = value + coefficient(g.b[:, out, slot], new) * stored
        registers.append(value if z is None else value + coefficient(g.c[:, out], new) * z)
    info = Info(index, g.t, state.y, outputs, d, _finite(outputs))
    return State(registers[0], registers[1], tuple(history), index + 1, state.ids), info


def take(state: State, index: torch.Tensor, ids: torch.Tensor | None = None) -> State:
    """The samples at ``index``, history and all; clones want fresh ``ids``, or they will draw the same noise."""
    row = state.row if isinstance(state.row, int) else state.row[index]
    x = state.x[index]
    y = x if state.y is state.x else state.y[index]
    return State(x, y, tuple(None if s is None else s[index] for s in state.d), row, state.ids[index] if ids is None else ids)


def sample(
    d: Denoiser,
    noise: torch.Tensor,
    table: Table | Plan,
    *,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
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
        transform: ``f(x0, t) -> x0``, e.g. clipping, at every call.
        callback: gets an ``Info`` after every call (row, t, sigma, y, x0, outputs).
        grad: through which calls gradients flow.
        check: when a non-finite network output is reported: at the end (one wait on a GPU), at once, or never.
    """
    if grad not in ("none", "last", "all"):
        raise ValueError(f"grad must be 'none', 'last' or 'all', got {grad!r}")
    if check not in ("end", "each", "off"):
        raise ValueError(f"check must be 'end', 'each' or 'off', got {check!r}")
    if d.shape is not None and isinstance(noise, torch.Tensor) and tuple(noise.shape[1:]) != d.shape:
        raise ValueError(f"noise must have shape (batch, {', '.join(map(str, d.shape))}) for this model, got {tuple(noise.shape)}")
    plan = table if isinstance(table, Plan) else table.on(d, noise.device if isinstance(noise, torch.Tensor) else "cpu")
    state = init(plan, noise, ids, lane, seed)
    calls = plan.table.calls
    finite = []
    for index in _bar(calls, progress):
        with torch.set_grad_enabled(grad == "all" or (grad == "last" and index == calls - 1)):
            state, info = step(d, plan, state, cond=cond, seed=seed, lane=lane, transform=transform)
        if check == "each":
            _raise_unless_finite([info.finite], plan, index)
        elif check == "end":
            finite.append(info.finite)
        if callback is not None:
            callback(info)
    if finite:
        _raise_unless_finite(finite, plan, 0)
    return state.x


def _bar(calls: int, progress: bool):
    if not progress:
        return range(calls)
    from tqdm.auto import tqdm

    return tqdm(range(calls), desc="sampling", unit="call")


def _raise_unless_finite(finite: list[torch.Tensor], plan: Plan, first: int) -> None:
    flags = torch.stack(finite)
    if bool(flags.all()):
        return
    row = first + int((~flags).float().argmax())
    t, sigma = plan.table.t[row, 0], plan.table.sigma[row, 0]
    raise ValueError(f"the network's output is not finite at step {row} of {plan.table.calls}, t = {t:g}, sigma = {sigma:g}")
