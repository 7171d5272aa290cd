"""Tree search: it finds what best-of-n finds, with fewer calls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.samplers import ddim, grids, sample, starting_noise
from fewstep.samplers.tree_search import improvement, prospects, tree_search

D = GaussianMixture([1.0], [[0.0] * 4], 1.0).denoiser(paths.edm())
TABLE = ddim(D.path, grids.karras(D.path, 10, t_max=20.0, t_min=0.02), eta=1.0)


def reward(x):
    return x.sum(1)


def test_expected_improvement_is_the_integral():
    draws = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    for mean, spread, best in ((0.3, 1.0, 0.0), (-2.0, 0.7, 0.5), (1.0, 2.0, 1.0)):
        gains = np.maximum(mean + spread * draws - best, 0)
        error = gains.std() / len(gains) ** 0.5
        assert abs(improvement(np.array([mean]), np.array([spread]), best)[0] - gains.mean()) < 4 * error


def expected_best(n, reward=reward):
    """The mean best reward of n rollouts of this very table, over 12 000 of them."""
    rewards = reward(sample(D, starting_noise(1, 12_000, (4,)), TABLE, seed=1))
    return float(rewards[: 12_000 // n * n].reshape(-1, n).amax(1).mean())


def test_search_reaches_best_of_n_in_a_third_of_its_calls():
    """48 rollouts cost 480 calls; searches of 160 find as much on average."""
    found = [float(tree_search(D, TABLE, reward, 160, seed=seed, batch=8).best()[1]) for seed in range(10)]
    assert np.mean(found) > expected_best(48)
    assert expected_best(16) < expected_best(48) - 0.4  # the control: 16 rollouts alone do not


def test_bounds_beat_best_of_n_at_equal_calls():
    trees = [tree_search(D, TABLE, reward, 320, seed=seed, grow="bounds", batch=4) for seed in range(8)]
    found = [float(tree.best()[1]) for tree in trees]
    assert np.mean(found) > expected_best(32)


def test_search_is_not_bound_by_guesses_that_mislead():
    """Denoised estimates of noise lie near 0, while the reward wants a length of 3.5: rollouts would do as well."""

    def misleads(x):
        return -(x.norm(dim=1) - 3.5).abs()

    found = [float(tree_search(D, TABLE, misleads, 240, seed=seed, batch=8).best()[1]) for seed in range(6)]
    assert np.mean(found) > expected_best(8, misleads)


@pytest.mark.parametrize(
    "other",
    [lambda r: r.exp(), lambda r: -((1 - r / 50) ** 3), lambda r: 1e4 * r - 7],
    ids=["exp", "cube", "affine"],
)
def test_search_is_the_same_for_every_increasing_function_of_the_reward(other):
    one = tree_search(D, TABLE, reward, 150, seed=3, dtype=torch.float64)
    two = tree_search(D, TABLE, lambda x: other(reward(x)), 150, seed=3, dtype=torch.float64)
    assert one.parent == two.parent and torch.equal(one.best()[0], two.best()[0])
    assert one.parent != tree_search(D, TABLE, lambda x: -reward(x), 150, seed=3, dtype=torch.float64).parent


def test_search_goes_on_where_the_reward_saturates():
    """log p(one of ten modes) is -10 or so for nine in ten rollouts and all but 0 for the tenth; 192 calls find what
    48 rollouts, three times as many calls, find on average, and far more surely than the 16 that they pay for."""
    angles = torch.arange(10, dtype=torch.float64) * math.pi / 5
    modes = 3 * torch.stack([angles.cos(), angles.sin()], 1)
    d = GaussianMixture([0.1] * 10, modes, [0.0625] * 10).denoiser(paths.edm())
    table = ddim(d.path, grids.karras(d.path, 12, t_max=20.0, t_min=0.02), eta=1.0)

    def log_p(x):
        return (-(x[:, None] - modes).square().sum(-1) / 0.72).log_softmax(-1)[:, 3]

    rewards = log_p(sample(d, starting_noise(1, 9600, (2,), torch.float64), table, seed=1))
    found = [float(tree_search(d, table, log_p, 192, seed=seed, batch=8, dtype=torch.float64).best()[1])
             for seed in range(8)]  # fmt: skip
    assert np.mean(found) > float(rewards.reshape(-1, 48).amax(1).mean())
    assert float(rewards.reshape(-1, 16).amax(1).mean()) < -0.3


def test_prospects_prefer_what_is_worth_more_and_costs_less():
    tree = tree_search(D, TABLE, reward, 100, batch=8)
    worth, price = prospects(tree)
    leaves = np.array(tree.leaves)
    assert (worth[leaves] < 0).all() and (worth[np.setdiff1d(np.arange(len(tree)), leaves)] >= 0).all()
    assert set(price.tolist()) <= {0, 1}


def test_greedy_and_soft_bounds_run_and_bad_options_do_not():
    for options in (dict(backup="soft"), dict(backup="max", explore=0.0)):
        tree = tree_search(D, TABLE, reward, 100, grow="bounds", **options)
        assert tree.calls <= 100 and tree.best()[1] == max(tree.rewards)
    for options, message in (
        (dict(grow="bounds", backup="mean"), "backup must be"),
        (dict(scale=0.0), "scale must be positive"),
        (dict(fresh=2.0), "fresh must lie in"),
        (dict(batch=0), "batch must be"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_search(D, TABLE, reward, 100, **options)
