"""The flow's training: its loss by hand, its recipe, its refusals."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")

from fewstep.distill.draws import Draws
from fewstep.distill.tarflow import TarFlowRecipe, augmentation, batch_loss, begin
from fewstep.distill.teacher import main, read, run
from fewstep.models.tarflow import load_flow

SMALL = [
    "net.patch_size=4",
    "net.hidden_size=8",
    "net.blocks=2",
    "net.depth=1",
    "steps=60",
    "warmup=5",
    "lr=0.02",
]


def test_a_run_lowers_the_likelihoods_loss_and_is_decided_by_its_seed(tmp_path):
    file = run("digits-tarflow", [*SMALL, f"out={tmp_path / 'a'}"])
    again = run("digits-tarflow", [*SMALL, f"out={tmp_path / 'b'}"])
    flow, fresh = load_flow(file), begin(read("digits-tarflow", SMALL))[0]
    for name, tensor in load_flow(again).state_dict().items():
        assert torch.equal(flow.state_dict()[name], tensor)
    recipe, source = read("digits-tarflow", SMALL), begin(read("digits-tarflow", SMALL))[1]
    draws = Draws(7, 0, 0, 512, 512)
    before, after = (float(batch_loss(f, source, recipe, draws).detach()) for f in (fresh, flow))
    # at the start z = x: half the mean square, of pixels and noise, and the normal's constant
    x = source.read(draws)[0] + augmentation(recipe, draws, source.read(draws)[0])
    assert before == pytest.approx(0.5 * float(x.square().mean()) + 0.5 * math.log(2 * math.pi), rel=1e-5)
    assert after < before - 0.2
    assert flow.config.noise == 0.15 and flow.null_label == 10
    text = file.with_suffix(".md").read_text()
    assert "nats a number, held out" in text and "60 steps of 64" in text


@pytest.mark.parametrize("augment, std", [("gaussian", 0.2), ("uniform", 0.2 / math.sqrt(12))])
def test_noise_is_of_the_kind_and_size_asked_for(augment, std):
    recipe = TarFlowRecipe(augment=augment, noise=0.2)
    x = torch.zeros(2000, 1, 4, 4)
    drawn = augmentation(recipe, Draws(0, 0, 0, 2000, 2000), x)
    # 32000 draws: a deviation's standard error is below 0.4 %
    assert float(drawn.std()) == pytest.approx(std, rel=0.016) and abs(float(drawn.mean())) < 4 * std / 178
    assert (augment == "uniform") == (float(drawn.abs().max()) <= 0.1)


def test_with_uniform_noise_there_is_nothing_to_denoise():
    recipe = read("digits-tarflow", [*SMALL, "augment=uniform", "noise=0.125"])
    flow, source = begin(recipe)
    assert flow.config.noise == 0 and torch.isfinite(batch_loss(flow, source, recipe, Draws(0, 0, 0, 8, 8)))
    with pytest.raises(ValueError, match="noise = 0"):
        flow.denoise(torch.zeros(1, 1, 8, 8))


def test_labels_are_dropped_as_often_as_said():
    """A flow whose null label alone matters: the loss is that of all labels at one end, of none at the other."""
    recipe = read("digits-tarflow", SMALL)
    flow, source = begin(recipe)
    torch.manual_seed(0)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.2)
    draws = Draws(1, 0, 0, 64, 64)
    x, label = source.read(draws)
    x = x + augmentation(recipe, draws, x)
    for share, given in ((0.0, label), (1.0, None)):
        recipe.label_dropout = share
        wanted = -float(flow.log_prob(x, given).mean().detach()) / 64
        assert float(batch_loss(flow, source, recipe, draws).detach()) == pytest.approx(wanted, rel=1e-5)


def test_bad_recipes_are_named(tmp_path, capsys):
    for change, said in [
        ("augment=none", "augment must be one of gaussian, uniform, got 'none'"),
        ("noise=0", "noise must be above 0"),
        ("net.patch_size=3", "patch_size must divide sample_size 8"),
        ("net.layers=3", "unknown key layers"),
        ("data.path=mixture", "must have square images"),
    ]:
        with pytest.raises(SystemExit):
            main(["digits-tarflow", change, f"out={tmp_path}"])
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
