"""A picture of a tree: depth downward, leaves in the order of a walk, colour by value, and how rewards came in."""

from __future__ import annotations

import os

import numpy as np

from .tree import ROOT, Tree


def places(tree: Tree) -> np.ndarray:
    """(nodes,) where each stands from left to right: ends one apart in the order of a walk, parents above their middle.

    >>> from fewstep.samplers.tree import tree_of_rewards
    >>> places(tree_of_rewards([[0.0, 1.0], [2.0]])).tolist()
    [1.25, 0.5, 0.0, 1.0, 2.0, 2.0]
    """
    place = np.zeros(len(tree))
    ends, stack = 0, [(ROOT, False)]
    while stack:
        node, done = stack.pop()
        children = tree.children[node]
        if not children:
            place[node] = ends
            ends += 1
        elif done:
            place[node] = np.mean([place[c] for c in children])
        else:
            stack.append((node, True))
            # who is worth more stands further right
            order = sorted(
                children, key=lambda c: (np.nan_to_num(tree.value[c], nan=-np.inf), c), reverse=True
            )
            stack += [(child, False) for child in order]
    return place


def plot(tree: Tree, file: str | os.PathLike | None = None):
    """A matplotlib figure, written to ``file`` if given."""
    try:
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install matplotlib") from error
    tree._check_grown()
    place, depth = places(tree), np.array(tree.depth, dtype=float)
    value, parent = np.array(tree.value), np.array(tree.parent)
    visits = np.maximum(np.array(tree.visits), 1)
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": [3, 1]})
    child = np.arange(1, len(tree))
    where = np.stack([place, depth], -1)
    lines = np.stack([where[parent[child]], where[child]], 1)
    known = ~np.isnan(value)
    low, high = np.percentile(value[known], [5, 100])
    shown = np.where(known, value, low)
    edges = LineCollection(
        lines, cmap="viridis", linewidths=0.3 + 1.5 * np.sqrt(visits[child] / visits[ROOT])
    )
    edges.set_array(shown[child])
    edges.set_clim(low, high)
    above.add_collection(edges)
    leaves = np.array(tree.leaves)
    above.scatter(
        place[leaves], depth[leaves], s=8, c=shown[leaves], cmap="viridis", vmin=low, vmax=high, zorder=2
    )
    best = leaves[int(np.argmax(tree.rewards))]
    above.plot(place[best], depth[best], marker="*", color="crimson", markersize=12, zorder=3)
    trail = [best]
    while tree.parent[trail[-1]] >= 0:
        trail.append(tree.parent[trail[-1]])
    above.plot(place[trail], depth[trail], color="crimson", linewidth=0.8, zorder=2)
    above.set_ylim(tree.chain.depth + 0.4, -1.4)
    above.margins(x=0.02)
    above.set_xticks([])
    above.set_ylabel("depth (noise above, x0 below)")
    above.set_title(f"{len(tree.leaves)} leaves, {len(tree)} nodes, {tree.calls} network calls; best reward "
                    f"{max(tree.rewards):.4g}")  # fmt: skip
    figure.colorbar(edges, ax=above, label="value, nats" if tree.backup == "soft" else "best below, nats")
    below.plot(tree.rewards, ".", markersize=2, color="0.6", label="rewards of leaves")
    below.plot(np.maximum.accumulate(tree.rewards), color="crimson", linewidth=1, label="best so far")
    below.set_xlabel("leaf, in order of birth")
    below.legend(loc="best", fontsize=8, ncols=2)
    if file is not None:
        figure.savefig(file, dpi=110)
    return figure
