"""Advantages, win rates, PPO's surrogate and the matching loss: by hand, by gradients, and where they must refuse."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.distill.levels import Times, time_at
from fewstep.distill.losses.policy import (
    clipped_surrogate,
    flat_groups,
    flow_level,
    group_advantages,
    judged_win_rates,
    matching_loss,
    rank_advantages,
    velocity_gap,
    win_rates,
)
from fewstep.distill.rollouts import advantages_of
from fewstep.models import paths

REWARDS = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 4.0, 4.0], dtype=torch.float64)


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_advantages_by_hand():
    group = group_advantages(REWARDS, 4)
    torch.testing.assert_close(group[:4], (REWARDS[:4] - 3) / REWARDS[:4].std(correction=0))
    torch.testing.assert_close(group[4:], torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    gap = torch.cat([REWARDS[:4] - 3, REWARDS[4:] - 2])
    torch.testing.assert_close(group_advantages(REWARDS, 4, "none"), gap)
    torch.testing.assert_close(group_advantages(REWARDS, 4, "global"), gap / REWARDS.std(correction=0))
    torch.testing.assert_close(group_advantages(REWARDS, 4, "global", spread=torch.tensor(2.0)), gap / 2)
    torch.testing.assert_close(group_advantages(REWARDS, 4, "none", clip=1.0), gap.clamp(-1, 1))


def test_a_flat_group_has_no_advantage_however_they_are_made_and_others_keep_theirs():
    # one constant but for rounding, one whose gaps are smaller than asked for, one that says something
    rewards = torch.tensor([5e3, 5e3 + 5e-4, 5e3, 0.0, 1e-7, 2e-7, 0.0, 1.0, 3.0])
    assert flat_groups(rewards, 3).tolist() == [True, True, False]
    assert flat_groups(rewards, 3, least_spread=1e-9).tolist() == [True, False, False]
    for kind in ("group", "global", "none", "wins", "ranks"):
        found = advantages_of(kind, rewards, 3)
        assert (found[:6] == 0).all() and found[6] < 0 < found[8], kind
    # the control: what released code's 1e-4 beside the standard deviation makes of a gap of 1e-4
    tiny = torch.tensor([0.0, 2e-4])
    assert ((tiny - tiny.mean()) / (tiny.std(correction=0) + 1e-4))[1] == pytest.approx(0.5)
    assert group_advantages(tiny, 2, least_spread=1e-3).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["group", "wins", "ranks"])
def test_an_affine_map_of_the_reward_changes_nothing(kind):
    torch.testing.assert_close(advantages_of(kind, 7 * REWARDS - 3, 4), advantages_of(kind, REWARDS, 4))


def test_win_rates_by_hand():
    expected = [0, 1 / 3, 2 / 3, 1, 1 / 6, 1 / 6, 5 / 6, 5 / 6]
    torch.testing.assert_close(win_rates(REWARDS, 4), torch.tensor(expected, dtype=torch.float64))
    assert win_rates(REWARDS, 4, tie=1.0)[:4].tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2, 1])

    def judge(a, b):
        return (a > b)[:, 0].double() + 0.5 * (a == b)[:, 0].double()

    torch.testing.assert_close(judged_win_rates(judge, REWARDS[:, None], 4), win_rates(REWARDS, 4).float())
    torch.testing.assert_close(rank_advantages(REWARDS, 4), 2 * win_rates(REWARDS, 4) - 1)
    # a bounded reward's outlier does not drown the rest, as it does where rewards are standardised
    outlier = torch.tensor([0.0, 1.0, 2.0, 1e6])
    standard, ranks = group_advantages(outlier, 4), rank_advantages(outlier, 4)
    assert standard[2] - standard[0] < 1e-4 and ranks[2] - ranks[0] == pytest.approx(4 / 3)


def test_judges_that_do_not_answer_shares_are_refused():
    x = REWARDS[:, None]
    with pytest.raises(ValueError, match="from 0 to 1"):
        judged_win_rates(lambda a, b: (a - b)[:, 0], x, 4)
    with pytest.raises(ValueError, match="12 pairs"):
        judged_win_rates(lambda a, b: a > b, x, 4)


@pytest.mark.parametrize("count, group", [(0, 4), (8, 1), (8, 0), (8, 3), (2, 4)])
def test_groups_that_are_none_are_refused(count, group):
    for function in (group_advantages, win_rates, rank_advantages, flat_groups):
        with pytest.raises(ValueError, match="group"):
            function(REWARDS[:count], group)


def test_ppo_at_ratio_one_is_the_policy_gradient():
    """The gradient of the surrogate is that of -A log p, exactly, and not off it."""
    mean = normals(3).requires_grad_()
    x, advantage = normals(50, 3, seed=1), normals(50, seed=2)

    def log_p(mean):
        return -0.5 * (x - mean).square().sum(1)

    wanted = torch.autograd.grad(-(advantage * log_p(mean)).mean(), mean)[0]
    ratio = (log_p(mean) - log_p(mean).detach()).exp()
    assert (ratio == 1).all()
    found = torch.autograd.grad(clipped_surrogate(ratio, advantage, 0.2).mean(), mean)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-15)
    away = (log_p(mean) - log_p(mean.detach() + 0.3)).exp()
    other = torch.autograd.grad(clipped_surrogate(away, advantage, 0.2).mean(), mean)[0]
    assert (other - wanted).norm() > 0.1 * wanted.norm()


def test_ppo_clips_only_where_the_advantage_pushes_further():
    ratio = torch.tensor([0.5, 0.5, 1.1, 1.5, 1.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    loss = clipped_surrogate(ratio, advantage, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 0.8, -1.1, -1.2, 1.5]))
    loss.sum().backward()
    assert ratio.grad.tolist() == [-1.0, 0.0, -1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="clip"):
        clipped_surrogate(ratio, advantage, 0.0)


@pytest.mark.parametrize("path", [paths.vp_linear(), paths.edm(), paths.flow()], ids=lambda p: p.name)
def test_the_matching_loss_is_the_flow_s_on_every_path(path):
    """|v - (eps - x0)|^2 with v of the flow that is as noisy, whose x_t is the path's over its scale."""
    t = path.time_of_rho(torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64))
    alpha, sigma = path.alpha(t), path.sigma(t)
    x0, eps, estimate = (normals(3, 4, seed=k) for k in range(3))
    x_t = path.add_noise(x0, t, eps)
    at, y = flow_level(alpha, sigma), x_t / (alpha + sigma)[:, None]
    v = (y - estimate) / at[:, None]
    wanted = (v - (eps - x0)).square().mean(1)
    torch.testing.assert_close(matching_loss(estimate, x0, alpha, sigma), wanted)
    torch.testing.assert_close(matching_loss(estimate, x0, alpha, sigma, "t"), at * wanted)
    robust = (wanted + 1e-10) ** 0.25 * 4 * at
    torch.testing.assert_close(
        matching_loss(estimate, x0, alpha, sigma, "t", 0.25), robust, rtol=0, atol=0.02
    )
    torch.testing.assert_close(velocity_gap(estimate, estimate, alpha, sigma), torch.zeros_like(wanted))


@pytest.mark.parametrize("path", [paths.vp_linear(), paths.edm(), paths.flow()], ids=lambda p: p.name)
def test_logistic_levels_are_a_flow_s_uniform_ones_shifted_on_every_path(path):
    share = torch.linspace(0.02, 0.9, 9, dtype=torch.float64)
    for shift in (1.0, 3.0):
        t = time_at(Times("logistic", mean=math.log(shift)), path, share)
        found = flow_level(path.alpha(t), path.sigma(t))
        torch.testing.assert_close(found, shift * share / (1 + (shift - 1) * share), rtol=1e-9, atol=0)


def test_the_robust_loss_bounds_the_push_of_what_is_far_off():
    """d/dD of the plain loss grows with the error; of the power 0.25 it falls. At 0 neither is infinite."""
    pushes = []
    for size in (0.0, 0.1, 10.0):
        estimate = torch.full((1, 4), size, dtype=torch.float64, requires_grad=True)
        for power in (1.0, 0.25):
            loss = matching_loss(estimate, torch.zeros_like(estimate), 0.5, 0.5, "t", power)
            pushes.append(float(torch.autograd.grad(loss.sum(), estimate)[0].norm()))
    nothing, nothing_robust, near, near_robust, far, far_robust = pushes
    assert nothing == nothing_robust == 0
    assert far == pytest.approx(100 * near) and far_robust < near_robust < 100 * near


@pytest.mark.parametrize(
    "options, word", [({"weight": "edm"}, "weight"), ({"power": 0.0}, "power"), ({"power": 2.0}, "power")]
)
def test_bad_matching_options(options, word):
    with pytest.raises(ValueError, match=word):
        matching_loss(torch.zeros(2, 1), torch.zeros(2, 1), 0.5, 0.5, **options)
    with pytest.raises(ValueError, match="scale"):
        group_advantages(REWARDS, 4, "batch")
    with pytest.raises(ValueError, match="clip"):
        group_advantages(REWARDS, 4, clip=0.0)
