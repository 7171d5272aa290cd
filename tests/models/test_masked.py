"""Masked models: posteriors of a joint table against brute force, schedules, files, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewstep.models import checkpoint
from fewstep.models.digits import SHAPE, digits
from fewstep.models.mask_schedules import SCHEDULES, MaskSchedule, mask_schedule
from fewstep.models.masked import MaskedModel, build_masked, from_joint, load_masked, save_masked
from fewstep.models.pixel_tokens import to_images, to_tokens

TINY = {
    "vocabulary": 5,
    "net": {
        "type": "unet", "sample_size": 4, "block_out_channels": [8, 8], "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "num_class_embeds": 4,
    },
}  # fmt: skip


def test_posteriors_of_a_table_are_those_of_its_states():
    size, length = 3, 3
    table = torch.rand((size,) * length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = from_joint(7 * table)
    for tokens in itertools.product(range(size + 1), repeat=length):
        got = model(torch.tensor([tokens]))[0].exp()
        assert got.dtype == torch.float64
        seen = {i: v for i, v in enumerate(tokens) if v < size}
        for i in range(length):
            if i in seen:
                continue
            chance = torch.zeros(size, dtype=torch.float64)
            for state in itertools.product(range(size), repeat=length):
                if all(state[j] == v for j, v in seen.items()):
                    chance[state[i]] += table[state]
            torch.testing.assert_close(got[i], chance / chance.sum(), rtol=1e-12, atol=1e-15)


def test_what_cannot_be_has_no_posterior():
    model = from_joint(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    assert model(torch.tensor([[1, 2]]))[0, 1].isnan().all()
    assert model(torch.tensor([[2, 2]]))[0, 0].exp().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_fall_from_1_to_0_and_invert(schedule):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    a = schedule.alpha(t)
    assert abs(a[0] - 1) < 1e-15 and abs(a[-1]) < 1e-15 and (a.diff() < 0).all()
    assert (schedule.time(a) - t).abs().max() < 1e-7  # the cosine is flat at t = 1
    assert (schedule.alpha(schedule.time(a)) - a).abs().max() < 1e-14
    assert mask_schedule(MaskSchedule(*schedule)) == schedule


def test_schedules_that_are_none():
    with pytest.raises(ValueError, match="schedule must be one of linear, cosine"):
        mask_schedule("square")
    with pytest.raises(TypeError, match="got float"):
        mask_schedule(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fall from 1 at t = 0 to 0 at t = 1"):
        mask_schedule(MaskSchedule("early", lambda t: 1 - 0.9 * t, lambda a: (1 - a) / 0.9))
    with pytest.raises(ValueError, match="must be the inverse"):
        mask_schedule(MaskSchedule("square", lambda t: 1 - t**2, lambda a: 1 - a))


def test_a_network_is_told_the_time_only_if_it_wants_to_be():
    told = []

    def call(tokens, t=None):
        told.append(t)
        return torch.zeros(*tokens.shape, 3)

    x = torch.full((2, 4), 3)
    MaskedModel(call, 3, 4)(x, 0.5)
    MaskedModel(call, 3, 4, timed=True)(x, 0.5)
    assert told[0] is None and told[1].tolist() == [0.5, 0.5] and told[1].dtype == torch.float64
    with pytest.raises(ValueError, match="t must be given"):
        MaskedModel(call, 3, 4, timed=True)(x)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 4, 2\)"):
        MaskedModel(call, 2, 4)(x)


def test_what_is_no_model():
    zeros = torch.zeros
    for vocabulary in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match="vocabulary must be an int of 2 or more"):
            MaskedModel(zeros, vocabulary, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be"):
        MaskedModel(zeros, 2, 0)
    with pytest.raises(ValueError, match="vocabulary of 2 or more"):
        from_joint(zeros(1, 1))
    for table in (zeros(2, 3), torch.ones(2, 2, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="an axis a token"):
            from_joint(table)
    for table in (zeros(2, 2), torch.tensor([0.5, -0.5]), torch.tensor([0.5, math.nan])):
        with pytest.raises(ValueError, match="table must hold probabilities"):
            from_joint(table)
    with pytest.raises(ValueError, match="table must be small"):
        from_joint(torch.ones((2,) * 16))


def test_tokens_are_checked():
    model = from_joint(torch.ones(2, 2))
    assert model.check(torch.tensor([[0, 2]])).shape == (1, 2)
    with pytest.raises(TypeError, match="got list"):
        model.check([[0, 1]])  # type: ignore[arg-type]
    for wrong in (torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"int64 of shape \(B, 2\)"):
            model.check(wrong)
    for wrong in (torch.tensor([[0, 3]]), torch.tensor([[-1, 0]])):
        with pytest.raises(ValueError, match=r"0 .. 1, or be 2, the mask"):
            model.check(wrong)


def test_digits_are_tokens_of_17_levels():
    images = torch.from_numpy(digits("all")[0])
    tokens = to_tokens(images, 17)
    assert tokens.unique().tolist() == list(range(17))
    assert torch.equal(to_images(tokens, SHAPE, 17), images)
    with pytest.raises(ValueError, match="levels must be 2 or more"):
        to_tokens(images, 1)


@pytest.mark.parametrize("timed", [False, True])
def test_a_model_is_saved_and_loaded(tmp_path, timed):
    torch.manual_seed(0)
    model = build_masked({**TINY, "timed": timed, "schedule": "cosine"})
    save_masked(tmp_path / "m.safetensors", model, {"seed": 0})
    again = load_masked(tmp_path / "m.safetensors")
    tokens, label = torch.randint(6, (3, 16)), torch.tensor([0, 1, 3])
    model.net.eval()
    assert torch.equal(model(tokens, 0.3, label=label), again(tokens, 0.3, label=label))
    assert again.schedule.name == "cosine" and again.null == {"label": 3} and again.timed == timed
    moved = not torch.equal(model(tokens, 0.3, label=label), model(tokens, 0.6, label=label))
    assert moved == timed


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="name_or_path must be digits-masked or"):
        load_masked("digits")
    with pytest.raises(ValueError, match="holds a classifier, not a masked model"):
        load_masked(checkpoint.DATA / "digits-classifier.safetensors")
    with pytest.raises(ValueError, match="unknown key nets"):
        build_masked({**TINY, "nets": {}})
    with pytest.raises(ValueError, match="net.type must be unet or dit"):
        build_masked({**TINY, "net": {"type": "mlp", "sample_size": 4}})
    with pytest.raises(ValueError, match="must have a net and a config"):
        save_masked(tmp_path / "m.safetensors", from_joint(torch.ones(2, 2)))


def test_a_dit_is_a_transformer_over_the_tokens():
    """It answers for each token by where it stands, and sees all of the others."""
    torch.manual_seed(0)
    net = {"type": "dit", "sample_size": 4, "patch_size": 1, "hidden_size": 8, "depth": 1, "num_heads": 2}
    model = build_masked({"vocabulary": 5, "net": net})
    for parameter in model.net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = model.masks(1)
    other = tokens.clone()
    other[0, 3] = 2
    moved = (model(tokens) - model(other))[0].abs().amax(1)
    assert moved.shape == (16,) and (moved > 0).all()
