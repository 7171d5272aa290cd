"""AWM, GRPO and RAFT as runs: resumed to the bit, whole or in parts, nothing learned from nothing, rewards rise."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fewstep.distill.cast import cast
from fewstep.distill.opening import open_batches, open_teacher
from fewstep.distill.run import run
from fewstep.distill.saved import open_student
from fewstep.distill.schema import read
from fewstep.distill.training import Trainer

# the 25 modes with the exact teacher as the base; ink of a point is half the mean of its coordinates
POINTS = {
    "kind": "distill",
    "name": "points",
    "threads": 1,
    "teacher": {"path": "mixture", "on_path": "edm"},
    "student": {
        "sampler": "ddim",
        "steps": 6,
        "warm_up": 4,
        "net": {"type": "mlp", "dim": 2, "hidden_size": 16, "depth": 1},
    },
    "data": {"path": "mixture"},
    "optim": {"lr": 0.003},
    "train": {"iters": 4, "batch": 16, "ema": 0.5},
    "report": {"validate": 4, "checkpoint": 2, "grid": 1000000, "exam": 64, "teacher_calls": 6},
}
SHARED = {"reward": "ink", "group": 4, "updates": 2}
SDE = {"sampler": "flow_sde", "steps": 5}
METHODS = {
    "awm": {"name": "awm", **SHARED, "beta": 0.1, "beta_old": 0.1, "advantage": "global"},
    "grpo": {"name": "grpo", **SHARED, "each": 2, "share": 0.7, "rollout": SDE},
    "prefgrpo": {"name": "grpo", **SHARED, "updates": 1, "advantage": "wins", "rollout": SDE},
    "raft": {"name": "raft", **SHARED},
}


def points(method, *words):
    return read({**POINTS, "method": METHODS[method]}, list(words))


def trainer_of(method, *words):
    recipe, made = points(method, *words)
    torch.set_num_threads(1)
    teacher = open_teacher(recipe)
    data = open_batches(recipe, teacher)
    return Trainer(recipe, made, cast(recipe, made, teacher, data), data)


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.players.student.d.net.parameters()])


@pytest.mark.parametrize("method", ["awm", "grpo", "raft"])
def test_a_run_that_stopped_is_the_unbroken_one(method, tmp_path):
    source = {**POINTS, "method": METHODS[method]}
    whole = run(source, [f"out={tmp_path / 'whole'}"])
    for iters in (2, 4):
        broken = run(source, [f"out={tmp_path / 'broken'}", f"train.iters={iters}"])
    ours, theirs = (load_file(folder / "student.safetensors") for folder in (broken, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["main"] == -lines[-1]["reward"] and lines[-1]["passes"] > 0
    student, recipe, _ = open_student(whole)
    assert student.table.solver == "ddim" and recipe.method["reward"] == "ink"


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_that_is_constant_makes_no_update_and_this_is_said(method, tmp_path):
    trainer = trainer_of(method)
    trainer.turn()  # so that there is momentum
    before, average = weights_of(trainer), [p.clone() for p in trainer.average]
    moments = [{k: v.clone() for k, v in s.items()} for s in trainer.optimizers["student"].state.values()]
    trainer.players = trainer.players._replace(reward=lambda x: torch.full((len(x),), 0.3))
    said = trainer.turn()
    assert torch.equal(weights_of(trainer), before) and said["flat_groups"] == 1 and "loss" not in said
    after = list(trainer.optimizers["student"].state.values())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(after, moments, strict=True) for k in b)
    assert trainer.iteration == 2 and len(average) == len(trainer.average)
    trainer.players = trainer.players._replace(reward=lambda x: x[:, 0])
    assert "loss" in trainer.turn() and not torch.equal(weights_of(trainer), before)


def test_a_reward_that_is_none_is_refused():
    with pytest.raises(ValueError, match="did you mean ink"):
        trainer_of("awm", "reward=inc")
    with pytest.raises(ValueError, match="method.reward must be given"):
        trainer_of("grpo", "method.reward=null").turn()


def test_flat_rewards_are_complained_of():
    from fewstep.distill.diagnostics import Watch

    watch = Watch(100)
    assert any("constant" in words for words in watch({"iteration": 1, "flat_groups": 1.0}))
    assert watch({"iteration": 2, "flat_groups": 1.0}) == []
    assert Watch(100)({"iteration": 1, "flat_groups": 0.4}) == []
    often = Watch(100, memory=1)
    assert [bool(often({"iteration": k, "flat_groups": 0.8})) for k in (1, 21, 22)] == [False, True, False]


@pytest.mark.parametrize("method", ["awm", "grpo", "prefgrpo"])
def test_a_batch_in_parts_is_the_batch(method):
    made = {}
    for parts in (1, 2):
        trainer = trainer_of(method, f"train.accumulate={parts}")
        said = trainer.turn()
        made[parts] = weights_of(trainer), said
    start = weights_of(trainer_of(method))
    moved = (made[1][0] - start).norm()
    assert (made[1][0] - made[2][0]).norm() < 1e-3 * moved
    for key in ("passes", "rollout_reward", "flat_groups", "loss"):
        assert made[1][1][key] == pytest.approx(made[2][1][key], rel=1e-4, abs=1e-6), key
    with pytest.raises(ValueError, match="whole groups of method.group = 4, got 2 samples"):
        trainer_of(method, "train.accumulate=8").turn()


def test_two_ranks_make_the_updates_of_one(tmp_path, on_two_ranks):
    """Spreads, flat groups and passes are the whole batch's, whoever holds its parts; so is the choice of steps."""
    source = {name: {**POINTS, "method": METHODS[name]} for name in ("awm", "grpo")}
    on_two_ranks(
        f"for name, source in {source!r}.items():\n"
        f"    run.run(source, ['out={tmp_path}/two-' + name, 'train.iters=2'])"
    )
    for name in source:
        one = run(source[name], [f"out={tmp_path}/one-{name}", "train.iters=2"])
        numbers = [
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (one, tmp_path / f"two-{name}/points")
        ]
        for ours, theirs in zip(*numbers, strict=True):
            for key in ("loss", "rollout_reward", "flat_groups", "passes"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), (name, key)


def test_the_first_update_of_awm_is_the_same_whatever_the_objective():
    one, other = (trainer_of("awm", f"method.objective={o}", "method.updates=1", "method.beta_old=0")
                  for o in ("clipped", "on_policy"))  # fmt: skip
    one.turn(), other.turn()
    assert torch.equal(weights_of(one), weights_of(other))
    later, different = (
        trainer_of("awm", f"method.objective={o}", "method.clip=1e-4") for o in ("clipped", "on_policy")
    )
    later.turn(), different.turn()
    assert not torch.equal(weights_of(later), weights_of(different))


def unrelated(x):
    """A number of each sample that nothing can be learned of."""
    return torch.frac(1e4 * x.double().sum(1)).abs().float()


RISING = {
    "awm": ["method.beta=0.05", "method.updates=4", "method.beta_old=0"],
    "grpo": ["method.beta=0", "method.updates=2", "method.each=0"],
    "prefgrpo": ["method.beta=0", "method.updates=2"],
    "raft": ["method.updates=4", "method.base=0.1"],
}


@pytest.mark.parametrize("method", RISING)
def test_the_reward_rises_and_an_untouched_control_s_does_not(method):
    """On held-out noise, in standard errors of the difference to the base."""
    words = [*RISING[method], "train.batch=128", "optim.lr=0.001", "student.warm_up=80", "method.group=8"]
    noise, other = torch.randn(2, 512, 2, generator=torch.Generator().manual_seed(1))

    def ink(trainer, noise):
        return trainer.players.student.sample(noise, seed=3).mean(1) / 2

    risen = {}
    for what, reward in (("trained", None), ("unrelated", unrelated)):
        trainer = trainer_of(method, *words)
        if reward is not None:
            trainer.players = trainer.players._replace(reward=reward)
        before, untouched = ink(trainer, other), ink(trainer, noise)
        for _ in range(12):
            trainer.turn()
        after = ink(trainer, noise)
        for key, values in ((what, after), ("untouched", untouched)):
            error = ((before.var() + values.var()) / 512) ** 0.5
            risen[key] = float((values.mean() - before.mean()) / error)
    assert risen["trained"] > 9 and abs(risen["untouched"]) < 3, risen
    # weights walk at random where there is nothing to learn, which samples' own errors do not count
    assert abs(risen["unrelated"]) < 0.4 * risen["trained"], risen
