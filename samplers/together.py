"""Walks of many groups on one network: generators that ask for moves of their chains, answered in common batches.

A walk is a generator. Where it needs the network or a reward it yields an ``Ask`` and is sent the answer; what it
returns is its result. ``together`` runs many of them: of all that wait, whoever is furthest back is answered first,
in one batch a kind and depth, so that walks down the same chain fall into step by themselves, whatever each of them
does. What a walk is told does not depend on who walks beside it: noise is counted by ids, not by rows.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids, starting_noise
    >>> from fewstep.samplers.chain import groups_of
    >>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
    >>> table = ddim(d.path, grids.karras(d.path, 4), eta=1.0)
    >>> def rollout(chain, ids):
    ...     node = yield start(chain, ids)
    ...     for depth in range(chain.depth):
    ...         seen, _ = yield look(chain, node, depth)
    ...         node = yield move(chain, node, seen, depth, ids)
    ...     return node[0]
    >>> groups = groups_of(d, starting_noise(0, 3, (1,)), table, None, None)
    >>> sizes, inner = [], d.call
    >>> d.call = lambda x, tau: sizes.append(len(x)) or inner(x, tau)
    >>> made = together(rollout(chain, own.some(2)) for chain, own in groups)
    >>> [tuple(x.shape) for x in made], sizes                          # 3 groups of 2, side by side
    ([(2, 1), (2, 1), (2, 1)], [6, 6, 6, 6])
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from .chain import Chain, Node, alongside

Result = TypeVar("Result")
ORDER = {"start": 0, "look": 0, "score": 1, "move": 2}  # at one depth


class Ask(NamedTuple):
    """``act`` of ``whom`` (a chain, or the reward) at ``depth``; ``given`` are the tensors that batches join."""

    act: str
    depth: int
    whom: Any
    given: tuple[Any, ...]

    @property
    def rows(self) -> int:
        """How many samples it is about."""
        first = self.given[0]
        return len(first if isinstance(first, torch.Tensor) else first[0])


Walk = Generator[Ask, Any, Result]


def start(chain: Chain, ids: torch.Tensor) -> Ask:
    """Nodes of depth 0."""
    return Ask("start", -1, chain, (ids,))


def look(chain: Chain, node: Node, depth: int) -> Ask:
    """The network's answers at nodes, and its estimates of x0."""
    return Ask("look", depth, chain, (node,))


def move(chain: Chain, node: Node, seen: Node, depth: int, ids: torch.Tensor) -> Ask:
    """A child of each node."""
    return Ask("move", depth, chain, (node, seen, ids))


def score(reward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, depth: int) -> Ask:
    """The rewards of samples, or of estimates made at a depth."""
    return Ask("score", depth, reward, (x,))


def together(walks: Iterable[Walk[Result]], rows: int = 64) -> list[Result]:
    """Run them all; their results, in order. Asks of different walks share a batch while it holds ``rows`` samples.

    Whatever an answer raises ends them all.
    """
    running = list(walks)
    results: list[Any] = [None] * len(running)
    waiting: dict[int, Ask] = {}

    def go_on(index: int, answer: Any) -> None:
        try:
            waiting[index] = running[index].send(answer)
        except StopIteration as end:
            waiting.pop(index, None)
            results[index] = end.value

    for index in range(len(running)):
        go_on(index, None)
    while waiting:
        first = min(map(_key, waiting.values()))
        now = [index for index, ask in waiting.items() if _key(ask) == first]
        for part in _parts(now, [waiting[index].rows for index in now], rows):
            for index, answer in zip(part, _answers([waiting[index] for index in part])):
                go_on(index, answer)
    return results


def _key(ask: Ask) -> tuple[int, int, str, int]:
    # copies of one chain share their plan
    return ask.depth, ORDER[ask.act], ask.act, id(getattr(ask.whom, "plan", ask.whom))


def _parts(indices: Sequence[int], sizes: Sequence[int], rows: int) -> list[list[int]]:
    parts: list[list[int]] = []
    held = 0
    for index, size in zip(indices, sizes):
        if not parts or held + size > rows:
            parts.append([])
            held = 0
        parts[-1].append(index)
        held += size
    return parts


def _answers(asks: list[Ask]) -> list[Any]:
    act, depth, whom, given = asks[0]
    counts = [ask.rows for ask in asks]
    if len(asks) > 1:
        given = _joined([ask.given for ask in asks])
    if act == "score":
        found = whom(*given)
    else:
        chain = alongside([ask.whom for ask in asks], counts) if len(asks) > 1 else whom
        if act == "start":
            found = chain.start(*given)
        elif act == "look":
            found = chain.look(*given, depth)
        else:
            node, seen, ids = given
            found = chain.move(node, seen, depth, ids)
    return _split(found, counts) if len(asks) > 1 else [found]


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts))
    return tuple(_joined(each) for each in zip(*parts))


def _split(found: Any, counts: Sequence[int]) -> list[Any]:
    if isinstance(found, torch.Tensor):
        return list(found.split(list(counts)))
    if found is None:
        return [None] * len(counts)
    parts = [_split(part, counts) for part in found]
    return [tuple(part[i] for part in parts) for i in range(len(counts))]
