"""Groups side by side: the same as one after another, in a fraction of the network calls."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.models.rewards import RewardError, checked
from fewstep.samplers import ddim, grids, sde_dpmpp, starting_noise
from fewstep.samplers.best_of_n import best_of_n, importance
from fewstep.samplers.chain import Diffusion, Ids, alongside, groups_of, repeated
from fewstep.samplers.smc_steering import smc_steering
from fewstep.samplers.svdd import svdd
from fewstep.samplers.together import Ask, together
from fewstep.samplers.tree import Tree
from fewstep.samplers.tree_growth import growing
from fewstep.samplers.tree_sample import tree_sample
from fewstep.samplers.tree_search import tree_search

D = GaussianMixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.5]], 0.2).denoiser(paths.flow())
GROUPS = 5
COND = {"label": torch.tensor([0, 1, 1, 0, 1])}
NOISE = starting_noise(4, GROUPS, (2,), torch.float64)
IDS = torch.tensor([7, 3, 0, 20, 11])
METHODS = {
    "populations": functools.partial(tree_sample, budget=90),
    "walks": functools.partial(tree_sample, budget=90, grow="walks", batch=3),
    "improvement": functools.partial(tree_search, budget=90, batch=4),
    "bounds": functools.partial(tree_search, budget=90, grow="bounds", batch=3),
    "best of n": functools.partial(best_of_n, n=7),
    "importance": functools.partial(importance, n=7),
    "SMC": functools.partial(smc_steering, particles=6, when=0.9),
    "SVDD": functools.partial(svdd, width=3, particles=2),
}


def reward(x):
    return -(x - 1.0).abs().sum(1)


def table(solver):
    times = grids.uniform(D.path, 6)
    return ddim(D.path, times, eta=1.0) if solver == "ddim" else sde_dpmpp(D.path, times, order=2)


def one_by_one(monkeypatch):
    """As if every group had the machine for itself."""

    def alone(walks, rows=256):
        return [result for walk in walks for result in together([walk])]

    for name in ("best_of_n", "smc_steering", "svdd", "tree_growth"):
        monkeypatch.setattr(sys.modules[f"fewstep.samplers.{name}"], "together", alone)


@pytest.mark.parametrize("solver", ["ddim", "sde_dpmpp"])
@pytest.mark.parametrize("name", METHODS)
def test_side_by_side_is_one_after_another(name, solver, monkeypatch):
    """Bit for bit, whatever the groups' conditions and ids, in fewer and larger calls of the network."""
    sizes, inner = [], D.call
    monkeypatch.setattr(D, "call", lambda x, tau, **cond: sizes.append(len(x)) or inner(x, tau, **cond))

    def run(**options):
        sizes.clear()
        options = {"reward": reward, "seed": 9, "cond": COND, "ids": IDS, **options}
        x, info = METHODS[name](D, NOISE, table(solver), **options)
        told = [(t.rewards, t.parent, t.calls) for t in info] if isinstance(info, list) else info.rewards
        return x, told, list(sizes)

    x, told, calls = run()
    few = run(**({"batch": 8} if "n" in METHODS[name].keywords else {"rows": 8}))
    one_by_one(monkeypatch)
    alone, told_alone, calls_alone = run()
    for other, said in ((alone, told_alone), few[:2]):
        assert torch.equal(x, other)
        assert told == said if isinstance(told, list) else torch.equal(told, said)
    assert sum(calls) == sum(calls_alone) == sum(few[2])
    assert len(calls) <= len(few[2]) <= len(calls_alone) and len(calls) < 0.5 * len(calls_alone)
    assert not torch.equal(x[0], x[1])


def test_walks_that_begin_at_different_depths_meet():
    """The furthest back goes on first, so that both ask for depth 3 at once; scores of one reward are joined too."""
    joined = []

    class Counting:
        depth, opening, calls = 4, 0, (1,) * 4

        def look(self, node, depth):
            joined.append((depth, len(node[0])))
            return node, None

    chain = Counting()

    def walk(begin):
        for depth in range(begin, 4):
            seen, _ = yield Ask("look", depth, chain, ((torch.zeros(1),),))
        return begin

    chain.cond, chain.noise, chain.first, chain.device = {}, None, 0, "cpu"
    assert together([walk(2), walk(0), walk(4), walk(3)]) == [2, 0, 4, 3]
    assert joined == [(0, 1), (1, 1), (2, 2), (3, 3)]


def test_conditions_are_repeated_by_group():
    chains = [chain for chain, _ in groups_of(D, NOISE, table("ddim"), {**COND, "scale": 2.0}, IDS)]
    both = alongside([chains[0], chains[2]], [2, 3])
    assert both._cond(5)["label"].tolist() == [0, 0, 1, 1, 1] and both._cond(5)["scale"] == 2.0
    nested = {"a": {"b": torch.ones(1, 3)}, "shared": torch.zeros(4, 2)}
    made = repeated([nested, nested], [1, 3])
    assert made["a"]["b"].shape == (4, 3) and made["shared"].shape == (4, 2)
    ids = torch.tensor([7, 7, 0, 5, 0])
    opened = both.start(ids)[0]
    assert torch.equal(opened[:2], chains[0].start(ids[:2])[0]) and torch.equal(
        opened[2:], chains[2].start(ids[2:])[0]
    )


def test_trees_go_on_alone_and_together():
    """Trees of groups, each further on its own or all at once; and two trees on one chain without opening noise."""
    grown = []
    for more in (
        lambda trees: [tree.grow(40) for tree in trees],
        lambda trees: together(growing(t, 40) for t in trees),
    ):
        _, trees = tree_search(D, NOISE, table("ddim"), reward=reward, budget=60, batch=4, cond=COND)
        more(trees)
        grown.append([(tree.rewards, tree.parent) for tree in trees])
    assert grown[0] == grown[1]
    chain = Diffusion(D, table("ddim"), dtype=torch.float64)
    trees = [Tree(chain, checked(reward), ids=Ids(first)) for first in (0, 50)]
    for tree in trees:
        tree.growth = {"method": "walks", "widen": (1.0, 0.5), "batch": 4, "explore": 0.0}
    together(growing(tree, 60) for tree in trees)
    alone = Tree(chain, checked(reward), ids=Ids(0))
    alone.growth = trees[0].growth
    assert alone.grow(60).rewards == trees[0].rewards != trees[1].rewards


@pytest.mark.parametrize("name", METHODS)
def test_a_reward_that_fails_for_one_group_ends_them_all(name):
    def fails(x):
        return torch.where(x[:, 0] > 0, reward(x), float("nan"))

    with pytest.raises(RewardError, match="must be finite"):
        METHODS[name](D, NOISE, table("ddim"), reward=fails, cond=COND)


def test_bad_input():
    for name in ("populations", "improvement", "SMC", "SVDD"):
        with pytest.raises(ValueError, match="rows must be a positive integer, got 0"):
            METHODS[name](D, NOISE, table("ddim"), reward=reward, rows=0)
