"""A reverse chain cut into moves: what trees, beams and particles walk on.

A stochastic table makes sampling a Markov chain. Cut at some of its rows it has nodes of depth 0 .. D, depth D being
x0, and D moves between them, each of one or more network calls. A node is a tuple of tensors, batch first: the state,
histories of multistep solvers included. What a move begins with is a network call at the node, ``look``; its answer
may be kept, so that further children of the same node cost one call less.

Every draw has an id of its own, and noise is counted by (seed, id, row): a child of the same node under another id is
another draw from the same kernel, whatever the batch.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids
    >>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
    >>> chain = Diffusion(d, ddim(d.path, grids.karras(d.path, 4), eta=1.0))
    >>> chain.cuts, chain.calls                       # the last row draws no noise: nothing branches before it
    ((0, 1, 2, 4), (1, 1, 2))
    >>> node = chain.start(torch.tensor([0, 1]))
    >>> seen, x0 = chain.look(node, 0)
    >>> [t.shape for t in chain.move(node, seen, 0, torch.tensor([0, 1]))]
    [torch.Size([2, 1])]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..models.denoiser import Denoiser
from .loop import Info, State, apply, init, step
from .noise import STEP, check_ids, normal, starting_noise
from .table import Table

Node = tuple[torch.Tensor, ...]


class Chain(Protocol):
    """What trees ask of a chain; tests walk on discrete ones."""

    depth: int  # of the leaves
    calls: tuple[int, ...]  # network calls of each move
    opening: int  # network calls before depth 0

    def start(self, ids: torch.Tensor) -> Node:
        """A node of depth 0 for each id."""
        ...

    def look(self, node: Node, depth: int) -> tuple[Node, torch.Tensor | None]:
        """The network's answers at nodes of a depth, and its estimates of x0 there."""
        ...

    def move(self, node: Node, seen: Node, depth: int, ids: torch.Tensor) -> Node:
        """A child of each, drawn under its id."""
        ...


def branching_rows(table: Table) -> list[int]:
    """The calls that are followed by fresh noise: before each of them a chain can branch."""
    return [row for row in range(table.calls) if bool((table.c[row + 1] != 0).any())]


def cut(table: Table, levels: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """The rows at which nodes stand, the last being the table's end.

    ``levels``: None for every row that may branch, a number for so many of them spread evenly, or rows.

    >>> from fewstep.models import paths
    >>> from fewstep.samplers import ddpm, grids
    >>> table = ddpm(paths.vp_linear(), grids.uniform(paths.vp_linear(), 9))
    >>> cut(table), cut(table, 3), cut(table, [0, 4])
    ((0, 1, 2, 3, 4, 5, 6, 7, 9), (1, 4, 6, 9), (0, 4, 9))
    """
    rows = branching_rows(table)
    if levels is None:
        chosen = rows
    elif isinstance(levels, int) and not isinstance(levels, bool):
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        count = min(levels, len(rows))
        chosen = [rows[int((i + 0.5) * len(rows) / count)] for i in range(count)]
    else:
        chosen = sorted(set(levels))
        if wrong := [row for row in chosen if row not in rows]:
            raise ValueError(f"levels must be rows that draw noise, of {rows}, got {wrong[0]!r}")
    return (*chosen, table.calls)


def per_sample(cond: Mapping[str, Any], index: torch.Tensor, batch: int) -> dict[str, Any]:
    """The conditions of samples ``index`` of a batch: tensors of one entry a sample are indexed, all else is kept."""

    def picked(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch:
            return value[index.to(value.device)]
        return per_sample(value, index, batch) if isinstance(value, Mapping) else value

    return {key: picked(value) for key, value in cond.items()}


class Ids(NamedTuple):
    """The id of draw 0, 1, ...: ``first``, then every ``stride``-th from ``begin``: groups side by side share none.

    >>> [Ids(3, 10, 4)(number) for number in range(4)]
    [3, 10, 14, 18]
    """

    first: int = 0
    begin: int = 1
    stride: int = 1

    def __call__(self, number: int) -> int:
        return self.first if number == 0 else (self.begin + (number - 1) * self.stride) % 2**32

    def some(self, count: int, begin: int = 0) -> torch.Tensor:
        """The ids of draws begin .. begin + count - 1."""
        return torch.tensor([self(begin + i) for i in range(count)], dtype=torch.long)


def groups_of(
    d: Denoiser, noise: torch.Tensor, table: Table, cond: Mapping[str, Any] | None, ids: torch.Tensor | None,
    **options: Any,
) -> list[tuple[Diffusion, Ids]]:  # fmt: skip
    """A chain for each row of ``noise`` and the ids of its draws: the first is the one that ``sample`` would make."""
    if not isinstance(noise, torch.Tensor) or noise.ndim < 2 or not noise.is_floating_point():
        got = (
            f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, torch.Tensor) else type(noise).__name__
        )
        raise ValueError(f"noise must be standard normals, a floating-point tensor (groups, ...), got {got}")
    count = len(noise)
    ids = torch.arange(count) if ids is None else check_ids(ids, count).cpu()
    top, made = int(ids.max()) + 1 if count else 0, []
    one = Diffusion(d, table, noise=noise[:1], **options)
    for group, first in enumerate(ids.tolist()):
        chain = copy.copy(one)
        chain.cond = per_sample(cond or {}, torch.tensor([group]), count)
        chain.noise, chain.first = noise[group : group + 1], first
        made.append((chain, Ids(first, top + group, count)))
    return made


def alongside(chains: Sequence[Diffusion], counts: Sequence[int]) -> Diffusion:
    """A chain for the rows of several of ``groups_of``, side by side: counts[i] of chains[i]."""
    row = copy.copy(chains[0])
    row.cond, row.rows = repeated([chain.cond for chain in chains], counts), sum(counts)
    noises = [
        chain.noise.expand(n, *row.shape) for chain, n in zip(chains, counts) if chain.noise is not None
    ]
    row.noise = torch.cat(noises) if noises else None
    firsts = torch.tensor([chain.first for chain in chains])
    row.first = firsts.repeat_interleave(torch.tensor(counts)).to(row.device)
    return row


def repeated(conds: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """One condition out of several of one sample each: tensors of one row are repeated counts[i] times and joined, all
    else is the first's.

    >>> repeated([{"label": torch.tensor([3]), "w": 2}, {"label": torch.tensor([5]), "w": 2}], [2, 1])
    {'label': tensor([3, 3, 5]), 'w': 2}
    """

    def joined(values: Sequence[Any]) -> Any:
        one = values[0]
        if isinstance(one, torch.Tensor) and one.ndim and one.shape[0] == 1:
            return torch.cat([value.expand(n, *value.shape[1:]) for value, n in zip(values, counts)])
        return repeated(values, counts) if isinstance(one, Mapping) else one

    return {key: joined([cond[key] for cond in conds]) for key in conds[0]}


class Diffusion:
    """A denoiser under a table, cut at ``levels``, of one group: one condition, one tree.

    Args:
        cond: the group's condition; tensors with one row are repeated for every node.
        shape, dtype, device: of a sample; by default the denoiser's shape, float32, where its network is.
        noise, first: the opening noise (1, ...) of the draw with id ``first``; all others count theirs by (seed, id).
    """

    def __init__(
        self,
        d: Denoiser,
        table: Table,
        cond: Mapping[str, Any] | None = None,
        seed: int = 0,
        levels: int | Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        noise: torch.Tensor | None = None,
        first: int = 0,
    ):
        if not isinstance(d, Denoiser):
            raise TypeError(f"d must be a Denoiser, e.g. load('digits'), got {type(d).__name__}")
        if not isinstance(table, Table):
            raise TypeError(
                f"table must be a Table, e.g. ddim(d.path, times, eta=1.0), got {type(table).__name__}"
            )
        if table.lanes != 1:
            raise ValueError(f"table must have one lane, got {table.lanes}")
        shape = d.shape if shape is None else tuple(shape)
        if noise is not None:
            shape, dtype, device = tuple(noise.shape[1:]), noise.dtype, noise.device
        if shape is None:
            raise ValueError("shape must be given: this denoiser does not say what shape its samples have")
        if device is None:
            leaves = (leaf.net for leaf in d.parts() if leaf.net is not None)
            device = next((p.device for net in leaves for p in net.parameters()), torch.device("cpu"))
        self.d, self.table, self.cond, self.seed = d, table, dict(cond or {}), seed
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self.noise: torch.Tensor | None = noise
        self.first: int | torch.Tensor = first
        self.rows: int | None = None  # of those that stand for several groups, see ``alongside``
        self.plan = table.on(d, self.device)
        self.cuts = cut(table, levels)
        self.depth, self.opening = len(self.cuts) - 1, self.cuts[0]
        self.calls = tuple(int(n) for n in np.diff(self.cuts))
        written = [{int(table.slot[r]) for r in range(at) if self.plan.kept[r]} for at in self.cuts]
        self._history = [tuple(slot in slots for slot in range(table.slots)) for slots in written]

    def start(self, ids: torch.Tensor) -> Node:
        """Opening noise under each id, walked to the first cut."""
        ids = ids.to(self.device)
        noise = starting_noise(self.seed, ids, self.shape, self.dtype)
        if self.noise is not None:
            here = (ids == self.first).reshape(-1, *([1] * len(self.shape)))
            noise = torch.where(here, self.noise, noise)
        state = init(self.table, noise, ids, seed=self.seed)
        return self._packed(self._walked(state, 0, self.cuts[0]), 0)

    @torch.no_grad()
    def look(self, node: Node, depth: int) -> tuple[Node, torch.Tensor]:
        """One network call at each node."""
        state, row = self._state(node, depth), self.plan.row(self.cuts[depth])
        cond = self._cond(len(state.x))
        raw = self.d.raw(state.y, row.t, **cond) if self.plan.affine else (self.d(state.y, row.t, **cond),)
        return tuple(raw), Info(self.cuts[depth], row.t, state.y, raw, self.d).x0

    @torch.no_grad()
    def move(self, node: Node, seen: Node, depth: int, ids: torch.Tensor) -> Node:
        """From depth to depth + 1, the first call being ``seen``."""
        ids = ids.to(self.device)
        state, at = self._state(node, depth)._replace(ids=ids), self.cuts[depth]
        row = self.plan.row(at)
        z = normal(self.seed, ids, self.shape, at + 1, STEP, state.x.dtype) if row.draws else None
        state = self._walked(apply(row, state, seen, z), at + 1, self.cuts[depth + 1])
        return self._packed(state, depth + 1)

    @torch.no_grad()
    def _walked(self, state: State, begin: int, end: int) -> State:
        for _ in range(begin, end):
            cond = self._cond(len(state.x))
            state, _ = step(self.d, self.plan, state, cond=cond, seed=self.seed)
        return state

    def _cond(self, count: int) -> dict[str, Any]:
        return repeated([self.cond], [count]) if self.rows is None else self.cond

    def _packed(self, state: State, depth: int) -> Node:
        """The tensors that the state consists of: which there are is a matter of the depth alone."""
        if depth == self.depth:
            return (state.x,)
        y = () if self.plan.joined[self.cuts[depth]] else (state.y,)
        return (state.x, *y, *(s for s in state.d if s is not None))

    def _state(self, node: Node, depth: int) -> State:
        rest = list(node[1:])
        y = node[0] if self.plan.joined[self.cuts[depth]] else rest.pop(0)
        history = tuple(rest.pop(0) if here else None for here in self._history[depth])
        ids = torch.zeros(len(node[0]), dtype=torch.long, device=node[0].device)
        return State(node[0], y, history, self.cuts[depth], ids)
