"""Distilled Decoding 2 on two places of four codewords, whose joint law is a table: it is learnt, and what moves what.

The law is far from the product of its marginals (total variation 0.47), which is what tokens drawn at once and apart
from each other come to.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fewstep.distill.cast import cast
from fewstep.distill.data import open_data
from fewstep.distill.diagnostics import critic_numbers, examined
from fewstep.distill.draws import Draws
from fewstep.distill.losses.conditional_score import conditional_distillation_loss
from fewstep.distill.methods.dd2 import DD2, autoregressive_start
from fewstep.distill.players import Players, frozen
from fewstep.distill.run import run
from fewstep.distill.saved import open_student
from fewstep.distill.schema import read
from fewstep.distill.student import few_steps
from fewstep.distill.training import Trainer
from fewstep.kernels.gumbel_draw import gumbel_draw
from fewstep.models import GaussianMixture, checkpoint, paths
from fewstep.models.autoregressive import ARConfig, Autoregressive, conditional
from fewstep.samplers.noise import normal

JOINT = torch.tensor([[30, 2, 2, 2], [2, 2, 20, 2], [2, 2, 2, 10], [2, 15, 2, 5]], dtype=torch.float64) / 102
CORNERS = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
CONFIG = ARConfig(shape=(2, 2), codes=4, width=24, depth=1, heads=2, num_class_embeds=2)
COUNT = 8000
APART = float(0.5 * (JOINT.sum(1)[:, None] * JOINT.sum(0) - JOINT).abs().sum())


class Exact(Autoregressive):
    """The table as an autoregressive model."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(CONFIG, CORNERS)

    def logits(self, before, label=None):
        first = self.book.tokens(before)[:, 0]
        return torch.stack([JOINT.sum(1).log().expand(len(first), 4), JOINT[first].log()], dim=1).float()

    def sample(self, label=None, seed=0, ids=None, row=0):
        ids = torch.arange(len(label)) if ids is None else ids
        pair, _ = gumbel_draw(JOINT.log().flatten().expand(len(ids), 16), torch.tensor([seed]), ids, row)
        return self.book.vectors(torch.stack([pair // 4, pair % 4], dim=1))


def off(student) -> float:
    """Total variation of the student's tokens to the table; 0.016 of it are the draws of an exact sampler."""
    x = student.sample(
        normal(99, torch.arange(COUNT), (2, 2)), {"label": torch.zeros(COUNT, dtype=torch.int64)}
    )
    tokens = Exact().book.tokens(x)
    found = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16) / COUNT
    return float(0.5 * (found - JOINT.flatten()).abs().sum())


def begun(*options: str) -> Trainer:
    given = {
        "method": {"name": "dd2"}, "data": {"path": "labels"}, "student": {"warm_up": 100},
        "train": {"batch": 128, "critic_steps": 3, "ema": 0.97}, "optim": {"lr": 1e-3, "critic_lr": 2e-3},
    }  # fmt: skip
    recipe, method = read(given, options)
    teacher = conditional(Exact())
    data = open_data(recipe.data, teacher)
    return Trainer(recipe, method, cast(recipe, method, teacher, data), data)


@pytest.mark.parametrize("distance", ["sid", "dmd"])
def test_the_joint_law_is_learnt_from_conditional_scores_and_not_by_a_student_that_does_not_train(distance):
    trainer = begun(f"method.distance={distance}")
    before = off(trainer.players.student)
    for _ in range(120):
        trainer.turn()
    with trainer.averaged():
        after = off(trainer.players.student)
    # nearer than half of the way from tokens apart from each other to the table
    assert APART > 0.45 and before > APART / 2
    assert after < APART / 2


def test_where_the_critic_is_the_teacher_the_student_stays_and_elsewhere_it_moves():
    trainer = begun("student.warm_up=2", "method.distance=dmd")
    players, batch = trainer.players, trainer.data.batch(Draws(0, 0, 0, 16, 16))
    trainer.method.student_loss(players._replace(critic=players.teacher), batch)[0].backward()
    net = players.student.d.net
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in net.parameters())
    trainer.method.student_loss(players, batch)[0].backward()
    assert any(bool((p.grad != 0).any()) for p in net.parameters())


@pytest.mark.parametrize("distance", ["sid", "dmd"])
def test_no_gradient_reaches_what_stands_before(distance):
    """The loss at place 1 is moved by x0 at place 1 alone, though the prefix is x0 at place 0."""
    trainer = begun("student.warm_up=2", f"method.distance={distance}")
    players, batch = trainer.players, trainer.data.batch(Draws(0, 0, 0, 16, 16))
    x0 = normal(1, torch.arange(16), (2, 2)).requires_grad_()
    real, fake, _ = trainer.method._estimates(players, batch, x0)
    second = conditional_distillation_loss(x0[:, 1:], real[:, 1:], fake[:, 1:], distance)
    (slope,) = torch.autograd.grad(second, x0)
    assert (slope[:, 0] == 0).all() and (slope[:, 1] != 0).any()


def test_each_turn_reaches_its_own_network_alone():
    trainer = begun("student.warm_up=2")
    players, batch = trainer.players, trainer.data.batch(Draws(0, 0, 0, 16, 16))
    student, critic = players.student.d.net, players.critic.net
    with frozen(critic):
        trainer.method.student_loss(players, batch)[0].backward()
    assert any(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in critic.parameters())
    student.zero_grad()
    with frozen(student):
        trainer.method.critic_loss(players, batch)[0].backward()
    assert all(p.grad is None for p in student.parameters())
    assert any(p.grad is not None for p in critic.parameters())
    assert all(p.grad is None for p in players.teacher.net.parameters())


def test_the_start_learns_the_teachers_closed_form():
    """The GTS loss of a network of 150 steps is a fraction of that of none, on samples that it has not seen."""
    teacher = conditional(Exact())
    errors = []
    for iters in (0, 150):
        d = autoregressive_start(teacher, iters, 64, seed=0)
        x0 = teacher.net.sample(torch.zeros(500), seed=9)
        t = torch.full((500, 2), 0.5)
        x_t = d.path.add_noise(x0, t, normal(5, torch.arange(500), (2, 2)))
        with torch.no_grad():
            wanted = teacher(x_t, t, prefix=x0)
            found = d(x_t, t, prefix=x0, label=torch.zeros(500, dtype=torch.int64))
        errors.append(float((found - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_the_watch_has_a_row_a_place():
    trainer = begun("student.warm_up=2")
    seen = examined(trainer.method, trainer.players, trainer.data.batch(Draws(0, 0, 0, 16, 16)))
    assert seen.critic.shape == (32, 2) and seen.weight.shape == (32,)
    assert {"critic_fit", "critic_gap"} <= set(critic_numbers(seen))


@pytest.fixture
def tiny_teacher(tmp_path):
    torch.manual_seed(0)
    net = Autoregressive(ARConfig(codes=6, width=16, depth=1, heads=2), torch.randn(6, 4).clamp(-1, 1))
    path = tmp_path / "tiny-ar.safetensors"
    checkpoint.write(path, net.state_dict(), {"kind": "autoregressive", "net": net.config.to_dict()})
    return path


def test_a_run_resumes_to_the_bit_and_its_student_is_opened_again(tiny_teacher, tmp_path):
    options = [f"teacher.path={tiny_teacher}", "student.warm_up=3", "train.batch=16", "threads=1", "report.exam=40",
               "report.validate=2", "report.checkpoint=1"]  # fmt: skip
    whole = run("dd2-digits", [f"out={tmp_path / 'whole'}", "train.iters=3", *options])
    for iters in (1, 3):
        broken = run("dd2-digits", [f"out={tmp_path / 'broken'}", f"train.iters={iters}", *options])
    one, two = ((f / "student.safetensors").read_bytes() for f in (whole, broken))
    a, b = (checkpoint.read(f / "student.safetensors")[0] for f in (whole, broken))
    assert len(one) == len(two) and all(torch.equal(a[key], b[key]) for key in a)
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"main", "teacher_fd", "data_fd", "critic_fit", "off_codebook"} <= set(last)
    student, recipe, _ = open_student(whole)
    noise = normal(0, torch.arange(3), (1, 8, 8))
    made = student.sample(noise, {"label": torch.tensor([1, 2, 3])})
    assert made.shape == (3, 1, 8, 8) and student.calls == 1 and recipe.method["name"] == "dd2"


def test_a_teacher_of_another_kind_and_more_calls_than_one_are_refused(tiny_teacher):
    mixture = GaussianMixture([1.0], [[0.0, 0.0]], 1.0).denoiser(paths.flow())
    with pytest.raises(ValueError, match="method dd2 distils autoregressive models"):
        autoregressive_start(mixture, 1, 4)
    teacher = conditional(Exact())
    for change in ("student.steps=2", "lora.rank=4"):
        recipe, method = read("dd2-digits", [change])
        with pytest.raises(ValueError, match="students of one call"):
            cast(recipe, method, teacher, open_data(replace(recipe.data, path="labels"), teacher))
    with pytest.raises(ValueError, match="distance must be one of sid, dmd"):
        players = Players(
            teacher, few_steps(autoregressive_start(teacher, 0, 4)), autoregressive_start(teacher, 0, 4)
        )
        DD2(distance="l1").student_loss(players, begun("student.warm_up=1").data.batch(Draws(0, 0, 0, 4, 4)))
