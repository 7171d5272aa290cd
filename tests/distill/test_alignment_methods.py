"""AWM, the policy gradient and RAFT on laws whose answers are known, and as methods of the trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.distill.draws import Draws
from fewstep.distill.levels import Times
from fewstep.distill.losses.policy import matching_loss
from fewstep.distill.methods.awm import AWM
from fewstep.distill.methods.grpo import GRPO
from fewstep.distill.methods.raft import RAFT, chosen
from fewstep.distill.players import Batch, Players
from fewstep.distill.rollouts import Rollout, grouped, seed_of, spread_of
from fewstep.distill.schema import read
from fewstep.distill.student import Student, many_steps
from fewstep.models import Denoiser, GaussianMixture, paths
from fewstep.samplers import ddim, grids, sample

DIM = 2
DIRECTION = torch.tensor([0.6, 0.8], dtype=torch.float64)
ANCESTRAL = Rollout("ddim", 8, "vp", {"eta": 1.0})


class Posterior(nn.Module):
    """The exact denoiser of N(m, s^2 I) on the EDM path, m its parameter."""

    def __init__(self, spread: float = 0.8):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
        self.spread = spread

    def forward(self, x, t):
        noise, own = t.reshape(-1, 1) ** 2, self.spread**2
        return (noise * self.mean + own * x) / (noise + own)


def gaussian_players(reward=lambda x: x @ DIRECTION.to(x), steps=8):
    def denoiser():
        net = Posterior()
        return Denoiser(net, paths.edm(), predicts="x0", net=net, shape=(DIM,), dtype=torch.float64)

    student = denoiser()
    teacher = denoiser()
    teacher.net.requires_grad_(False)
    return Players(teacher, many_steps(student, "abm", steps), reward=reward)


def batch_of(count, turn=0, seed=0, cond=None):
    return Batch(Draws(seed, turn, 0, count, count), (DIM,), cond or {})


def ready(method, players, batch):
    """The batch as the trainer hands it to the loss."""
    with torch.no_grad():
        batches, numbers = method.settle([batch._replace(collected=method.collect(players, batch))])
    return batches[0], numbers


def gradient(method, players, batch):
    loss, _ = method.student_loss(players, batch)
    return torch.autograd.grad(loss, players.student.d.net.mean)[0]


def test_on_policy_awm_is_the_matching_loss_weighed_by_advantages():
    players = gaussian_players()
    method = AWM(reward="ink", group=8, updates=1, beta=0.0, objective="on_policy", repeats=2)
    batch, _ = ready(method, players, batch_of(64))
    found = gradient(method, players, batch)
    seen = method.noised(players, batch, batch.collected.x0)
    assert len(seen.x_t) == 128
    error = matching_loss(players.student.d(seen.x_t, seen.t), seen.x0, seen.alpha, seen.sigma)
    weighed = (batch.collected.advantages.repeat_interleave(2) * error).mean()
    torch.testing.assert_close(found, torch.autograd.grad(weighed, players.student.d.net.mean)[0])
    # it is the clipped objective's first gradient, too, and not that of a matching loss without advantages
    clipped = gradient(AWM(reward="ink", group=8, updates=1, beta=0.0, repeats=2), players, batch)
    torch.testing.assert_close(found, clipped, rtol=1e-14, atol=0.0)
    bare = torch.autograd.grad(
        matching_loss(players.student.d(seen.x_t, seen.t), seen.x0, seen.alpha, seen.sigma).mean(),
        players.student.d.net.mean,
    )[0]
    assert (bare - found).norm() > 0.3 * found.norm()


METHODS = {
    "awm": AWM(reward="ink", group=16, updates=1, beta=0.0),
    "grpo": GRPO(reward="ink", group=16, updates=1, beta=0.0, rollout=ANCESTRAL),
    "grpo on flow_sde": GRPO(
        reward="ink", group=16, beta=0.0, rollout=Rollout("flow_sde", 8, "vp", {"scheme": "preserving"})
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_mean_gradient_points_to_the_tilted_optimum(name):
    """p exp(a.x / beta) of N(m, s^2) is N(m + s^2 a / beta, s^2): downhill is a, and nothing across it."""
    players = gaussian_players()
    found = []
    for seed in range(24):
        batch, _ = ready(METHODS[name], players, batch_of(256, seed=seed))
        found.append(-gradient(METHODS[name], players, batch).detach())
    mean = torch.stack(found).mean(0)
    error = torch.stack(found).std(0) / math.sqrt(len(found))
    across = torch.stack([-DIRECTION[1], DIRECTION[0]])
    assert mean @ DIRECTION > 10 * error.norm()
    assert abs(mean @ across) < 4 * error.norm()


def test_awm_s_mean_gradient_has_the_length_that_theory_gives_it():
    """2 E[w g A (x0 - D)] = 2 w g c / s along a, with g = dD/dm, c the posterior variance, w the flow's weight."""
    rho, spread = 1.3, 0.8
    players = gaussian_players(steps=24)  # samples of the very law, not of eight steps of it
    here = Times("logistic", mean=math.log(rho), std=1e-9)
    method = AWM(reward="ink", group=256, updates=1, beta=0.0, times=here)
    found = []
    for seed in range(30):
        batch, _ = ready(method, players, batch_of(256, seed=seed))
        found.append(-gradient(method, players, batch).detach() @ DIRECTION)
    total = rho**2 + spread**2
    share, posterior = rho**2 / total, rho**2 * spread**2 / total
    wanted = 2 * (1 + 1 / rho) ** 2 * share * posterior / spread / DIM
    mean, error = torch.stack(found).mean(), torch.stack(found).std() / math.sqrt(len(found))
    assert abs(mean - wanted) < 4 * error and error < 0.05 * wanted


def test_a_pass_of_awm_tells_more_than_one_of_a_policy_gradient():
    """The paper's claim, for passes that are trained on: squared signal to noise of the gradient over their number."""
    told = {}
    policy = GRPO(reward="ink", group=16, beta=0.0, rollout=Rollout("ddim", 20, "vp", {"eta": 1.0}))
    for name, method, steps in (("awm", METHODS["awm"], 20), ("policy", policy, 20)):
        players, found = gaussian_players(steps=steps), []
        for seed in range(30):
            batch, numbers = ready(method, players, batch_of(256, seed=seed))
            found.append(-gradient(method, players, batch).detach())
        each = torch.stack(found)
        told[name] = float(
            (each.mean(0) @ DIRECTION) ** 2 / each.var(0).sum() / (numbers["passes"] - 256 * steps)
        )
    # some eight times as much here; the ratio of two variances of 60 numbers each has an error of a quarter
    assert told["awm"] > 4 * told["policy"], told


def test_the_first_update_of_a_policy_gradient_has_ratio_one_to_the_bit_and_later_ones_do_not():
    players = gaussian_players()
    method = GRPO(reward="ink", group=8, updates=2, beta=0.0, rollout=ANCESTRAL)
    batch, _ = ready(method, players, batch_of(32))
    made = batch.collected
    table = ANCESTRAL.table(players.student)
    plain = sample(players.student.d, made.points[0] / 80, table, seed=seed_of(batch), ids=batch.draws.ids)
    torch.testing.assert_close(made.points[-1], plain)  # the rollouts are the sampler's own samples
    for k, step in enumerate(made.steps):
        x, after = made.points[step.row], made.points[step.row + 1]
        again = method._log_prob(step, after, x, players.student.d(x, step.t))
        assert torch.equal(again, made.old[k])
    with torch.no_grad():
        players.student.d.net.mean.add_(0.3)
    _, numbers = method.student_loss(players, batch)
    assert numbers["clipped"] > 0


def test_steps_that_draw_nothing_and_those_beyond_the_share_are_not_trained():
    players = gaussian_players()
    batch = batch_of(16)
    for share, steps in ((1.0, 7), (0.5, 4), (0.1, 1)):
        method = GRPO(reward="ink", group=8, rollout=ANCESTRAL, share=share)
        made = ready(method, players, batch)[0].collected
        assert [step.row for step in made.steps] == list(range(steps))
    # the KL is of them all: of what is not trained one step an update, with the weight of the rest
    method = GRPO(reward="ink", group=8, rollout=ANCESTRAL, share=0.5, updates=3)
    ready_batch, numbers = ready(method, players, batch)
    assert [step.row for step in ready_batch.collected.rest] == [4, 5, 6]
    assert numbers["passes"] == 16 * (8 + 3 * (4 * 4 + 4))
    with torch.no_grad():
        players.student.d.net.mean.add_(0.1)
    held, found = [], []
    for again in range(3):
        now = ready_batch._replace(draws=ready_batch.draws._replace(turn=again))
        held += [step.row for step in method._held(now)]
        found.append(method.student_loss(players, now)[1]["kl"])
    assert sorted(held) == [4, 5, 6]
    every = []
    for step in (*ready_batch.collected.steps, *ready_batch.collected.rest):
        x = ready_batch.collected.points[step.row]
        every.append(step.divergence(players.student.d(x, step.t), players.teacher(x, step.t)).mean())
    torch.testing.assert_close(torch.stack(found).mean() * 4, torch.stack(every).sum())
    with torch.no_grad():
        players.student.d.net.mean.zero_()
    method = GRPO(reward="ink", group=8, rollout=ANCESTRAL, each=3, updates=3)
    ready_batch, numbers = ready(method, players, batch)
    chosen_steps = []
    for again in range(3):
        draws = ready_batch.draws._replace(turn=again)
        chosen_steps += method._chosen(ready_batch._replace(draws=draws), 7)
    assert len(chosen_steps) == 9 and set(chosen_steps) == set(range(7))
    assert numbers["passes"] == 16 * (8 + 3 * 3 * 4)


def test_presets_are_what_was_released():
    _, matching = read({"method": {"name": "awm", "preset": "awm", "reward": "ink"}})
    assert matching.power == 0.25 and matching.weight == "t" and matching.updates == 1
    for preset in ("ddpo", "flow_grpo"):
        _, method = read({"method": {"name": "grpo", "preset": preset, "reward": "ink"}})
        assert method.log_prob == "mean" and method.clip == 1e-4
    assert method.kl == "released" and method.beta == 0.04 and method.advantage == "global"
    # |difference of means|^2 / (2 S^2), the mean over elements, on Flow-GRPO's table
    flow = GaussianMixture([1.0], [[0.0] * DIM], 1.0).denoiser(paths.flow())
    other = GaussianMixture([1.0], [[0.5] * DIM], 1.0).denoiser(paths.flow())
    players = Players(
        other, Student(flow, ddim(flow.path, grids.uniform(flow.path, 4))), reward=lambda x: x[:, 0]
    )
    method.rollout = Rollout("flow_sde", 4, "uniform")
    method.group = 8
    batch, _ = ready(method, players, batch_of(8))
    _, numbers = method.student_loss(players, batch)
    gaps, times = [], np.linspace(1, 0, 5)
    for step in batch.collected.steps:
        x = batch.collected.points[step.row]
        t, dt = times[step.row], times[step.row] - times[step.row + 1]
        variance = 0.49 * t / (1 - (times[1] if t == 1 else t))
        apart = (step.gain * (flow(x, step.t) - other(x, step.t))).square().mean(1)
        assert step.std**2 == pytest.approx(variance * dt)
        gaps.append((apart / (2 * variance)).mean())
    torch.testing.assert_close(numbers["kl"], torch.stack(gaps).mean())


def test_a_judge_of_pairs_takes_the_place_of_a_reward(monkeypatch):
    import sys
    import types

    module = types.ModuleType("judges.mine")
    module.left_wins = lambda a, b: (a[:, 0] < b[:, 0]).float()
    monkeypatch.setitem(sys.modules, "judges", types.ModuleType("judges"))
    monkeypatch.setitem(sys.modules, "judges.mine", module)
    method = GRPO(judge="judges.mine:left_wins", advantage="wins", group=4, rollout=ANCESTRAL)
    batch, numbers = ready(method, gaussian_players()._replace(reward=None), batch_of(16))
    place = batch.collected.points[-1][:, 0].reshape(4, 4)
    wins = (place[:, :, None] < place[:, None, :]).double().sum(2) / 3
    torch.testing.assert_close(batch.collected.rewards.reshape(4, 4), wins.float())
    assert (batch.collected.advantages.reshape(4, 4).argmax(1) == place.argmin(1)).all()
    with pytest.raises(ValueError, match="judge must be package.module:function"):
        GRPO(judge="left", advantage="wins", group=4, rollout=ANCESTRAL).collect(
            gaussian_players(), batch_of(8)
        )


# --- RAFT -------------------------------------------------------------------------------------------------------------

WEIGHTS = (0.5, 0.3, 0.2)
MODES = torch.tensor([[-4.0, 0.0], [0.0, 0.0], [4.0, 0.0]])


def mode_players(values):
    d = GaussianMixture(WEIGHTS, MODES.numpy(), 0.01).denoiser(paths.edm())

    def reward(x):
        return torch.tensor(values)[torch.cdist(x.float(), MODES).argmin(1)]

    return Players(d, Student(d, ddim(d.path, grids.vp(d.path, 12), eta=1.0)), reward=reward)


def masses(x):
    return torch.bincount(torch.cdist(x.float(), MODES).argmin(1), minlength=3) / len(x)


def test_best_of_k_has_the_law_that_theory_gives_it():
    """w_k' = F_k^K - F_(k-1)^K, F the distribution function of the reward; whatever the reward's scale."""
    for values in ((0.0, 1.0, 2.0), (-5.0, 0.0, 1e4)):
        players = mode_players(values)
        made = RAFT(reward="ink", group=3, base=0.0).collect(players, batch_of(3 * 1500))
        below = np.cumsum([0.0, *masses(sample_of(players, 4500)).tolist()])  # the table's own weights
        wanted = np.diff(below**3)
        live = made.weights > 0
        error = np.sqrt(wanted * (1 - wanted) / 1500 + 9 * 0.25 / 4500)
        # a flat group weighs nothing, so it stands here by what it was
        assert np.all(np.abs(masses(made.x0).numpy() - wanted) < 4 * error)
        assert 0.05 < 1 - float(live.float().mean()) < 0.4  # and groups of one mode alone are flat
    assert masses(made.x0)[2] > 2 * masses(sample_of(players, 4500))[2]


def sample_of(players, count):
    noise = Draws(1, 0, 0, count, count).normal("start", (DIM,))
    return players.student.sample(noise, seed=5)


def test_what_is_kept_by_hand():
    rewards = torch.tensor([0.0, 3.0, 1.0, 1.0, 5.0, 4.0])
    index, weights = chosen(rewards, 2, "best")
    assert index.tolist() == [1, 2, 4] and weights.tolist() == [1.0, 0.0, 1.0]
    index, weights = chosen(rewards, 2, "top")
    assert sorted(index.tolist()) == [1, 4, 5] and weights.tolist() == [1.0, 1.0, 1.0]
    index, weights = chosen(rewards, 2, "rwr", temperature=2.0)
    own = (rewards.reshape(3, 2) / 2).softmax(1) * 2
    own[1] = 0
    assert index.tolist() == list(range(6))
    torch.testing.assert_close(weights, own.flatten())


def test_steered_proposals_find_the_tilted_law_and_the_best_mode():
    values = (0.0, 0.1, 0.3)
    players, batch = mode_players(values), batch_of(48 * 60)
    steered = RAFT(reward="ink", group=48, base=0.0, proposals="feynman_kac", scale=10.0)
    made = steered.collect(players, batch)
    own = masses(sample_of(players, 4500)).numpy()
    wanted = own * np.exp(10 * np.array(values))
    wanted /= wanted.sum()
    found = masses(made.x0).numpy()
    assert made.x0.shape == (60, DIM) and made.calls == 12
    error = np.sqrt(wanted * (1 - wanted) / 60 + own * (1 - own) / 4500)
    assert np.all(np.abs(found - wanted) < 4 * error) and found[2] > own[2] + 4 * error[2]
    searched = RAFT(reward="ink", group=32, base=0.0, proposals="tree_search")
    made = searched.collect(players, batch_of(32 * 10))
    assert made.x0.shape == (10, DIM) and masses(made.x0)[2] > 0.7
    assert made.weights.min() == 1 and made.calls <= 12


def test_the_base_s_samples_are_a_share_and_come_from_the_base():
    players = mode_players((0.0, 0.0, 1.0))
    made = RAFT(reward="ink", group=4, base=0.5).collect(players, batch_of(400))
    assert len(made.x0) == 200 and masses(made.x0[:100])[2] > 2 * masses(made.x0[100:])[2]
    assert abs(masses(made.x0[100:])[0] - 0.5) < 4 * math.sqrt(0.25 / 100)
    with pytest.raises(ValueError, match="is 0 of the base"):
        RAFT(reward="ink", group=4, base=0.1).collect(players, batch_of(4))
    with pytest.raises(ValueError, match="is 24 of the base"):
        RAFT(reward="ink", group=4, base=0.75, keep="rwr").collect(players, batch_of(8))


# --- groups, parts, options -------------------------------------------------------------------------------------------


def test_a_group_has_one_condition():
    label = torch.arange(8)
    cond = {"label": label, "more": {"text": label[:, None] * 10}, "scale": 2.0}
    batch = grouped(batch_of(8, cond=cond), 4)
    assert batch.cond["label"].tolist() == [0] * 4 + [4] * 4 and batch.cond["scale"] == 2.0
    assert batch.cond["more"]["text"][:, 0].tolist() == [0] * 4 + [40] * 4


def test_a_global_spread_is_of_all_parts_and_ranks():
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0)) + 1e3
    parts = rewards.split(8)

    def batch(rank):
        draws = Draws(0, 0, 8 * rank, 8, 24)
        return Batch(draws, (DIM,), {})

    alone = spread_of([batch(k) for k in range(3)], list(parts))
    waiting = []

    def reduce(value):  # of two ranks, the second of which has one part
        waiting.append(value)
        return value + others[len(waiting) - 1]

    others = [parts[2].double().sum(), (parts[2].double() - rewards.double().mean()).square().sum()]
    two = spread_of([batch(k)._replace(reduce=reduce) for k in range(2)], list(parts[:2]))
    torch.testing.assert_close(two, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(alone[0], rewards.double().std(correction=0))


@pytest.mark.parametrize("method", [AWM, GRPO, RAFT])
def test_groups_must_lie_within_a_part(method):
    players = gaussian_players()
    with pytest.raises(ValueError, match="whole groups of method.group = 8, got 12 samples"):
        method(reward="ink", group=8, rollout=ANCESTRAL).collect(players, batch_of(12))
    with pytest.raises(ValueError, match="group must be 2 or more"):
        method(reward="ink", group=1)
    with pytest.raises(ValueError, match="method.reward must be given"):
        method(group=4, rollout=ANCESTRAL).collect(players._replace(reward=None), batch_of(8))


@pytest.mark.parametrize(
    "rollout, word",
    [
        (Rollout("ddim", 4), "must draw noise"),
        (Rollout("abm", 4), "no history"),
        (Rollout("sde_dpmpp", 6), "no history"),
        (Rollout("student"), "no history"),
        (Rollout("euler_maruyama", 4), "solver must be one of"),
        (Rollout("ddim", 0), "steps must be 1"),
    ],
)
def test_a_policy_gradient_wants_a_stochastic_table_without_history(rollout, word):
    with pytest.raises(ValueError, match=word):
        GRPO(reward="ink", group=4, rollout=rollout).collect(gaussian_players(), batch_of(8))


def test_steered_proposals_want_a_stochastic_table():
    for proposals in ("feynman_kac", "tree_search"):
        method = RAFT(reward="ink", group=4, proposals=proposals, base=0.0, rollout=Rollout("ddim", 6))
        with pytest.raises(ValueError, match="draws noise"):
            method.collect(gaussian_players(), batch_of(8))
        method.rollout = (
            Rollout()
        )  # the student's own draws none, and its calls are walked by ancestral steps
        made = method.collect(gaussian_players(reward=lambda x: x[:, 0].float(), steps=6), batch_of(8))
        assert made.calls <= 6


@pytest.mark.parametrize(
    "method, options, word",
    [
        (AWM, {"advantage": "best"}, "advantage"),
        (AWM, {"objective": "off_policy"}, "objective"),
        (AWM, {"kl": "step"}, "kl"),
        (AWM, {"updates": 0}, "updates"),
        (AWM, {"updates": 1, "beta_old": 1.0}, "beta_old"),
        (AWM, {"repeats": 0}, "repeats"),
        (AWM, {"beta": -1.0}, "beta"),
        (GRPO, {"clip": 0.0}, "clip"),
        (GRPO, {"share": 0.0}, "share"),
        (GRPO, {"each": -1}, "each"),
        (GRPO, {"log_prob": "max"}, "log_prob"),
        (GRPO, {"kl_of": "none"}, "kl_of"),
        (GRPO, {"judge": "a.b:c"}, "judge"),
        (RAFT, {"keep": "worst"}, "keep"),
        (RAFT, {"proposals": "beam"}, "proposals"),
        (RAFT, {"proposals": "tree_search", "keep": "top"}, "keep"),
        (RAFT, {"base": 1.0}, "base"),
        (RAFT, {"temperature": 0.0}, "temperature"),
        (RAFT, {"updates": 0}, "updates"),
    ],
)
def test_bad_options_are_named(method, options, word):
    with pytest.raises(ValueError, match=f"method.{word}"):
        method(reward="ink", **options)
