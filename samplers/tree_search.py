"""Diffusion tree search (2506.20701's DTS*): the sample of highest reward that a budget of network calls can find.

The same tree as ``tree_sample``'s, walked greedily: at a full node the child with the largest

    v + explore s sqrt(log N(parent) / N(child))

(UCT), with v the backed-up reward: the soft value log-mean-exp(scale r)/scale of the paper, or the largest reward
below (``backup="max"``); s is the standard deviation of all rewards so far, so that ``explore`` has no unit. That is
``grow="bounds"``.

``grow="improvement"`` is ours and goes a move at a time. Denoised (Tweedie) rewards predict, by a regression on the
rewards at the leaves so far, what a node's leaves will be worth and how surely; every call goes where its expected
improvement on the best reward, E[max(r - best, 0)] over the calls that a leaf still costs, is largest: to a node that
waits to be gone on from, or to a sibling of one that was. Nodes of bad prospects are never finished. Rewards count by
their ranks, so that the search is the same for every increasing function of the reward, as best-of-n is: one that
saturates, like a log-probability, is told apart near its end as well as far from it.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids
    >>> d = GaussianMixture([1.0], [[0.0, 0.0]], 1.0).denoiser(paths.edm())
    >>> table = ddim(d.path, grids.karras(d.path, 8), eta=1.0)
    >>> tree = tree_search(d, table, lambda x: -(x - 2).square().sum(1), budget=400)
    >>> x, reward = tree.best()
    >>> x.shape, bool(reward > -2.5)                                  # fifty rollouts reach -2.8 on average
    (torch.Size([1, 2]), True)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.rewards import Reward, Space
from .guidance import number
from .table import Table
from .together import Walk
from .tree import ROOT, Tree
from .tree_growth import by_traversals, cost, planted, step_from
from .tree_sample import check_batch, check_share, check_widen

FIRST = 4  # whole rollouts before anything is predicted


def tree_search(
    d: Denoiser,
    noise_or_table: torch.Tensor | Table,
    table_or_reward: Table | Reward | None = None,
    /,
    budget: int = 1000,
    *,
    reward: Reward | None = None,
    grow: Literal["improvement", "bounds"] = "improvement",
    scale: float = 1.0,
    backup: Literal["soft", "max"] = "soft",
    explore: float = 1.0,
    fresh: float = 0.2,
    widen: tuple[float, float] = (1.0, 0.5),
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    levels: int | Sequence[int] | None = None,
    reward_space: Space = "image",
    memory: int | None = None,
    batch: int | None = None,
    rows: int = 64,
    **sample: Any,
) -> Any:
    """A tree grown towards high rewards:  ``tree_search(d, table, reward, budget=2_000)``  -> ``Tree``.

    Or, as any control method is called,  ``tree_search(d, noise, table, reward=..., budget=...)``  -> (x, trees), x
    being the best leaf of a tree for each row of noise.

    Args:
        grow: ``"improvement"``, ours, or ``"bounds"``, the paper's.
        scale, backup: bounds: ``"soft"`` backs up log-mean-exp(scale r)/scale, ``"max"`` the largest reward.
        explore: bounds: the weight of the second term; 0 is greedy.
        fresh: improvement: the share of calls that go to whole rollouts from the root.
        widen: bounds: (C, alpha), a node of N visits may have ceil(C N^alpha) children.
        batch: rollouts at once (16); within a batch visits count before their rewards are known.
        levels, reward_space, memory, rows, sample: as for ``tree_sample``.
    """
    if backup not in ("soft", "max"):
        raise ValueError(f"backup must be 'soft' or 'max', got {backup!r}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale!r}")
    growth: dict[str, Any] = {"method": grow, "batch": check_batch(batch)}
    if grow == "improvement":
        growth["fresh"] = check_share("fresh", fresh)
    if grow == "bounds":
        growth |= {"widen": check_widen(widen), "explore": number("explore", explore), "backup": backup}
    elif grow != "improvement":
        raise ValueError(f"grow must be 'improvement' or 'bounds', got {grow!r}")
    trees = planted(growth, d, noise_or_table, table_or_reward, reward, budget, cond, seed, scale, levels, memory,
                    reward_space, ids, check_batch(rows, "rows"), **sample)  # fmt: skip
    if not isinstance(noise_or_table, torch.Tensor):
        return trees[0]
    return torch.cat([tree.best()[0] for tree in trees]), trees


def by_bounds(tree: Tree, widen: tuple[float, float], batch: int, explore: float, backup: str) -> Walk[None]:
    """The paper's growth, by upper confidence bounds."""
    tree.backup = backup

    def select(tree: Tree, node: int, pending, u: float) -> tuple[int, float]:
        children = tree.children[node]
        spread = float(np.std(tree.rewards)) if len(tree.rewards) > 1 else 1.0
        values = np.array([tree.value[c] for c in children]) / tree.scale
        visits = np.array([tree.visits[c] + pending[c] for c in children])
        total = tree.visits[node] + pending[node]
        bound = values + explore * spread * np.sqrt(np.log(max(total, 1)) / visits)
        return int(bound.argmax()), 1.0

    return by_traversals(tree, select, widen, batch)


def by_improvement(tree: Tree, batch: int, fresh: float) -> Walk[None]:
    """Ours: move by move, always where a call is expected to improve the most on the best reward so far.

    Of a batch at most a quarter starts from one depth, and a share ``fresh`` of the budget goes to whole rollouts from
    the root, so that a prediction that is wrong cannot bind the search to a corner.
    """
    each = cost(tree, ROOT)
    tree.backup = "max"
    while True:
        left = tree.allowed - tree.calls
        first = min(FIRST - tree.whole, left // each)
        if first > 0 or (tree.whole * each < fresh * tree.calls and left >= each):
            first = max(min(first, batch), 1)
            yield from step_from(tree, [ROOT] * first, whole=True)
            tree.whole += first
            continue
        if len(tree.leaves) < 2:
            return
        worth, price = prospects(tree)
        order = np.argsort(-worth, kind="stable")
        chosen, spent = [], 0
        most, used = max(batch // 4, 1), Counter()
        for node in order.tolist():
            if worth[node] > 0 and spent + price[node] <= left and used[tree.depth[node]] < most:
                used[tree.depth[node]] += 1
                chosen.append(node)
                spent += int(price[node])
                if len(chosen) == batch:
                    break
        if not chosen:
            return
        yield from step_from(tree, chosen)


def prospects(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """(nodes,) each: the expected improvement a call by another child of each node, and the calls of that child alone.

    Rewards count by rank among the leaves, guesses by rank among those of their depth, as normal scores. Rewards below
    a node are then normal, with the conjugate prior (normal-inverse-gamma) that its depth gives: the mean is the
    prediction  a + b r(x0_hat),  worth one leaf; the variance half of what that regression leaves open (the other half
    being the prediction's own error), worth two. What hangs below the node does the rest: leaves by their rewards, and
    nodes that nobody went on from by their predictions.
    """
    chain = tree.chain
    parent, depth, guess = np.array(tree.parent), np.array(tree.depth), np.array(tree.guess)
    rewards, leaves = normal_scores(np.array(tree.rewards)), np.array(tree.leaves)
    mean, open_ = np.zeros(len(parent)), np.full(len(parent), rewards.var())
    at = leaves
    for level in range(chain.depth - 1, -1, -1):
        at, here = parent[at], depth == level
        if len(leaves) < 3 or np.isnan(guess[here]).any():
            continue
        guess[here] = normal_scores(guess[here])
        centre = guess[at].mean()
        away = guess[at] - centre
        slope = max((away * rewards).sum() / max((away**2).sum(), 1e-300), 0.0)
        mean[here] = slope * (guess[here] - centre)
        open_[here] = ((rewards - slope * away) ** 2).sum() / (len(leaves) - 2)
    value, doubt = mean.copy(), open_.copy()
    value[leaves], doubt[leaves] = rewards, 0.0
    count, total, squares = np.zeros((3, len(parent)))
    tips = np.array([node for node, children in enumerate(tree.children) if not children])
    at = parent[tips]
    while len(tips):
        np.add.at(count, at, 1.0)
        np.add.at(total, at, value[tips])
        np.add.at(squares, at, value[tips] ** 2 + doubt[tips])
        keep = parent[at] >= 0
        tips, at = tips[keep], parent[at[keep]]
    own = total / np.maximum(count, 1)
    within = np.maximum(squares - count * own**2, 0) + count / (1 + count) * (own - mean) ** 2
    mu = (mean + total) / (1 + count)
    sd = np.sqrt((open_ + within) / (2 + count) * (1 + 1 / (1 + count)))
    whole = [
        chain.opening + sum(chain.calls),
        *(max(sum(chain.calls[k:]) - 1, 1) for k in range(chain.depth)),
    ]
    alone = (
        [chain.opening + 1, *chain.calls[:-1], max(chain.calls[-1] - 1, 1)]
        if chain.depth
        else [chain.opening]
    )
    worth = improvement(mu, sd, rewards.max()) / np.array([*whole, np.inf])[depth + 1]
    return np.where(depth == chain.depth, -1.0, worth), np.array([*alone, 0])[depth + 1]


def normal_scores(values: np.ndarray) -> np.ndarray:
    """The standard normal's quantiles at (rank - 1/2) / n; equals share their middle rank.

    >>> normal_scores(np.array([0.0, 100.0, 0.0, -1e9])).round(4).tolist()
    [0.0, 1.1503, 0.0, -1.1503]
    """
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = (counts.cumsum() - counts / 2) / len(values)
    return torch.special.ndtri(torch.as_tensor(middle)).numpy()[where]


def improvement(mean: np.ndarray, spread: np.ndarray, best: float) -> np.ndarray:
    """E[max(r - best, 0)] for r ~ N(mean, spread^2).

    >>> improvement(np.array([0.0, 1.0]), np.array([1.0, 0.0]), 0.0).round(4).tolist()
    [0.3989, 1.0]
    """
    safe = np.where(spread > 0, spread, 1.0)
    z = (mean - best) / safe
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    below = 0.5 * torch.special.erfc(torch.as_tensor(-z / math.sqrt(2))).numpy()
    return np.where(spread > 0, safe * (density + z * below), np.maximum(mean - best, 0.0))
