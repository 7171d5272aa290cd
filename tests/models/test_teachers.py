"""The embedded teachers, as shipped."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from fewstep.distill.teacher_card import held_out_loss, heun
from fewstep.models import checkpoint
from fewstep.models.classifier import load_classifier
from fewstep.models.load import EMBEDDED, build, load


@pytest.mark.parametrize("name", EMBEDDED)
def test_they_denoise_digits_that_they_never_saw(name):
    """A third less error than the best that knows only mean and covariance; an untrained net is worse than that."""
    d = load(name)
    ours, gaussian = held_out_loss(d)
    assert ours < 0.67 * gaussian
    config = checkpoint.read(checkpoint.DATA / f"{name}.safetensors")[1]["config"]
    torch.manual_seed(0)
    untrained = build(config)
    untrained.net.requires_grad_(False)
    assert held_out_loss(untrained)[0] > gaussian


@pytest.mark.parametrize("name", EMBEDDED)
def test_their_samples_are_the_digits_that_were_asked_for(name):
    d = load(name)
    label = torch.arange(100) % 10
    noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = heun(d, noise, 10, label)
    judge = load_classifier()
    assert (judge(samples)[1].argmax(-1) == label).float().mean() > 0.85
    # the null label is another model: all classes at once
    null = judge(heun(d, noise, 10, torch.full_like(label, 10)))[1].argmax(-1)
    assert (null == label).float().mean() < 0.4 and len(null.unique()) == 10


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_label_is_the_null_label(name):
    d = load(name)
    x = torch.randn(3, 1, 8, 8)
    t = d.path.time(0.0)
    assert torch.equal(d(x, t), d(x, t, label=torch.tensor([10, 10, 10])))
    assert (d(x, t) - d(x, t, label=torch.tensor([1, 2, 3]))).abs().max() > 0.05


@pytest.mark.parametrize("name", EMBEDDED)
def test_they_are_small_and_say_where_they_come_from(name):
    file = checkpoint.DATA / f"{name}.safetensors"
    assert file.stat().st_size <= 2 * 2**20
    meta = checkpoint.read(file)[1]
    record = meta["training"]
    assert record["recipe"]["name"] == name and record["recipe"]["seed"] == 0 and record["core_seconds"] > 0
    card = file.with_suffix(".md").read_text()
    for said in ("seed 0", "minutes", "feature FD", "CC BY 4.0", f"`fewstep teacher {name}`", "licence"):
        assert said in card
    assert f"{record['metrics']['feature_fd_all']:.2f}" in card


def test_digits_is_digits_edm():
    d, same = load("digits"), load("digits-edm")
    assert d.path.name == "edm" and d.precond == "edm" and d.shape == (1, 8, 8)
    for p, q in zip(d.net.parameters(), same.net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_teacher_runs_as_a_diffusers_net():
    pytest.importorskip("diffusers")
    d = load("digits-flow")
    twin = d.net.to_diffusers()
    x, label = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        v = twin(x, torch.full((4,), 700.0), class_labels=label).sample
    assert torch.allclose(d(x, 0.7, label=label), x - 0.7 * v, atol=1e-5)


@pytest.mark.parametrize("name", EMBEDDED)
def test_their_odes_are_smooth_enough_for_a_solver_to_show_its_order(name):
    """Heun's error falls by its 4 when the step is halved (a time embedding of fast waves stops it at 5e-3)."""
    d, label = load(name), torch.arange(20) % 10
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    end, once, twice = (heun(d, noise, steps, label) for steps in (120, 24, 48))
    error = [float((x - end).flatten(1).norm(dim=1).median()) for x in (once, twice)]
    assert error[1] < 0.02 and 3.2 < error[0] / error[1] < 6.5
