"""The teachers' trainer: its target, its times, its recipes, and a short run of each kind."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")

from fewstep.distill import recipe as recipes
from fewstep.distill.draws import Draws
from fewstep.distill.levels import Times, draw_times, time_at
from fewstep.distill.regression import Regression, average, denoising_loss, learning_rate, null_some, target
from fewstep.distill.teacher import TeacherRecipe, begin, main, read, run
from fewstep.models import paths
from fewstep.models.denoiser import Denoiser
from fewstep.models.load import load
from fewstep.models.unet import time_frequencies

KINDS = [
    (paths.edm(), "x0", "edm"),
    (paths.flow(), "flow", None),
    (paths.flow(), "flow", "edm-like"),
    (paths.vp_linear(), "eps", None),
    (paths.vp_linear(), "x0", "edm"),
    (paths.vp_cosine(), "v", None),
]


@pytest.mark.parametrize("path, predicts, precond", KINDS)
def test_a_network_that_hits_the_target_is_a_perfect_denoiser(path, predicts, precond):
    """Put F* in the network's place: the Denoiser must then answer the x0 that x was made of."""
    if precond == "edm-like":
        predicts, precond = "x0", "edm"
    random = torch.Generator().manual_seed(0)
    x0 = torch.randn(9, 1, 2, 2, generator=random, dtype=torch.float64)
    eps = torch.randn(9, 1, 2, 2, generator=random, dtype=torch.float64)
    t = torch.linspace(path.t_min, path.t_max, 9, dtype=torch.float64)
    answer = []
    d = Denoiser(lambda x, tau: answer[0], path, predicts=predicts, precond=precond, sigma_data=0.75)
    x, wanted = target(d, x0, eps, t)
    answer.append(wanted.double())
    exact = path.alpha(t).reshape(-1, 1, 1, 1) * x0 + path.sigma(t).reshape(-1, 1, 1, 1) * eps
    assert torch.allclose(x.double(), exact, rtol=1e-6)
    # float32 targets: their rounding is magnified by Q, which an eps network has as sigma / alpha
    alpha, sigma = path.alpha(t), path.sigma(t)
    size = 1e-6 * (1 + (sigma / alpha.clamp(min=1e-12) if predicts == "eps" else 0 * t))
    error = (d(exact, t) - x0).flatten(1).abs().max(dim=1).values
    assert (error <= 4 * size).all(), error


@pytest.mark.parametrize("path, times", [
    (paths.edm(), Times("lognormal", -1.0, 1.2)),
    (paths.flow(), Times("logit_normal", 0.5, 1.0)),
    (paths.vp_linear(), Times("uniform")),
])  # fmt: skip
def test_times_follow_their_distribution_and_fill_every_stratum(path, times):
    t = draw_times(times, path, 4000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64 and t.min() >= path.t_min and t.max() <= path.t_max
    if times.kind == "uniform":
        counts = torch.histc(t.float(), 100, path.t_min, path.t_max)
        assert (counts - 40).abs().max() <= 2
    else:
        z = t.log() if times.kind == "lognormal" else t.logit()
        # stratified: moments are far closer than 4000 independent draws would bring them (.016 and .011)
        assert abs(z.mean() - times.mean) < 2e-3 and abs(z.std() - times.std) < 6e-3
    assert (t.diff() > 0).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", ["uniform", "karras"])
def test_a_phase_has_the_times_from_its_end_up(kind):
    path, share = paths.flow(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    t = time_at(Times(kind), path, share, above=0.4)
    assert t[0] == pytest.approx(0.4) and t[2] == path.t_max
    middle = 0.7 if kind == "uniform" else ((0.4 ** (1 / 7) + 1) / 2) ** 7
    assert float(t[1]) == pytest.approx(middle)
    with pytest.raises(ValueError, match="uniform, karras here, got 'lognormal'"):
        time_at(Times("lognormal"), path, share, above=0.4)


def test_unknown_times_are_named():
    with pytest.raises(ValueError, match="lognormal"):
        draw_times(Times("beta"), paths.flow(), 4, torch.Generator())


def test_fast_frequencies_stay_out_while_it_trains():
    recipe = recipes.read(
        "digits-flow", TeacherRecipe, ["net.block_out_channels=[16,16]", "steps=3", "batch=8"]
    )
    training = begin(recipe)
    for _ in range(3):
        training.step()
    d = training.finish()
    weight = d.net.time_embedding.linear_1.weight
    fast = 1000.0 * time_frequencies(16) > recipe.time_cutoff
    assert 0 < fast.sum() < 8
    assert not weight[:, fast.repeat(2)].any() and weight[:, ~fast.repeat(2)].all()


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(s, 100, 10) for s in range(100)]
    assert rates.index(max(rates)) == 9 and rates[0] < 0.11 and rates[-1] < 1e-3


def test_the_average_looks_back_over_a_share_of_the_run():
    """With weights equal to the step, a share of 1/10 gives the mean age that the power law has."""
    kept, new = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    for step in range(2000):
        torch.nn.init.constant_(new.weight, float(step))
        average(kept, new, step, 0.1)
    # weights ~ s^(1/share - 1): mean s = n / (1 + share)
    assert kept.weight.item() == pytest.approx(2000 / 1.1, rel=2e-3)


def test_shipped_recipes_are_read_and_wrong_ones_refused(tmp_path):
    assert recipes.names("denoiser", "classifier") == (
        "digits-classifier",
        "digits-edm",
        "digits-flow",
        "digits-vp",
        "glyphs-flow",
        "latent-flow",
    )
    for name in ("digits-edm", "digits-flow", "digits-vp", "glyphs-flow", "latent-flow"):
        assert recipes.read(name, TeacherRecipe).name == name
    changed = recipes.read("digits-edm", TeacherRecipe, ["steps=7", "net.dropout=0.1", "times.std=2"])
    assert (changed.steps, changed.net["dropout"], changed.times.std) == (7, 0.1, 2.0)
    for wrong, said in [("stepz=7", "stepz"), ("steps=many", "many"), ("steps", "key=value")]:
        with pytest.raises(ValueError, match=said):
            recipes.read("digits-edm", TeacherRecipe, [wrong])
    with pytest.raises(ValueError, match="did you mean 'digits-edm'"):
        recipes.find("digit-edm")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"):
        recipes.raw(tmp_path / "list.yaml")


def test_an_impossible_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kind"):
        run({"kind": "gan"})
    with pytest.raises(ValueError, match="path must be"):
        run("digits-edm", ["path.path=line", f"out={tmp_path}"])
    with pytest.raises(FloatingPointError, match="digits-flow became nan at step"):
        run(
            "digits-flow",
            ["lr=1e30", "steps=20", "warmup=1", f"out={tmp_path}", "net.block_out_channels=[16,16]"],
        )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture()
def quick(monkeypatch):
    """Measuring takes longer than these short runs."""
    from fewstep.distill import teacher_card

    full = teacher_card.measure
    monkeypatch.setattr(teacher_card, "measure", lambda d: full(d, num=100, steps=3))


def test_a_short_run_learns_repeats_and_loads(tmp_path, quick, capsys):
    small = ["net.block_out_channels=[8,16]", "steps=40", "batch=64", "warmup=5"]
    for folder in ("a", "b"):
        assert main(["digits-flow", f"out={tmp_path / folder}", *small]) == 0
    first, second = (tmp_path / f / "digits-flow.safetensors" for f in ("a", "b"))
    assert str(first) in capsys.readouterr().out
    a, b = load(first), load(second)
    for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True):
        assert torch.equal(p, q)
    card = first.with_suffix(".md").read_text()
    for said in ("seed 0", "minutes", "feature FD", "CC BY 4.0", "fewstep teacher digits-flow"):
        assert said in card
    assert str(tmp_path) not in card and str(tmp_path).encode() not in first.read_bytes()


def test_a_short_run_of_the_classifier(tmp_path):
    path = run("digits-classifier", ["steps=60", "width=8", f"out={tmp_path}"])
    from fewstep.models.checkpoint import read
    from fewstep.models.classifier import load_classifier

    record = read(path)[1]["training"]
    assert (
        record["held_out_accuracy"] > 0.3
        and math.isfinite(record["minutes"])
        and "out" not in record["recipe"]
    )
    assert load_classifier(path)(torch.zeros(1, 1, 8, 8))[1].shape == (1, 10)


def test_the_command_reports_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["digits-flo"])
    assert "did you mean 'digits-flow'" in capsys.readouterr().err


TINY = [
    "net.block_out_channels=[8,8]",
    "net.attention_head_dim=8",
    "batch=16",
    "warmup=1",
    "label_dropout=0.3",
    "net.dropout=0.2",
]


def test_two_halves_of_a_batch_have_the_gradient_of_the_whole():
    """What ranks compute: the mean of their losses is the whole batch's, to float32's rounding."""
    training = begin(read("digits-flow", [*TINY, "net.dropout=0"]))
    losses = []
    for first, count in ((0, 16), (0, 8), (8, 8)):
        draws = Draws(0, 5, first, count, 16)
        batch = training.data.batch(draws)
        cond = null_some(batch.cond, batch.null, 0.3, draws)
        eps, t = draws.normal("forward", training.data.shape), draws.stratified("level")
        losses.append(float(denoising_loss(training.d, batch.real, cond, eps, t).mean().detach()))
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)
    assert losses[1] != losses[2]


def test_a_share_of_the_labels_is_dropped():
    draws = Draws(0, 0, 0, 4000, 4000)
    label = torch.arange(4000) % 10
    dropped = null_some({"label": label}, {"label": torch.full_like(label, 10)}, 0.3, draws)["label"]
    assert ((dropped == label) | (dropped == 10)).all()
    assert abs((dropped == 10).double().mean() - 0.3) < 5 * (0.21 / 4000) ** 0.5
    assert null_some({}, None, 0.3, draws) == {}


def test_a_run_that_was_broken_off_goes_on_to_the_same_weights(tmp_path, monkeypatch, quick):
    options = [*TINY, "steps=7", "checkpoint=3"]
    whole = run("digits-edm", [*options, f"out={tmp_path / 'whole'}"])
    step, steps = Regression.step, []

    def broken(training):
        if training.done == 5 and 5 not in steps:
            steps.append(5)
            raise KeyboardInterrupt
        steps.append(training.done)
        return step(training)

    monkeypatch.setattr(Regression, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        run("digits-edm", [*options, f"out={tmp_path / 'broken'}"])
    kept = tmp_path / "broken/.digits-edm.training"
    assert [p.name for p in sorted(kept.glob("step-*"))] == ["step-00000003"]
    with pytest.raises(ValueError, match="half trained by another recipe.*\n.*lr: 0.002 -> 0.1"):
        run("digits-edm", [*options, "lr=0.1", f"out={tmp_path / 'broken'}"])
    again = run("digits-edm", [*options, f"out={tmp_path / 'broken'}"])
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6] and not kept.exists()
    for p, q in zip(load(whole).net.parameters(), load(again).net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_whole_recipe_is_printed_and_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["digits-edm", "--print-config", "data.flip=true"]) == 0
    assert "flip: true" in capsys.readouterr().out
    assert main(["digits-edm", *TINY, "--dry-run", "checkpoint=1"]) == 0
    said = capsys.readouterr().out
    assert "samples of 1 x 8 x 8, 10 classes" in said and "loss" in said
    assert list(tmp_path.iterdir()) == []
    for wrong, hint in [("data.pth=x", "path"), ("stepz=1", "steps"), ("latents.va=x", "vae")]:
        with pytest.raises(SystemExit):
            main(["digits-edm", wrong])
        assert f"id you mean: '{hint}'" in (err := capsys.readouterr().err) or f"did you mean '{hint}'" in err


@pytest.mark.parametrize("options, said", [
    (["data.path=labels"], "labels has no samples to train"),
    (["data.path=mixture"], "net.type = unet is for images, and data.path = mixture has points"),
    (["batch=0"], "batch must be 1 or more"),
    (["precision=fp8"], "fp32, bf16, got 'fp8'"),
    (["net.type=mlp", "time_cutoff=3"], "time_cutoff is for net.type = unet"),
    (["latents.vae=nowhere"], "latents.vae = nowhere must be a folder"),
])  # fmt: skip
def test_recipes_that_cannot_be_trained_are_refused(options, said, tmp_path):
    recipe = {"net": {"type": "unet"}, "steps": 1, "batch": 4}
    with pytest.raises(ValueError, match=said):
        run(recipe, [*options, f"out={tmp_path}"])
    assert list(tmp_path.iterdir()) == []


def test_one_gpu_is_the_current_one(monkeypatch):
    """torch.cuda.set_device refuses a device without a number, which is what one process asks for."""
    from fewstep.distill import parallel

    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(device.index))
    assert parallel.start("cuda").device.type == "cuda" and asked == []
    parallel.start("cuda:1")
    assert asked == [1]
