"""Trees in files: one safetensors with the arrays and the latents, and a JSON document in its metadata.

>>> import os, tempfile
>>> from fewstep.models import GaussianMixture, paths
>>> from fewstep.samplers import ddim, grids
>>> from fewstep.samplers.chain import Diffusion
>>> from fewstep.samplers.tree import Tree
>>> from fewstep.samplers.tree_sample import tree_sample
>>> d = GaussianMixture([1.0], [[0.0]], 1.0).denoiser(paths.edm())
>>> table, reward = ddim(d.path, grids.karras(d.path, 5), eta=1.0), lambda x: x[:, 0]
>>> tree, file = tree_sample(d, table, reward, budget=50), os.path.join(tempfile.mkdtemp(), "tree.safetensors")
>>> tree.save(file)
>>> again = Tree.load(file, Diffusion(d, table), reward)
>>> again.grow(50).rewards == tree.grow(50).rewards
True
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..models import checkpoint
from ..models.rewards import Reward, Space, checked
from .chain import Chain, Ids
from .tree import Tree
from .tree_store import Store

KIND = "tree"
WHOLE = ("parent", "depth", "visits", "slot", "leaves", "rounds")
REAL = ("value", "guess", "rewards", "weights")
PLAIN = ("scale", "seed", "backup", "growth", "calls", "allowed", "drawn", "whole")


def save(tree: Tree, file: str | os.PathLike) -> None:
    """Write it aside and rename: the file is whole or not there."""
    tensors = {name: torch.tensor(getattr(tree, name), dtype=torch.int64) for name in WHOLE}
    tensors |= {name: torch.tensor(getattr(tree, name), dtype=torch.float64) for name in REAL}
    for depth in tree.store.depths():
        tensors |= {f"states.{depth}.{i}": t for i, t in enumerate(tree.store.all(depth))}
    meta = {
        "kind": KIND, "ids": list(tree.ids), "memory": tree.store.memory,
        "widths": {str(k): v for k, v in tree.widths.items()}, "chain": _fingerprint(tree.chain),
        **{name: getattr(tree, name) for name in PLAIN},
    }  # fmt: skip
    checkpoint.write(file, tensors, meta)


def load(
    file: str | os.PathLike, chain: Chain, reward: Reward, *, codec: Any = None, reward_space: Space = "image"
) -> Tree:
    """Read it, with the chain (``Diffusion(d, table, cond, ...)``) and the reward that it grew with.

    The chain must be cut at the same rows of as many calls; whether the model is the same nobody can see here.
    """
    tensors, meta = checkpoint.read(file)
    if meta.get("kind") != KIND:
        raise ValueError(f"file must hold a tree, got a {meta.get('kind')}")
    if meta["chain"] != _fingerprint(chain):
        raise ValueError(f"chain must be cut as the tree's was, {meta['chain']}, got {_fingerprint(chain)}")
    codec = codec if codec is not None else getattr(getattr(chain, "d", None), "codec", None)
    tree = Tree(chain, checked(reward, codec, reward_space), meta["scale"], meta["seed"], meta["memory"])
    tree.ids = Ids(*meta["ids"])
    for name in (*WHOLE, *REAL):
        setattr(tree, name, tensors[name].tolist())
    for name in PLAIN:
        setattr(tree, name, meta[name])
    tree.widths = {int(key): width for key, width in meta["widths"].items()}
    tree.children = [[] for _ in tree.parent]
    for node, parent in enumerate(tree.parent[1:], 1):
        tree.children[parent].append(node)
    tree.store = Store(meta["memory"])
    device = getattr(chain, "device", torch.device("cpu"))
    for depth in sorted({int(name.split(".")[1]) for name in tensors if name.startswith("states.")}):
        parts = []
        while f"states.{depth}.{len(parts)}" in tensors:
            parts.append(tensors[f"states.{depth}.{len(parts)}"].to(device))
        tree.store.add(depth, tuple(parts), keep_here=depth < chain.depth)
    return tree


def _fingerprint(chain: Chain) -> dict[str, Any]:
    seed = getattr(chain, "seed", 0)
    return {"depth": chain.depth, "opening": chain.opening, "calls": list(chain.calls), "seed": seed}
