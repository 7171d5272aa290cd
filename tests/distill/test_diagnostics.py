"""Diagnostics where the answer is known: critics that lag or overshoot by a known part, between exact Gaussians."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep.distill.diagnostics import Examined, Watch, critic_numbers, examined
from fewstep.distill.draws import Draws
from fewstep.distill.methods import DMD2, PhasedDMD
from fewstep.distill.methods.dmd2 import Gan
from fewstep.distill.methods.phased import Experts, phased_student
from fewstep.distill.players import Batch, Players
from fewstep.distill.student import few_steps
from fewstep.models import Denoiser, GaussianMixture, paths
from fewstep.models.load import build


def blend(teacher, student, part):
    """A critic that has gone the part of the way from the teacher to the student's own denoiser."""
    return Denoiser(
        lambda x, tau: (1 - part) * teacher(x, tau) + part * student(x, tau), paths.edm(), predicts="x0"
    )


def gaussian(mean, variance):
    return GaussianMixture([1.0], [[mean, 0.0]], [variance]).denoiser(paths.edm())


def numbers(part, offset=0.0):
    """Of exact Gaussians: the student's samples are N((1, 0), 1/2), the teacher's N(0, 1)."""
    teacher, own = gaussian(0.0, 1.0), gaussian(1.0, 0.5)
    draws = Draws(0, 0, 0, 4096, 4096)
    x0 = draws.normal("data", (2,)) * 0.5**0.5 + torch.tensor([1.0, 0.0])
    t = 0.05 + 3 * draws.stratified("level")
    x_t = paths.edm().add_noise(x0, t, draws.normal("forward", (2,)))
    critic = blend(teacher, own, part)(x_t, t)
    critic = critic + offset * draws.normal("user", (2,))
    return critic_numbers(Examined(critic, teacher(x_t, t), x0, 1 / t.square()))


@pytest.mark.parametrize("part", [0.2, 0.5, 1.0, 3.0])
def test_the_fit_says_how_far_the_critic_has_come(part):
    found = numbers(part)
    assert abs(found["critic_fit"] - 1 / part) < 5 * found["critic_fit_error"]
    assert found["critic_fit_error"] < 0.1 / part


def test_noise_in_the_critic_lowers_the_fit_and_its_own_denoising_error_tells_too():
    exact, noisy, lagging = numbers(1.0), numbers(1.0, offset=1.0), numbers(0.2)
    assert noisy["critic_fit"] < 0.5 * exact["critic_fit"]
    assert exact["critic_error"] < lagging["critic_error"] < lagging["teacher_error"] < noisy["critic_error"]


def complaints(found, **more):
    return Watch(iters=100)({"iteration": 60, **found, **more})


def test_words_come_where_something_is_wrong_and_only_there():
    assert complaints(numbers(1.0), gan_accuracy=0.8, ratio_clipped=0.1, contrast=0.95) == []
    assert complaints({}) == []  # a method without a critic
    assert complaints({"winner_error": 0.4, "winner_gain": -0.1}) == complaints({"winner_error": 0.9}) == []
    for found, words in [
        (numbers(0.2), "the critic lags behind"),
        (numbers(1.0, offset=1.5), "moved by the critic's errors"),
        ({"gan_accuracy": 0.999}, "the discriminator is saturated: it is right 99.9%"),
        ({"ratio_clipped": 0.75}, "75% of the density ratios are clipped"),
        ({"contrast": 1.5}, "the samples are saturated"),
        ({"contrast": 0.3}, "spread only 0.30 times"),
        ({"winner_error": 0.8, "winner_gain": -0.4}, "denoised worse than by the teacher, by 2.0 times"),
    ]:
        (said,) = complaints(found)
        assert words in said


def test_what_may_be_chance_or_the_beginning_is_no_reason_for_words():
    assert complaints({**numbers(0.2), "critic_fit_error": 2.0}) == []
    assert complaints({**numbers(0.2), "critic_gap": 1e-4}) == []
    assert Watch(100)({"iteration": 5, "contrast": 0.3, "gan_accuracy": 1.0}) == []


def test_words_come_once_and_one_bad_batch_is_not_enough():
    watch, bad = Watch(100), {"iteration": 60, "gan_accuracy": 1.0}
    assert watch({"iteration": 59, "gan_accuracy": 0.5}) == [] and watch(bad) == []
    said = [words for _ in range(100) for words in watch(bad)]
    assert len(said) == 1


def an_mlp(seed):
    torch.manual_seed(seed)
    d = build({"path": {"path": "edm"}, "predicts": "x0", "precond": "edm", "sigma_data": 1.0, "shape": [2],
               "net": {"type": "mlp", "dim": 2, "hidden_size": 16, "depth": 1}})  # fmt: skip
    with torch.no_grad():
        d.net.outputs.weight.normal_(std=0.3)
    return d


@pytest.mark.parametrize("phase", [None, 0, 1])
def test_in_every_phase_the_exact_critic_fits_and_the_weights_are_finite(phase):
    own, teacher = gaussian(1.0, 0.5), gaussian(0.0, 1.0)
    if phase is None:  # pure noise to the student's law in one call
        method, mean = DMD2(), torch.tensor([1.0, 0.0])
        student = few_steps(Denoiser(lambda x, tau: mean + 0.5**0.5 / 80 * x, paths.edm(), predicts="x0"), 1)
    else:  # along the ODE of that law, in steps enough
        method = PhasedDMD(phases=2)
        method.phase = phase
        student = phased_student(an_mlp(0), steps=200, phases=2)
        student = student._replace(d=Experts([own, own], student.d.ends))
    players = Players(teacher, student, own)
    batch = Batch(Draws(0, 1, 0, 4096, 4096), (2,), {})
    found = examined(method, players, batch)
    assert bool(torch.isfinite(found.weight).all())
    told = critic_numbers(found)
    assert abs(told["critic_fit"] - 1) < 5 * told["critic_fit_error"] < 0.5


def test_a_run_logs_them_and_warns(tmp_path, monkeypatch):
    from fewstep.distill.run import run

    recipe = str(Path(__file__).with_name("tiny.yaml"))
    gan = "method={name: fdistill, divergence: js, gan: {features: critic, layers: [blocks.0], student: 0.1}}"
    options = [gan, "train.iters=2", f"out={tmp_path}"]
    folder = run(recipe, options)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"critic_fit", "critic_gap", "critic_error", "teacher_error", "contrast", "gan_accuracy"} <= set(
        line
    )
    assert {"ratio_clipped", "weight_square"} <= set(line)
    monkeypatch.setattr("fewstep.distill.run.contrast", lambda made, teacher: 2.0)
    with pytest.warns(UserWarning, match="the samples are saturated"):
        folder = run(recipe, [*options, "name=saturated"])
    assert "saturated" in (folder / "metrics.jsonl").read_text()


def test_a_gan_says_how_often_its_discriminator_is_right():
    from fewstep.distill.discriminator import discriminator_on

    method = DMD2(gan=Gan(student=0.1, layers=["blocks.0"]))
    critic = an_mlp(1)
    torch.manual_seed(0)
    heads = discriminator_on(critic, ["blocks.0"], torch.zeros(2, 2), {})
    players = Players(gaussian(0.0, 1.0), few_steps(an_mlp(0), 1), critic, heads, critic)
    draws = Draws(0, 0, 0, 16, 16)
    batch = Batch(draws, (2,), {}, None, draws.normal("data", (2,)))
    for bias, share in [(50.0, 0.5), (-50.0, 0.5)]:  # one answer for all is right of one half
        with torch.no_grad():
            heads.heads[0].layers[-1].bias.fill_(bias)
        assert float(method.critic_loss(players, batch)[1]["gan_accuracy"]) == share
