"""A tree of partial samples with rewards at its leaves (2506.20701): values, read-outs, and going on where it stopped.

The target is  p(x0) exp(scale r(x0)) / Z  for the law p of a stochastic sampler. A node stands for a partly denoised
sample; its children are independent draws from the sampler's own kernel, so its soft value

    V(x) = log E[ exp(scale r(x0)) | x ]   is backed up from them:   v <- log mean_children exp(v_child)

with  v = scale r  at a leaf. Walking down by softmax(v) reaches a leaf with a probability that telescopes, for a tree
of any shape, to

    P(leaf) = exp(scale r(leaf) - v(root)) / prod_{ancestors a} children(a)

so all leaves have their weights without any walk. How a tree grows is the business of ``tree_sample`` and
``tree_search``; this file is what they grow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..models.rewards import Reward, RewardError, checked
from .chain import Chain, Ids
from .noise import uniform
from .tree_store import Store

ROOT = 0
READ = 3  # the stream of read-outs, beside the noise of steps, openings and users


class Tree:
    """Nodes by number, 0 the root, parents before children; states in a ``Store`` by depth.

    Attributes of every node: ``parent``, ``depth`` (-1 of the root), ``value`` in nats, ``visits``, ``children``,
    ``guess`` (the reward of the denoised estimate, NaN where none was asked for). Of every leaf, in order of birth:
    ``leaves`` (its node), ``rewards``, ``weights`` (the log-weight that its growth gave it).

    >>> tree = tree_of_rewards([[0.0, 1.0], [2.0]])
    >>> [round(tree.value[node], 4) for node in (0, 1, 4)], round(tree.log_z, 4)
    ([1.5313, 0.6201, 2.0], 1.5313)
    >>> tree.log_weights().exp().round(decimals=4)                    # e^r / (2 * 2), e^r / (2 * 1)
    tensor([0.2500, 0.6796, 3.6945], dtype=torch.float64)
    """

    def __init__(
        self,
        chain: Chain,
        score: Reward,
        scale: float = 1.0,
        seed: int = 0,
        memory: int | None = None,
        ids: Ids | None = None,
    ):
        if not (
            isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 <= scale < float("inf")
        ):
            raise ValueError(f"scale must be a number of at least 0, got {scale!r}")
        self.chain, self.score, self.scale, self.seed = chain, score, float(scale), seed
        self.store = Store(memory)
        self.parent, self.depth, self.value, self.visits = [-1], [-1], [float("nan")], [0]
        self.children: list[list[int]] = [[]]
        self.guess, self.slot = [float("nan")], [-1]
        self.leaves: list[int] = []
        self.rewards: list[float] = []
        self.weights: list[float] = []
        self.calls = 0  # spent
        self.allowed = 0  # granted
        self.drawn = 0  # traversals so far
        self.backup = "soft"  # or "max": what a parent's value is of its children's
        self.growth: dict[str, Any] = {}  # how it grows: the options of tree_sample or tree_search
        self.whole = 0  # rollouts from the root, where it grows move by move
        self.rounds: list[int] = []  # leaves of each population, where it grows by populations
        self.widths: dict[
            int, int
        ] = {}  # how many of a stored node's tensors are its state; the rest are answers
        self.ids = ids or Ids()

    def __len__(self) -> int:
        return len(self.parent)

    def __repr__(self) -> str:
        return f"Tree(leaves={len(self.leaves)}, nodes={len(self)}, calls={self.calls}, {self.growth})"

    def grow(self, budget: int) -> Tree:
        """Spend ``budget`` more network calls, in the way the tree was begun; what is left over is kept for later."""
        from .together import together
        from .tree_growth import growing

        together([growing(self, budget)])
        return self

    # --- what growing does to it ------------------------------------------------------------------------------

    def accepted(self, rewards: torch.Tensor) -> torch.Tensor:
        """Rewards (B,) in float64 on the host; what cannot be an exponent is refused."""
        rewards = rewards.double().cpu()
        if not bool(torch.isfinite(self.scale * rewards).all()):
            raise RewardError(
                f"reward times scale = {self.scale:g} must be finite, got {self.scale * rewards}"
            )
        return rewards

    def add(self, parent: int, depth: int, slot: int, guess: float = float("nan")) -> int:
        """A node without a value yet; its number."""
        number = len(self.parent)
        self.parent.append(parent)
        self.depth.append(depth)
        self.value.append(float("nan"))
        self.visits.append(0)
        self.children.append([])
        self.guess.append(guess)
        self.slot.append(slot)
        self.children[parent].append(number)
        return number

    def add_leaf(self, node: int, reward: float, weight: float = float("nan")) -> None:
        """Say that a node is a leaf, and what it is worth."""
        self.leaves.append(node)
        self.rewards.append(reward)
        self.weights.append(weight)
        self.value[node] = self.scale * reward

    def back_up(self, node: int) -> None:
        """From a new leaf to the root: one visit each, and the soft values of its ancestors."""
        self.visits[node] += 1
        while (node := self.parent[node]) >= 0:
            values = np.array([self.value[c] for c in self.children[node]])
            values = values[~np.isnan(values)]  # whoever was not resampled has no leaf below it
            self.value[node] = float(values.max() if self.backup == "max" else _log_mean_exp(values))
            self.visits[node] += 1

    # --- what is read off it ----------------------------------------------------------------------------------

    def log_weights(self) -> torch.Tensor:
        """(leaves,) float64: the log-weights of the leaves as samples of the target, not normalised.

        Their sum estimates Z. Of trees that grow by traversals they are the telescoped probabilities of a walk; of
        those that grow by populations, what the population's own growth gave them.
        """
        if self.rounds:
            return torch.tensor(self.weights, dtype=torch.float64) - np.log(len(self.leaves))
        share = np.zeros(len(self))
        for node in range(1, len(self)):
            parent = self.parent[node]
            share[node] = share[parent] - np.log(len(self.children[parent]))
        return torch.as_tensor(self.scale * np.array(self.rewards) + share[self.leaves])

    def visit_weights(self) -> torch.Tensor:
        """(leaves,) float64: the importance-weighted read-out of a tree that grows by Boltzmann walks.

        Each rollout counts with  scale r - sum log(children(a) p_selected(a))  along the walk that led to it, as the
        tree was then. Given the tree at that time it is unbiased for walks that take every child alike, and whoever
        is found late corrects what early luck had written into the backed-up values.
        """
        weights = torch.tensor(self.weights, dtype=torch.float64)
        if self.rounds or bool(weights.isnan().any()):
            raise ValueError("visit_weights belong to trees that grow by Boltzmann walks, see tree_sample")
        return weights - np.log(len(weights))

    @property
    def log_z(self) -> float:
        """log of the estimate of Z = E_p[exp(scale r)]."""
        self._check_grown()
        return float(self.log_weights().logsumexp(0))

    @property
    def ess(self) -> float:
        """The number of equally weighted leaves that are worth as much: (sum w)^2 / sum w^2."""
        self._check_grown()
        share = self.log_weights().softmax(0)
        return float(1 / share.square().sum())

    def samples(self, n: int, seed: int = 0, readout: str = "leaves") -> torch.Tensor:
        """n samples (n, ...) of the target, without a network call: leaves drawn by their weights.

        ``readout`` is ``"leaves"``, by ``log_weights``, or ``"visits"``, by ``visit_weights``. Systematic drawing, in
        random order: a leaf of share w comes floor(n w) or ceil(n w) times.
        """
        self._check_grown()
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a positive integer, got {n!r}")
        if readout not in ("leaves", "visits"):
            raise ValueError(f"readout must be 'leaves' or 'visits', got {readout!r}")
        weights = self.log_weights() if readout == "leaves" else self.visit_weights()
        u = uniform(seed, torch.tensor([0]), n + 1, stream=READ)[0]
        at = (torch.arange(n, dtype=torch.float64) + u[n]) / n
        index = torch.searchsorted(weights.softmax(0).cumsum(0), at).clamp_max(len(weights) - 1)
        return self.leaf_states(index[u[:n].argsort()].tolist())

    def best(self, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The k leaves of highest reward, highest first: samples (k, ...) and their rewards (k,)."""
        self._check_grown()
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(self.leaves):
            raise ValueError(f"k must lie in 1 .. {len(self.leaves)}, the number of leaves, got {k!r}")
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        # stable, so that among equals the first that was found is the first here
        index = rewards.argsort(descending=True, stable=True)[:k]
        return self.leaf_states(index.tolist()), rewards[index]

    def leaf_states(self, index: Sequence[int]) -> torch.Tensor:
        """Leaves by their order of birth: (n, ...), on the chain's device."""
        depth = self.chain.depth
        device = getattr(self.chain, "device", torch.device("cpu"))
        return self.store.get(depth, [self.slot[self.leaves[i]] for i in index], device)[0]

    def _check_grown(self) -> None:
        if not self.leaves:
            raise ValueError("the tree has no leaf yet: grow it by at least one rollout")

    # --- beside it --------------------------------------------------------------------------------------------

    def save(self, file: str | os.PathLike) -> None:
        """Write it as safetensors; ``Tree.load`` goes on from there as if nothing had happened."""
        from .tree_file import save

        save(self, file)

    @staticmethod
    def load(file: str | os.PathLike, chain: Chain, reward: Reward, **options: Any) -> Tree:
        """Read a tree that ``save`` wrote, with the chain and the reward that it grew with."""
        from .tree_file import load

        return load(file, chain, reward, **options)

    def plot(self, file: str | os.PathLike | None = None):
        """A picture of the tree: a matplotlib figure, written to ``file`` if given."""
        from .tree_plot import plot

        return plot(self, file)


def _log_mean_exp(values: np.ndarray) -> np.ndarray:
    top = values.max()
    return top + np.log(np.exp(values - top).mean()) if np.isfinite(top) else top


class _Rewards:
    """A chain of depth 1 without states."""

    depth, calls, opening = 1, (1,), 0


def tree_of_rewards(rewards: Sequence[Sequence[float]], scale: float = 1.0) -> Tree:
    """A tree of two levels with these rewards at its leaves: for looking at what the formulas say."""
    tree = Tree(_Rewards(), checked(lambda x: x), scale)  # type: ignore[arg-type]
    for group in rewards:
        node = tree.add(ROOT, 0, -1)
        for reward in group:
            leaf = tree.add(node, 1, -1)
            tree.add_leaf(leaf, reward)
            tree.back_up(leaf)
    return tree
