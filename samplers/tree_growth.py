"""How trees grow: rollouts from chosen nodes in one batch, and the loops that choose them within a budget of calls.

All of it are walks (``together``), so that trees of several groups share the network's batches. Nothing is written into
a tree before the rewards of a batch are known, so a reward that fails leaves it as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.rewards import Reward, Space, checked
from .chain import Diffusion, groups_of
from .noise import uniform
from .together import Walk, look, move, score, start, together
from .tree import ROOT, Tree

CHOOSE = 6  # the stream of a walk's choices
BLOCK = 256  # walks whose choices are drawn at once
PATIENCE = 1000  # batches of walks that all end at old leaves, before a tree is taken to be complete
SAMPLE, SEARCH = ("shape", "dtype", "device"), ("improvement", "bounds")
Select = Callable[[Tree, int, Counter, float], tuple[int, float]]


def cost(tree: Tree, node: int) -> int:
    """Network calls of a rollout from a node, whose own answer is in store already; counted as one where it is none."""
    chain, depth = tree.chain, tree.depth[node]
    return chain.opening + sum(chain.calls) if depth < 0 else max(sum(chain.calls[depth:]) - 1, 1)


def check_budget(budget: Any) -> int:
    """A positive int; else ``ValueError``."""
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be a positive number of network calls, got {budget!r}")
    return budget


def growing(tree: Tree, budget: int) -> Walk[None]:
    """Spend ``budget`` more calls as ``tree.growth`` says."""
    from .tree_sample import by_populations, by_walks
    from .tree_search import by_bounds, by_improvement

    loops = {
        "populations": by_populations,
        "walks": by_walks,
        "bounds": by_bounds,
        "improvement": by_improvement,
    }
    least, allowed = cost(tree, ROOT), tree.allowed + check_budget(budget)
    if not tree.leaves and allowed < least:
        raise ValueError(f"budget must be at least {least} network calls, one rollout, got {budget}")
    tree.allowed = allowed
    options = {key: value for key, value in tree.growth.items() if key != "method"}
    yield from loops[tree.growth["method"]](tree, **options)


def rollouts(tree: Tree, starts: Sequence[int], ids: Sequence[int], weights: Sequence[float]) -> Walk[None]:
    """From each start node to a new leaf, all in one batch that is joined on the way down."""
    chain, device = tree.chain, getattr(tree.chain, "device", torch.device("cpu"))
    tags = torch.tensor(ids, device=device)
    made: list[tuple[list[int], tuple, int]] = []
    walking = [w for w, at in enumerate(starts) if at == ROOT]
    node = (yield start(chain, tags[walking])) if walking else None
    for depth in range(chain.depth):
        seen: tuple = ()
        if walking:
            seen, _ = yield look(chain, node, depth)
            tree.widths[depth] = len(node)
            made.append((list(walking), (*node, *seen), depth))
        joining = [w for w, at in enumerate(starts) if tree.depth[at] == depth and at != ROOT]
        if joining:
            held = tree.store.get(depth, [tree.slot[starts[w]] for w in joining], device)
            old, answers = held[: tree.widths[depth]], held[tree.widths[depth] :]
            node = tuple(torch.cat(pair) for pair in zip(node, old)) if walking else old
            seen = tuple(torch.cat(pair) for pair in zip(seen, answers)) if walking else answers
            walking = walking + joining
        if walking:
            node = yield move(chain, node, seen, depth, tags[walking])
    rewards = tree.accepted((yield score(tree.score, node[0], chain.depth))).tolist()
    made.append((list(walking), node, chain.depth))
    tree.calls += sum(cost(tree, node) for node in starts)
    at = list(starts)
    for walkers, tensors, depth in made:
        first = tree.store.add(depth, tensors, keep_here=depth < chain.depth)
        for i, w in enumerate(walkers):
            at[w] = tree.add(at[w], depth, first + i)
    for w, reward in sorted(zip(walking, rewards)):
        tree.add_leaf(at[w], reward, tree.scale * reward + weights[w])
        tree.back_up(at[w])


def step_from(tree: Tree, starts: Sequence[int], whole: bool = False) -> Walk[None]:
    """One child of each start node, with the guess that it inspires or, of a leaf, its reward; ``whole`` goes on to
    the leaves."""
    chain, device = tree.chain, getattr(tree.chain, "device", torch.device("cpu"))
    tags = torch.tensor([tree.ids(tree.drawn + i) for i in range(len(starts))], device=device)
    made: list[tuple[list[int], tuple, int, list[float]]] = []
    calls, at = 0, list(starts)
    groups: dict[int, list[int]] = {}
    for w, number in enumerate(starts):
        groups.setdefault(tree.depth[number], []).append(w)
    for depth in sorted(groups):
        walking, node = groups[depth], None
        if depth < 0:
            node = yield start(chain, tags[walking])
            calls += chain.opening * len(walking)
        else:
            held = tree.store.get(depth, [tree.slot[starts[w]] for w in walking], device)
            old, answers = held[: tree.widths[depth]], held[tree.widths[depth] :]
            node = yield move(chain, old, answers, depth, tags[walking])
            calls += (chain.calls[depth] - 1) * len(walking)
        while True:
            depth += 1
            if depth == chain.depth:
                rewards = tree.accepted((yield score(tree.score, node[0], depth)))
                made.append((walking, node, depth, rewards.tolist()))
                break
            seen, x0 = yield look(chain, node, depth)
            calls += len(walking)
            tree.widths[depth] = len(node)
            guess = [float("nan")] * len(walking)
            if x0 is not None:
                guess = tree.accepted((yield score(tree.score, x0, depth))).tolist()
            made.append((walking, (*node, *seen), depth, guess))
            if not whole:
                break
            node = yield move(chain, node, seen, depth, tags[walking])
            calls += (chain.calls[depth] - 1) * len(walking)
    tree.calls += max(calls, 1)
    tree.drawn += len(starts)
    for walking, tensors, depth, rewards in made:
        leaf = depth == chain.depth
        first = tree.store.add(depth, tensors, keep_here=not leaf)
        for i, w in enumerate(walking):
            at[w] = tree.add(at[w], depth, first + i, float("nan") if leaf else rewards[i])
            if leaf:
                tree.add_leaf(at[w], rewards[i])
                tree.back_up(at[w])


def by_traversals(tree: Tree, select: Select, widen: tuple[float, float], batch: int) -> Walk[None]:
    """Walk down by ``select`` to a node that may have one more child, batch after batch, until the budget is spent.

    A node visited N times is full at ceil(C N^alpha) children. Within a batch values are frozen, and visits count.
    """
    idle, first, draws = 0, tree.drawn, _draws(tree, tree.drawn)
    while idle < PATIENCE:
        starts, numbers, logs, calls = [], [], [], 0
        pending: Counter = Counter()  # visits of nodes, and under -1 - node their new children, in this batch
        drawn, over = tree.drawn, False
        while len(starts) < batch and drawn - tree.drawn < 4 * batch:
            if drawn - first >= BLOCK:
                first, draws = drawn, _draws(tree, drawn)
            found = _walk(tree, select, widen, pending, draws[drawn - first])
            if found is None:
                break
            path, log = found
            leaf = tree.depth[path[-1]] == tree.chain.depth
            if not leaf and calls + cost(tree, path[-1]) > tree.allowed - tree.calls:
                over = True
                break
            pending.update(path)
            if leaf:
                drawn += 1
                continue
            pending[-1 - path[-1]] += 1
            calls += cost(tree, path[-1])
            starts.append(path[-1])
            numbers.append(tree.ids(drawn))
            logs.append(log)
            drawn += 1
        if starts:
            yield from rollouts(tree, starts, numbers, logs)
            for node in starts:  # what back_up counts too
                _uncount(tree, pending, node)
        elif over or drawn == tree.drawn:
            return
        for node, visits in pending.items():
            if node >= 0:
                tree.visits[node] += visits
        tree.drawn = drawn
        idle = 0 if starts else idle + 1
        if over:
            return


def _uncount(tree: Tree, pending: Counter, node: int) -> None:
    while node >= 0:
        pending[node] -= 1
        node = tree.parent[node]


def _draws(tree: Tree, first: int) -> np.ndarray:
    numbers = torch.arange(first, first + BLOCK) % 2**32
    return uniform(tree.seed, numbers, tree.chain.depth + 2, stream=CHOOSE).numpy()


def _walk(tree: Tree, select: Select, widen, pending: Counter, draws) -> tuple[list[int], float] | None:
    """The path to where the next rollout begins and the log of  prod 1 / (children p_selected); None: wait."""
    factor, power = widen
    node, path, log = ROOT, [ROOT], 0.0
    while tree.depth[node] < tree.chain.depth:
        count = len(tree.children[node])
        visits = tree.visits[node] + pending[node]
        full = count + pending[-1 - node] >= max(1, int(np.ceil(factor * visits**power)))
        if not full:
            return path, log
        if not count:
            return None
        at, share = select(tree, node, pending, float(draws[tree.depth[node] + 1]))
        log -= np.log(count * share) if share > 0 else 0.0
        node = tree.children[node][at]
        path.append(node)
    return path, log


def planted(
    growth: dict[str, Any], d: Denoiser, noise_or_table: Any, table_or_reward: Any, reward: Reward | None, budget: int,
    cond: Any, seed: int, scale: float, levels: Any, memory: int | None, space: Space, ids: torch.Tensor | None,
    rows: int, **sample: Any,
) -> list[Tree]:  # fmt: skip
    """The trees of ``tree_sample`` and ``tree_search``, grown: one, or one for each row of noise."""
    if not isinstance(d, Denoiser):
        raise TypeError(f"d must be a Denoiser, e.g. load('digits'), got {type(d).__name__}")
    noise = noise_or_table if isinstance(noise_or_table, torch.Tensor) else None
    table = noise_or_table if noise is None else table_or_reward
    if noise is None and table_or_reward is not None:
        if reward is not None:
            raise TypeError("reward was given twice")
        reward = table_or_reward
    if reward is None:
        raise TypeError("reward must be given: a function of samples (B, ...) to (B,)")
    if unknown := [key for key in sample if key not in SAMPLE]:
        raise TypeError(
            f"tree_{'search' if growth['method'] in SEARCH else 'sample'} takes no {unknown[0]!r}"
        )
    judge = checked(reward, d.codec, space)
    check_budget(budget)
    common = dict(seed=seed, levels=levels, **sample)
    if noise is None:
        tree = Tree(Diffusion(d, table, cond, **common), judge, scale, seed, memory)
        tree.growth = growth
        return [tree.grow(budget)]
    trees = []
    for chain, own in groups_of(d, noise, table, cond, ids, **common):
        tree = Tree(chain, judge, scale, seed, memory, own)
        tree.growth = dict(growth)
        trees.append(tree)
    together((growing(tree, budget) for tree in trees), rows)
    return trees
