"""Diffusion tree sampling (2506.20701): samples of  p(x0) exp(scale r(x0)) / Z,  anytime, by a tree of partial samples.

Two ways to grow it.

``"walks"`` is the paper's: walk down by softmax of the backed-up soft values to a node that is not full, draw a child
there, roll it out, back its reward up. Its values are consistent, but at any budget they are biased low: a child whose
first rollouts were lucky is visited again and corrected, one whose were not is left alone.

``"populations"`` is ours, and has no such bias. The tree is grown by populations of rollouts from the root, and who
among a population's nodes has how many children is decided before any of them is drawn, by resampling with potentials

    psi(x_t) = exp(scale b_t r(x0_hat(x_t)))

With b_t = 1 that is steering by denoised (Tweedie) rewards; where these mislead, it is worse than no steering. So b_t
is learned, per depth, from the real rewards at the leaves that the tree has already: the slope of the regression of
r(x0) on r(x0_hat(x_t)), weighted towards the target. Each population's estimate of Z is unbiased given the earlier
ones, whatever b is, so all pool; the more leaves, the better b.

    >>> from fewstep.models import GaussianMixture, paths
    >>> from fewstep.samplers import ddim, grids
    >>> d = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.1).denoiser(paths.edm())
    >>> table = ddim(d.path, grids.karras(d.path, 8), eta=1.0)
    >>> tree = tree_sample(d, table, lambda x: 2 * x[:, 0], budget=800, dtype=torch.float64)
    >>> tree.calls, bool(tree.samples(100).mean() > 0.7)             # e^2x favours the right mode
    (800, True)
    >>> tree.grow(400).calls                                         # anytime: go on from there
    1200
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..models.denoiser import Denoiser
from ..models.rewards import Reward, Space
from .noise import uniform
from .resampling import ess as effective_size
from .resampling import log_mean_exp, systematic
from .table import Table
from .together import Walk, look, move, score, start
from .tree import ROOT, Tree
from .tree_growth import CHOOSE, by_traversals, cost, planted

RIDGE = 4.0  # leaves that the prior slope is worth


def tree_sample(
    d: Denoiser,
    noise_or_table: torch.Tensor | Table,
    table_or_reward: Table | Reward | None = None,
    /,
    budget: int = 1000,
    *,
    reward: Reward | None = None,
    scale: float = 1.0,
    grow: Literal["populations", "walks"] = "populations",
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ids: torch.Tensor | None = None,
    levels: int | Sequence[int] | None = None,
    reward_space: Space = "image",
    memory: int | None = None,
    batch: int | None = None,
    prior: float = 0.5,
    ess: float = 0.5,
    widen: tuple[float, float] = (1.0, 0.5),
    explore: float = 0.0,
    rows: int = 64,
    **sample: Any,
) -> Any:
    """A tree of samples of p exp(scale r):  ``tree_sample(d, table, reward, budget=2_000)``  -> ``Tree``.

    Or, as any control method is called,  ``tree_sample(d, noise, table, reward=..., budget=...)``  -> (x, trees), with
    a tree and a sample for each row of noise; the budget is then a row's.

    Args:
        table: of a stochastic solver, e.g. ``ddim(..., eta=1.0)``: without fresh noise only the root can branch.
        budget: network calls.
        scale: of the reward, in nats: how strongly the target is tilted.
        grow: ``"populations"``, ours, or ``"walks"``, the paper's.
        levels: where the tree branches: every row that draws noise, so many of them, or those rows.
        reward_space: whether the reward sees decoded images, or samples as they are.
        memory: bytes of latents to keep on the device; what is beyond lies on the host.
        batch: rollouts at once (populations: at most so many in one, by default the budget's share; walks: 16).
        prior: populations: the slope b that is believed before anything is known.
        ess: populations: resample where the effective sample size falls below this share.
        widen: walks: (C, alpha), a node of N visits may have ceil(C N^alpha) children.
        explore: walks: the share of choices that are uniform instead of by value.
        rows: samples that trees of different rows of noise may share a network call for: they grow side by side.
        sample: ``shape``, ``dtype``, ``device`` of samples where the denoiser does not say.
    """
    if grow == "populations":
        growth: dict[str, Any] = {
            "method": grow,
            "batch": batch,
            "prior": check_share("prior", prior),
            "ess": check_share("ess", ess),
        }
    elif grow == "walks":
        growth = {"method": grow, "widen": check_widen(widen), "batch": check_batch(batch)}
        growth["explore"] = check_share("explore", explore)
    else:
        raise ValueError(f"grow must be 'populations' or 'walks', got {grow!r}")
    trees = planted(growth, d, noise_or_table, table_or_reward, reward, budget, cond, seed, scale, levels, memory,
                    reward_space, ids, check_batch(rows, "rows"), **sample)  # fmt: skip
    if not isinstance(noise_or_table, torch.Tensor):
        return trees[0]
    return torch.cat([tree.samples(1, seed=tree.ids.first) for tree in trees]), trees


def by_walks(tree: Tree, widen: tuple[float, float], batch: int, explore: float) -> Walk[None]:
    """The paper's growth."""

    def select(tree: Tree, node: int, pending, u: float) -> tuple[int, float]:
        values = np.array([tree.value[c] for c in tree.children[node]])
        share = np.exp(values - values.max())
        share = (1 - explore) * share / share.sum() + explore / len(share)
        at = min(int(np.searchsorted(share.cumsum(), u * share.sum())), len(share) - 1)
        return at, float(share[at])

    return by_traversals(tree, select, widen, batch)


def by_populations(tree: Tree, batch: int | None, prior: float, ess: float) -> Walk[None]:
    """Populations of the budget's share, each with slopes from all before it."""
    each = cost(tree, ROOT)
    rollouts = (tree.allowed - tree.calls) // each
    count = max(min(rollouts, 2), min(8, rollouts // 32))
    if batch is not None:
        count = max(count, -(-rollouts // check_batch(batch)))
    for left in range(count, 0, -1):
        size = (tree.allowed - tree.calls) // each // left
        if size:
            yield from population(tree, size, slopes(tree, prior), ess)


def population(tree: Tree, size: int, slope: np.ndarray, ess: float) -> Walk[None]:
    """One population of rollouts, resampled on its way down by  exp(scale b r(x0_hat))."""
    chain = tree.chain
    device = getattr(chain, "device", torch.device("cpu"))
    tags = torch.tensor([tree.ids(tree.drawn + i) for i in range(size)], device=device)
    draws = uniform(tree.seed, tags[:1].cpu(), chain.depth + 1, stream=CHOOSE)[0]
    node, parents, made = (yield start(chain, tags)), torch.arange(size), []
    log, before, log_z = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0.0
    for depth in range(chain.depth):
        seen, x0 = yield look(chain, node, depth)
        tree.widths[depth] = len(node)
        guess = torch.full((size,), float("nan"), dtype=torch.float64)
        if x0 is not None:
            guess = tree.scale * tree.accepted((yield score(tree.score, x0, depth)))
            now = float(slope[depth]) * guess
            log, before = log + now - before, now
        made.append(((*node, *seen), parents, guess.tolist()))
        parents = torch.arange(size)
        if float(effective_size(log)) < ess * size:
            parents = systematic(log[None], draws[None, depth : depth + 1])[0]
            log_z += float(log_mean_exp(log))
            log, before = torch.zeros_like(log), before[parents]
            node, seen = (tuple(t[parents.to(device)] for t in part) for part in (node, seen))
        node = yield move(chain, node, seen, depth, tags)
    rewards = tree.accepted((yield score(tree.score, node[0], chain.depth)))
    weights = (log + tree.scale * rewards - before + log_z).tolist()
    tree.calls += size * cost(tree, ROOT)
    tree.drawn += size
    tree.rounds.append(size)
    numbers = [ROOT] * size
    for depth, (tensors, parents_here, guess) in enumerate(made):
        first = tree.store.add(depth, tensors)
        at = [numbers[p] for p in parents_here.tolist()] if depth else numbers
        numbers = [tree.add(at[i], depth, first + i, guess[i]) for i in range(size)]
    first = tree.store.add(chain.depth, node, keep_here=False)
    for i, parent in enumerate(parents.tolist()):
        leaf = tree.add(numbers[parent], chain.depth, first + i)
        tree.add_leaf(leaf, float(rewards[i]), weights[i])
        tree.back_up(leaf)


def slopes(tree: Tree, prior: float, least: int = 24) -> np.ndarray:
    """b (D,) in 0 .. 1: the slope of real on denoised rewards at each depth, over all leaves.

    Leaves count by their weights as samples of the target, flattened by a power until they are worth ``least`` or an
    eighth of them all, so that a single lucky leaf does not draw the line; and the prior is worth a few leaves.
    """
    depth = tree.chain.depth
    if len(tree.leaves) < 3 or tree.scale == 0:
        return np.full(depth, prior)
    parent, guess = np.array(tree.parent), np.array(tree.guess)
    at = np.array(tree.leaves)
    guesses = np.empty((depth, len(at)))
    for level in range(depth - 1, -1, -1):
        at = parent[at]
        guesses[level] = guess[at]
    if np.isnan(guesses).any():
        return np.full(depth, prior)
    rewards, log = tree.scale * np.array(tree.rewards), tree.log_weights().numpy()
    largest = max(np.abs(rewards).max(), np.abs(guesses).max(), 1e-300)
    rewards, guesses = rewards / largest, guesses / largest  # squares are to be finite
    share = _flattened(log, min(max(least, len(log) / 8), 0.9 * len(log)))
    effective = 1 / (share**2).sum()
    away = guesses - (guesses * share).sum(1, keepdims=True)
    together = (away * (rewards - (rewards * share).sum()) * share).sum(1)
    spread = (away**2 * share).sum(1)
    lean = RIDGE / effective * spread
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (together + lean * prior) / (spread + lean)
    return np.clip(np.where(spread > 0, slope, prior), 0.0, 1.0)


def _flattened(log: np.ndarray, worth: float) -> np.ndarray:
    """Normalised exp(power log) with the largest power <= 1 at which the effective number is at least ``worth``."""

    def share(power: float) -> np.ndarray:
        w = np.exp(power * (log - log.max()))
        return w / w.sum()

    low, high = 0.0, 1.0
    if 1 / (share(1.0) ** 2).sum() >= worth:
        return share(1.0)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 / (share(middle) ** 2).sum() >= worth else (low, middle)
    return share(low)


def check_batch(batch: int | None, name: str = "batch") -> int:
    """A positive int, 16 for None; else ``ValueError``."""
    batch = 16 if batch is None else batch
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"{name} must be a positive integer, got {batch!r}")
    return batch


def check_widen(widen: Any) -> tuple[float, float]:
    """(C, alpha) with C > 0 and 0 <= alpha <= 1; else ``ValueError``."""
    try:
        factor, power = (float(v) for v in widen)
    except (TypeError, ValueError):
        raise ValueError(f"widen must be two numbers (C, alpha), got {widen!r}") from None
    if not (factor > 0 and 0 <= power <= 1):
        raise ValueError(f"widen must be (C, alpha) with C > 0 and 0 <= alpha <= 1, got {widen!r}")
    return factor, power


def check_share(name: str, value: Any) -> float:
    """A number in 0 .. 1; else ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in 0 .. 1, got {value!r}")
    return float(value)
