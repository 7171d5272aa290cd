"""Trees on discrete chains, whose target is known exactly, and on a mixture: values, read-outs, budgets, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.models.rewards import RewardError, checked
from fewstep.samplers import ddim, grids, sample, sde_dpmpp, starting_noise
from fewstep.samplers.best_of_n import importance
from fewstep.samplers.chain import Diffusion, cut
from fewstep.samplers.noise import uniform
from fewstep.samplers.smc_steering import smc_steering
from fewstep.samplers.tree import ROOT, Tree
from fewstep.samplers.tree_sample import slopes, tree_sample
from fewstep.samplers.tree_search import tree_search

WALKS = {"method": "walks", "widen": (1.0, 0.5), "batch": 16, "explore": 0.0}
POPULATIONS = {"method": "populations", "batch": None, "prior": 0.5, "ess": 0.5}


class Discrete:
    """States 0 .. n - 1; the first from ``first``, then a transition matrix a move. Guesses, if any, are its own."""

    opening, dtype = 1, torch.float64

    def __init__(self, first, kernels, seed=0, guesses=None):
        self.first, self.kernels = torch.tensor(first).double(), [torch.tensor(k).double() for k in kernels]
        self.depth, self.calls, self.seed, self.guesses = len(kernels), (1,) * len(kernels), seed, guesses

    def _draw(self, p, ids, row):
        u = uniform(self.seed, ids, 1, row=row)
        return ((p.cumsum(-1) < u).sum(-1, keepdim=True)).clamp_max(p.shape[-1] - 1).double()

    def start(self, ids):
        return (self._draw(self.first.expand(len(ids), -1), ids, 0),)

    def look(self, node, depth):
        return (), None if self.guesses is None else self.guesses[depth][node[0][:, 0].long()][:, None]

    def move(self, node, seen, depth, ids):
        return (self._draw(self.kernels[depth][node[0][:, 0].long()], ids, depth + 1),)

    def law(self, rewards):
        """The target over leaves, and Z."""
        p = self.first
        for kernel in self.kernels:
            p = p @ kernel
        weights = p * rewards.exp()
        return weights / weights.sum(), weights.sum()


REWARDS = torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64)


def discrete(depth=1, seed=0, **options):
    rng = np.random.default_rng(1)
    return Discrete([0.5, 0.3, 0.2], [rng.dirichlet([1, 1, 1], 3) for _ in range(depth)], seed, **options)


def grown(budget, growth, seed=0, depth=1, rewards=REWARDS, **options):
    tree = Tree(discrete(depth, seed, **options), checked(lambda x: rewards[x[:, 0].long()]), 1.0, seed)
    tree.growth = growth
    return tree.grow(budget)


def leaf_law(tree, weights):
    states = tree.leaf_states(range(len(tree.leaves)))[:, 0].long()
    return torch.zeros(3, dtype=torch.float64).index_add(0, states, weights.softmax(0))


def distance(a, b):
    return float((a - b).abs().sum() / 2)


@pytest.mark.parametrize("growth", [WALKS, POPULATIONS], ids=["walks", "populations"])
def test_leaves_follow_the_target_of_a_discrete_chain(growth):
    target, _ = discrete().law(REWARDS)
    trees = [grown(400, growth, seed) for seed in range(4)]
    assert distance(sum(leaf_law(t, t.log_weights()) for t in trees) / 4, target) < 0.05
    if growth is WALKS:  # the control: the stream of visited leaves is no sample of anything
        stream = sum(leaf_law(t, torch.zeros(len(t.leaves), dtype=torch.float64)) for t in trees) / 4
        assert distance(stream, target) > 0.05


def walked_law(tree):
    """P(leaf) by walking down with softmax of the values, node by node."""
    share = np.zeros(len(tree))
    share[ROOT] = 1.0
    for node, children in enumerate(tree.children):
        if children:
            values = np.array([tree.value[c] for c in children])
            weights = np.exp(values - values.max())
            share[children] = share[node] * weights / weights.sum()
    return share[tree.leaves]


def test_walks_telescope_to_the_leaves_weights():
    tree = grown(300, {**WALKS, "explore": 0.1}, depth=3)
    log = tree.log_weights()
    assert np.abs(walked_law(tree) / log.softmax(0).numpy() - 1).max() < 1e-12
    assert abs(float(log.logsumexp(0)) - tree.value[ROOT]) < 1e-12
    tree.value[tree.parent[tree.leaves[0]]] += 0.1  # and it is no accident
    assert np.abs(walked_law(tree) / log.softmax(0).numpy() - 1).max() > 1e-3


def test_constant_rewards_leave_every_value_as_it_is():
    tree = grown(200, WALKS, depth=2, rewards=torch.full((3,), 0.7, dtype=torch.float64))
    assert np.abs(np.array(tree.value) - 0.7).max() < 1e-12


def test_the_root_is_visited_by_every_walk_and_worth_no_more_than_the_best():
    tree = grown(200, WALKS, depth=2)
    assert tree.visits[ROOT] == tree.drawn and tree.value[ROOT] <= max(tree.rewards) + 1e-12
    inner = [n for n in range(len(tree)) if tree.children[n]]
    assert all(tree.visits[n] >= sum(tree.visits[c] for c in tree.children[n]) for n in inner)


def test_populations_estimate_z_without_bias_and_walks_do_not():
    """Over 200 trees of 60 calls: the mean of Z within 3 standard errors; the walks' lies below by more than 5."""
    rewards = torch.tensor([0.0, 3.0, -1.0], dtype=torch.float64)
    guesses = [torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)] * 2

    def mean_of(growth, count, **options):
        z = np.exp([grown(60, growth, seed, 2, rewards, **options).log_z for seed in range(count)])
        return z.mean(), z.std(ddof=1) / count**0.5

    _, z = discrete(2).law(rewards)
    # guesses are scored like states: look answers the index of the state whose reward is guessed
    got, error = mean_of(POPULATIONS, 200, guesses=guesses)
    assert abs(got - float(z)) < 3 * error and error < 0.1 * float(z)
    got, error = mean_of({**WALKS, "batch": 4}, 40)
    assert got < float(z) - 5 * error


def test_visits_are_unbiased_given_the_tree():
    """Rollouts of one more batch from a frozen tree: their mean weight is that of uniform walks down it, continued by
    the chain's own law, within 3 standard errors."""
    growth = {**WALKS, "explore": 0.2, "batch": 2000}
    tree = grown(120, {**growth, "batch": 8}, depth=2)
    kernel = tree.chain.kernels[1]
    last = REWARDS.exp()
    second = tree.chain.kernels[0] @ kernel @ last
    value = [tree.chain.first @ second, second, kernel @ last]

    def exact(node):
        depth = tree.depth[node]
        count, visits = len(tree.children[node]), tree.visits[node]
        if depth == 2:
            return float(np.exp(tree.value[node]))
        if count < max(1, int(np.ceil(visits**0.5))):
            state = (
                None if depth < 0 else int(tree.store.get(depth, [tree.slot[node]], torch.device("cpu"))[0])
            )
            return float(value[0]) if depth < 0 else float(value[depth + 1][state])
        return float(np.mean([exact(c) for c in tree.children[node]]))

    from collections import Counter

    from fewstep.samplers import tree_growth

    expected, weights = exact(ROOT), []
    generator = np.random.default_rng(0)

    def select(tree, node, pending, u):
        values = np.array([tree.value[c] for c in tree.children[node]])
        share = 0.8 * np.exp(values - values.max()) / np.exp(values - values.max()).sum() + 0.2 / len(values)
        at = min(int(np.searchsorted(share.cumsum(), u)), len(share) - 1)
        return at, float(share[at])

    for _ in range(3000):
        path, log = tree_growth._walk(tree, select, (1.0, 0.5), Counter(), generator.random(4))
        node = path[-1]
        held = tree.store.get(tree.depth[node], [tree.slot[node]], torch.device("cpu")) if node else None
        state = None if held is None else int(held[0])
        p = tree.chain.first if state is None else torch.eye(3, dtype=torch.float64)[state]
        for step in range(tree.depth[node] + (node == ROOT), 2):
            p = p @ tree.chain.kernels[step]
        weights.append(np.exp(log + REWARDS[generator.choice(3, p=(p / p.sum()).numpy())].item()))
    error = np.std(weights) / len(weights) ** 0.5
    assert abs(np.mean(weights) - expected) < 3 * error and error < 0.05 * expected


# --- on a mixture -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    d = GaussianMixture([0.3, 0.7], [[-2.0], [1.5]], [0.16, 0.49]).denoiser(paths.edm())
    return d, ddim(d.path, grids.karras(d.path, 8, t_max=20.0, t_min=0.02), eta=1.0)


def reward(x):
    return -(x[:, 0] + 2).abs()


def test_where_a_table_can_branch(problem):
    d, table = problem
    assert cut(table) == (0, 1, 2, 3, 4, 5, 6, 8) and cut(table, 2) == (1, 5, 8)
    assert cut(ddim(d.path, table.times)) == (8,)  # an ODE branches at the root alone
    with pytest.raises(ValueError, match="levels must be rows that draw noise"):
        cut(table, [7])


@pytest.mark.parametrize("solver", ["ddim", "sde_dpmpp"])
@pytest.mark.parametrize("levels", [None, 3])
def test_a_chain_walks_as_sample_does_histories_and_all(problem, solver, levels):
    d, table = problem
    if solver == "sde_dpmpp":
        table = sde_dpmpp(d.path, table.times, order=2)
    ids = torch.tensor([4, 9])
    chain = Diffusion(d, table, seed=3, levels=levels, dtype=torch.float64)
    node = chain.start(ids)
    for depth in range(chain.depth):
        seen, _ = chain.look(node, depth)
        node = chain.move(node, seen, depth, ids)
    plain = sample(d, starting_noise(3, ids, (1,), torch.float64), table, seed=3, ids=ids)
    assert torch.equal(node[0], plain)


@pytest.mark.parametrize("grow", ["populations", "walks"])
def test_budgets_are_kept_and_trees_go_on(problem, grow):
    d, table = problem
    tree = tree_sample(d, table, reward, 100, grow=grow, dtype=torch.float64)
    assert 88 <= tree.calls <= 100
    tree.grow(100)
    assert 188 <= tree.calls <= 200
    x, rewards = tree.best(3)
    assert torch.allclose(reward(x), rewards) and (rewards.diff() <= 0).all()


def test_a_batch_of_one_is_the_serial_tree_and_calls_may_be_split(problem):
    d, table = problem
    options = dict(grow="walks", batch=1, dtype=torch.float64)
    whole = tree_sample(d, table, reward, 160, **options)
    split = tree_sample(d, table, reward, 80, **options).grow(80)
    assert whole.rewards == split.rewards and whole.parent == split.parent


def test_memory_moves_latents_to_the_host_and_changes_nothing(problem):
    d, table = problem
    here = tree_sample(d, table, reward, 200, grow="walks", dtype=torch.float64)
    away = tree_sample(d, table, reward, 200, grow="walks", dtype=torch.float64, memory=100)
    assert away.store.on_device <= 100 < away.store.on_host and here.rewards == away.rewards


@pytest.mark.parametrize("make", [tree_sample, tree_search], ids=["sample", "search"])
@pytest.mark.parametrize("solver", ["ddim", "sde_dpmpp"])
def test_a_saved_tree_goes_on_as_if_nothing_had_happened(problem, tmp_path, make, solver):
    d, table = problem
    if solver == "sde_dpmpp":
        table = sde_dpmpp(d.path, table.times, order=2)
    tree = make(d, table, reward, 120, dtype=torch.float64, batch=4)
    tree.save(tmp_path / "tree.safetensors")
    chain = Diffusion(d, table, dtype=torch.float64)
    again = Tree.load(tmp_path / "tree.safetensors", chain, reward)
    assert torch.equal(again.samples(20), tree.samples(20)) and again.log_z == tree.log_z
    assert again.grow(80).rewards == tree.grow(80).rewards
    with pytest.raises(ValueError, match="cut as the tree's was"):
        Tree.load(tmp_path / "tree.safetensors", Diffusion(d, table, levels=2), reward)


@pytest.mark.parametrize("make", [tree_sample, tree_search], ids=["sample", "search"])
def test_as_a_control_method_with_nothing_to_control_it_is_sample(problem, make):
    d, table = problem
    noise = starting_noise(5, 3, (1,), torch.float64)
    x, trees = make(d, noise, table, reward=lambda x: 0 * x[:, 0], budget=table.calls, seed=7)
    assert torch.equal(x, sample(d, noise, table, seed=7)) and [t.calls for t in trees] == [8] * 3
    x, trees = make(d, noise, table, reward=reward, budget=200, seed=7)
    assert float(reward(x).mean()) > float(reward(sample(d, noise, table, seed=7)).mean())
    drawn = {tree.ids(i) for tree in trees for i in range(tree.drawn)}
    assert len(drawn) == sum(tree.drawn for tree in trees)  # no two draws under one id


def test_conditions_of_groups_stay_with_their_trees():
    d = GaussianMixture([0.5, 0.5], [[-2.0], [2.0]], 0.1).denoiser(paths.flow())
    table = ddim(d.path, grids.uniform(d.path, 6), eta=1.0)
    noise, cond = starting_noise(0, 2, (1,)), {"label": torch.tensor([0, 1])}
    x, trees = tree_search(d, noise, table, reward=lambda x: x[:, 0], budget=60, cond=cond)
    assert x[0] < 0 < x[1]


@pytest.mark.parametrize("make", [tree_sample, tree_search], ids=["sample", "search"])
@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x: x[:, 0] * float("nan"), "must be finite"),
        (lambda x: x, "one number a sample"),
        (lambda x: 1 / 0, "raised ZeroDivisionError"),
        (lambda x: torch.full((len(x),), -1e308, dtype=torch.float64), "times scale = 2 must be finite"),
    ],
)
def test_a_reward_that_fails_is_named_and_the_tree_goes_on(problem, make, bad, message):
    d, table = problem
    tree = make(d, table, reward, 100, scale=2.0, dtype=torch.float64)
    before, leaves = len(tree), list(tree.rewards)
    good, tree.score = tree.score, checked(bad)
    with pytest.raises(RewardError, match=message):
        tree.grow(100)
    assert len(tree) == before and tree.rewards == leaves and tree.calls <= 100
    tree.samples(4)
    tree.score = good
    assert len(tree.grow(100).leaves) > len(leaves)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("scale", [1e4, 1e300])
@pytest.mark.parametrize("grow", ["populations", "walks"])
def test_weights_that_collapse_leave_one_leaf_and_a_tree_to_go_on_with(problem, grow, scale):
    d, table = problem
    tree = tree_sample(d, table, reward, 160, grow=grow, scale=scale, dtype=torch.float64)
    assert 1 <= tree.ess < 1.01 and np.isfinite(tree.log_z)
    assert torch.equal(tree.samples(5), tree.best()[0].expand(5, 1))
    leaves = len(tree.leaves)
    assert len(tree.grow(80).leaves) > leaves and np.isfinite(tree.log_z)


def test_bad_input(problem):
    d, table = problem
    for make in (tree_sample, tree_search):
        with pytest.raises(ValueError, match="at least 8 network calls, one rollout, got 7"):
            make(d, table, reward, 7)
        for budget in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match="budget must be a positive number"):
                make(d, table, reward, budget)
        with pytest.raises(TypeError, match="reward must be given"):
            make(d, table)
        with pytest.raises(TypeError, match="table must be a Table"):
            make(d, "ddim", reward, 100)
        with pytest.raises(ValueError, match="grow must be"):
            make(d, table, reward, 100, grow="up")
    tree = tree_sample(d, table, reward, 8)
    assert len(tree.leaves) == 1
    for call, message in (
        (lambda: tree.best(2), "k must lie in 1 .. 1"),
        (lambda: tree.samples(0), "n must be"),
        (lambda: tree.samples(1, readout="x"), "readout"),
        (lambda: tree.samples(1, readout="visits"), "Boltzmann walks"),
        (lambda: tree_sample(d, table, reward, 80, widen=(1.0, 2.0), grow="walks"), "widen"),
        (lambda: tree_sample(d, table, reward, 80, scale=-1.0), "scale"),
        (lambda: tree_sample(d, table, reward, 80, memory=-1), "memory"),
        (lambda: Tree(discrete(), checked(reward)).samples(1), "no leaf yet"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_slopes_are_learned_from_real_rewards(problem):
    """Guesses that are the rewards deserve 1, guesses that are noise 0; both but for the prior's few leaves."""
    d, table = problem
    tree = tree_sample(d, table, lambda x: x[:, 0], 800, dtype=torch.float64)
    assert slopes(tree, 0.5)[-1] > 0.9
    for node in range(len(tree)):
        tree.guess[node] = float(np.sin(1e4 * node))
    assert slopes(tree, 0.5).max() < 0.4


def test_a_picture(problem, tmp_path):
    pytest.importorskip("matplotlib")
    d, table = problem
    for tree in (tree_sample(d, table, reward, 100), tree_search(d, table, reward, 100)):
        tree.plot(tmp_path / "tree.png")
        assert (tmp_path / "tree.png").stat().st_size > 5000


def gap(x, weights, picked):
    """W1 of weighted numbers to sorted ones of equal weight."""
    every, order = torch.cat([x, picked]).sort()
    signed = torch.cat([weights, torch.full((len(picked),), -1 / len(picked), dtype=torch.float64)])[order]
    return float((signed.cumsum(0)[:-1].abs() * every.diff()).sum())


@pytest.mark.parametrize("case", ["rare", "misleading"])
def test_populations_beat_what_they_were_made_to_beat(case):
    """Eight trees of 1000 calls: nearer to the target than importance sampling where the reward is rare, and than SMC
    steering where the reward of the denoised estimate misleads (it lies between the modes, and so does what pays)."""
    d = GaussianMixture([0.3, 0.7], [[-2.0], [1.5]], [0.16, 0.49]).denoiser(paths.edm())
    table = ddim(d.path, grids.karras(d.path, 10, t_max=20.0, t_min=0.02), eta=1.0)
    score, scale, other = {
        "rare": (lambda x: -((x[:, 0] + 3.3) ** 2), 10.0, importance),
        "misleading": (lambda x: -torch.minimum((x[:, 0] + 3).abs(), x[:, 0].abs()), 4.0, smc_steering),
    }[case]
    many = sample(d, starting_noise(99, 60_000, (1,), torch.float64), table, seed=99)
    share = (scale * score(many)).softmax(0).cumsum(0)
    picked = (
        many[torch.searchsorted(share, (torch.arange(1000) + 0.5) / 1000).clamp_max(len(many) - 1), 0]
        .sort()
        .values
    )
    ours, theirs = [], []
    for seed in range(8):
        tree = tree_sample(d, table, score, 1000, scale=scale, seed=seed, dtype=torch.float64)
        x = tree.leaf_states(range(len(tree.leaves)))[:, 0]
        ours.append(gap(x, tree.log_weights().softmax(0), picked))
        count = {"n": 100} if other is importance else {"particles": 100}
        noise = starting_noise(seed, torch.tensor([0]), (1,), torch.float64)
        _, drawn = other(d, noise, table, reward=score, scale=scale, seed=seed, **count)
        theirs.append(gap(drawn.x[0, :, 0], drawn.log_weights[0].double().softmax(0), picked))
    assert np.mean(ours) < 0.8 * np.mean(theirs), (ours, theirs)
