"""Preference methods on the digits' teacher: where they begin, what a swap does, LoRA, parts of a batch, resumption."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fewstep.distill.cast import cast
from fewstep.distill.data import open_data
from fewstep.distill.draws import Draws
from fewstep.distill.opening import open_teacher
from fewstep.distill.pairs import Groups, Pairs, make_pairs, paired
from fewstep.distill.run import run
from fewstep.distill.schema import read
from fewstep.distill.student import sampled
from fewstep.distill.training import Trainer
from fewstep.models.reward_names import named_reward

METHODS = ("dpo", "inpo", "smpo", "mapo")
QUICK = ["train.batch=8", "student.steps=3", "threads=1", "report.exam=8", "report.teacher_calls=3",
         "report.validate=2", "report.checkpoint=2", "report.grid=1000", "reward=ink"]  # fmt: skip


@pytest.fixture(scope="module")
def ink():
    """Pairs by ink: (base, data, pairs)."""
    recipe, _ = read("dpo-digits", QUICK)
    teacher = open_teacher(recipe)
    base, data = sampled(teacher, recipe.student), open_data(recipe.data, teacher)
    return SimpleNamespace(
        base=base, data=data, pairs=make_pairs(base, named_reward("ink"), data, Groups(96, 4))
    )


def swapped(pairs):
    return pairs._replace(winner=pairs.loser, loser=pairs.winner, scores=pairs.scores.flip(1))


def trainer(name, data, pairs, *more):
    recipe, method = read(f"{name}-digits", [*QUICK, *more])
    teacher = open_teacher(recipe)
    data = paired(data, pairs)
    return Trainer(recipe, method, cast(recipe, method, teacher, data), data)


def gradient(t, turn=1):
    """(loss, numbers, gradients) of one batch, by the trainer's way to it."""
    batch = t.data.batch(Draws(0, turn, 0, 8, 8))
    if hasattr(t.method, "collect"):
        with torch.no_grad():
            batch = batch._replace(collected=t.method.collect(t.players, batch))
    loss, numbers = t.method.student_loss(t.players, batch)
    module = t.trained["student"]
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    return loss.item(), numbers, torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("name", METHODS)
def test_where_it_begins_and_what_a_swapped_pair_does(name, ink):
    still = ["method.inversion.eta=0"] if name in ("inpo", "smpo") else []  # fresh noise is each sample's own
    one, other = (gradient(trainer(name, ink.data, p, *still)) for p in (ink.pairs, swapped(ink.pairs)))
    if name == "mapo":
        assert one[0] != other[0] and "winner_gain" not in one[1]
        return
    assert one[0] == pytest.approx(math.log(2), abs=1e-6) == other[0]
    # labels that are as sure the other way round are the same labels: smpo's scores change places, too
    sign = 1 if name == "smpo" else -1
    torch.testing.assert_close(other[2], sign * one[2], rtol=1e-3, atol=1e-3 * float(one[2].abs().max()))
    assert one[1]["winner_gain"].abs() < 1e-5 and float(one[2].abs().max()) > 0


def test_smpo_without_scores_is_refused_and_pairs_that_are_alike_pull_nowhere(ink):
    alike = ink.pairs._replace(scores=torch.full_like(ink.pairs.scores, 0.3))
    assert not gradient(trainer("smpo", ink.data, alike))[2].any()
    with pytest.raises(ValueError, match="the pairs have no scores"):
        gradient(trainer("smpo", ink.data, ink.pairs._replace(scores=None)))


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_what_the_networks_were_called(name, ink):
    """Counted by hooks: three for a call that is differentiated, one for any other, a sample each."""
    t = trainer(name, ink.data, ink.pairs)
    counts = []

    def count(module, inputs):
        counts.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))

    for d in (t.players.teacher, t.players.student.d):
        d.net.register_forward_pre_hook(count)
    assert t.turn()["passes"] == sum(counts)


@pytest.mark.parametrize("name", ["dpo", "smpo"])
def test_an_adapter_learns_and_the_reference_under_it_does_not_move(name, ink):
    pytest.importorskip("peft")
    t = trainer(name, ink.data, ink.pairs, "lora.rank=2", "optim.lr=0.01")
    x, label = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 10)
    before = t.players.teacher(x, 0.7, label=label)
    assert torch.equal(t.players.student.d(x, 0.7, label=label), before)
    first = t.turn()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    t.turn()
    assert torch.equal(t.players.teacher(x, 0.7, label=label), before)
    assert not torch.equal(t.players.student.d(x, 0.7, label=label), before)


@pytest.mark.parametrize("name", METHODS)
def test_halves_of_a_batch_are_the_whole(name, ink):
    numbers, weights = zip(
        *((t.turn(), [p.detach().clone() for p in t.trained["student"].parameters()])
          for t in (trainer(name, ink.data, ink.pairs, f"train.accumulate={n}") for n in (1, 2)))
    )  # fmt: skip
    for key in numbers[0]:
        assert numbers[0][key] == pytest.approx(numbers[1][key], rel=1e-3, abs=1e-3), key
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2.1 * 2e-4)  # Adam's first step, whatever its sign


def test_several_updates_on_one_inversion(ink):
    t = trainer("inpo", ink.data, ink.pairs, "method.updates=3", "optim.lr=0.0001", "method.beta=50")
    numbers = t.turn()
    assert numbers["loss"] < math.log(2) - 1e-4  # the first would be log 2
    assert numbers["passes"] == 8 * (2 * 3 * 4 + 2 * t.method.inversion.calls)


@pytest.mark.parametrize("name", ["dpo", "smpo"])
def test_a_run_that_was_broken_off_is_the_unbroken_one(name, ink, tmp_path):
    made = ["method.groups={count: 8, size: 4}"]
    for place, all_iters in (("whole", (4,)), ("broken", (2, 4))):
        for iters in all_iters:
            folder = run(f"{name}-digits", [*QUICK, *made, f"train.iters={iters}", f"out={tmp_path / place}"])
    one, two = (
        load_file(tmp_path / place / f"{name}-digits/student.safetensors") for place in ("whole", "broken")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert {"reward", "reward_error", "teacher_reward", "implicit_accuracy", "margin"} <= set(lines[-1])
    assert lines[-1]["main"] == -lines[-1]["reward"]


@pytest.mark.slow
def test_two_ranks_make_the_pairs_and_the_losses_of_one(tmp_path, on_two_ranks):
    options = [*QUICK, "train.iters=3", "device=cpu", "method.groups={count: 9, size: 64}"]
    names = ["inpo-digits", "dpo-digits"]
    on_two_ranks(f"for name in {names!r}:\n    run.run(name, ['out={tmp_path}/two', *{options!r}])")
    for name in names:
        one, two = run(name, [*options, f"out={tmp_path}/one"]), tmp_path / "two" / name
        made, theirs = (load_file(folder / "pairs.safetensors") for folder in (one, two))
        assert all(torch.equal(made[key], theirs[key]) for key in made)
        for a, b in zip(*(map(json.loads, (f / "metrics.jsonl").open()) for f in (one, two)), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-3) and a["passes"] == b["passes"]


def test_ink_rises_with_pairs_and_does_not_where_each_is_there_both_ways(ink):
    """Held-out noise, base and student: more than 5 standard errors up, against none with pairs that say nothing."""
    other = swapped(ink.pairs)
    nothing = Pairs(*(torch.cat(two) for two in zip(ink.pairs[:4], other[:4], strict=True)))
    noise = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    cond, reward = {"label": torch.full((300,), 10)}, named_reward("ink")
    base = reward(ink.base.sample(noise, cond))
    error = float(base.std()) / 300**0.5
    risen = []
    for pairs in (ink.pairs, nothing):
        t = trainer(
            "dpo", ink.data, pairs, "train.batch=16", "method.beta=50", "optim.lr=1.2e-5", "train.ema=0"
        )
        for _ in range(24):
            t.turn()
        risen.append(float((reward(t.players.student.sample(noise, cond)) - base).mean()) / error)
    assert risen[0] > 5 and abs(risen[1]) < 2.5, risen


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("dpo", "method.updates=0", "method.updates must be 1 or more"),
        ("dpo", "method.reduce=max", "reduce must be"),
        ("inpo", "method.levels=two", "method.levels must be one of"),
        ("inpo", "method.inversion.steps=0", "inversion.steps must be 1 or more"),
        ("inpo", "method.inversion.told=so", "inversion.told must be now or then"),
        ("smpo", "method.range=[1,0]", "method.range must be the least score and the most"),
        ("smpo", "method.labels=hard", "method.labels must be geometric or expected"),
        ("dpo", "method.groups.size=1", "groups.size 2 or more"),
    ],
)
def test_options_that_are_none(name, override, message, ink):
    with pytest.raises(ValueError, match=message):
        gradient(trainer(name, ink.data, ink.pairs, override))


def test_a_pipeline_learns_from_pairs_of_its_own_under_prompts(pipelines, tmp_path):
    """The shipped recipe but for sizes: guided samples, judged as pictures, a prompt's number beside each pair."""
    pytest.importorskip("peft")
    pipelines.build("sd").save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a fox\ntwo hares\na b c\n")
    options = [
        f"teacher.path={tmp_path / 'sd'}", f"data.path={tmp_path / 'prompts.txt'}", f"out={tmp_path}",
        f"prompts.cache={tmp_path / 'cache'}", "teacher.height=16", "teacher.width=16", "student.steps=2",
        "pairs=null", "reward=brightness", "method.groups={count: 3, size: 2, guidance: 3.0}", "lora.rank=2",
        "train.batch=4", "train.iters=2", "report.exam=2", "report.teacher_calls=2", "threads=1", "optim.warmup=0",
    ]  # fmt: skip
    folder = run("dpo-sdxl", options)
    pairs = load_file(folder / "pairs.safetensors")
    assert set(pairs) == {"winner", "loser", "scores", "labels"} and set(pairs["labels"].tolist()) <= {
        0,
        1,
        2,
    }
    assert (pairs["scores"][:, 0] > pairs["scores"][:, 1]).all() and len(pairs["winner"]) == 3
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-2
    )  # bf16 of one network with and without an adapter
    assert lines[-1]["bad"] == 0 and {"reward", "teacher_reward"} <= set(lines[-1])
