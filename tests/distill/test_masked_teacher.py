"""The bound that masked models are trained by: its value in closed form, its estimates, and teachers made by it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewstep.distill import masked
from fewstep.distill import recipe as recipes
from fewstep.distill.draws import Draws
from fewstep.distill.losses.masked import Hidden, hidden, masked_nelbo
from fewstep.models import checkpoint
from fewstep.models.digits import digits
from fewstep.models.masked import MaskedModel, from_joint, load_masked
from fewstep.models.pixel_tokens import to_tokens

SIZE, LENGTH = 2, 4
STATES = torch.tensor(list(itertools.product(range(SIZE), repeat=LENGTH)))
SETS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))[1:]  # what may be hidden


def table(seed: int) -> torch.Tensor:
    joint = torch.rand((SIZE,) * LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return joint / joint.sum()


def bound(model: MaskedModel, tokens: torch.Tensor, weight) -> torch.Tensor:
    """The whole sum over hidden sets, (B,); ``weight(n)``: a set of n's probability times its weight in the loss."""
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for out in SETS:
        n = int(out.sum())
        ones = torch.full((len(tokens),), weight(n), dtype=torch.float64)
        total += masked_nelbo(model, tokens, Hidden(out.expand(len(tokens), -1), ones, ones))
    return total


def by_count(n: int) -> float:
    return 1 / math.comb(LENGTH, n) / n


def by_time(n: int) -> float:
    """int dr / r r^n (1 - r)^(L - n), by a beta function."""
    return math.gamma(n) * math.gamma(LENGTH - n + 1) / math.gamma(LENGTH + 1)


@pytest.mark.parametrize("weight", [by_count, by_time])
def test_the_exact_model_s_bound_is_the_entropy(weight):
    joint = table(0)
    p, entropy = joint.flatten(), float(-(joint * joint.log()).sum())
    assert abs(float((p * bound(from_joint(joint), STATES, weight)).sum()) - entropy) < 1e-12
    # it is a bound: of another model it is the entropy and more, at least as much more as KL(p, that model)
    other = table(1)
    more = float((p * bound(from_joint(other), STATES, weight)).sum()) - entropy
    kl = float((joint * (joint / other).log()).sum())
    assert more > kl - 1e-12 and kl > 0.05
    # the control: the paper's MaskGIT-like loss without 1 / n is no likelihood
    flat = bound(from_joint(joint), STATES, lambda n: by_count(n) * n / LENGTH)
    assert abs(float((p * flat).sum()) - entropy) > 0.05


@pytest.mark.parametrize("masking", ["count", "time"])
def test_estimates_are_unbiased_and_counts_vary_less(masking):
    """One x, a model that is wrong of it, five standard errors."""
    model, n = from_joint(table(1)), 100_000
    x = STATES[5:6]
    random = torch.Generator().manual_seed(2)
    u, places = (torch.rand(*s, generator=random, dtype=torch.float64) for s in ((n,), (n, LENGTH)))
    got = masked_nelbo(model, x.expand(n, -1), hidden(masking, u, places))
    wanted = float(bound(model, x, by_count))
    assert abs(float(got.mean()) - wanted) < 5 * float(got.std()) / math.sqrt(n)
    # the variance of "time" has no bound (an integral of 1 / r), that of "count" lies in its 15 values
    assert (float(got.std()) / wanted < 0.6) == (masking == "count")
    assert abs(float(got.mean()) / LENGTH - wanted) > 1  # the control


def test_hidden_tokens_are_not_shown_and_seen_ones_are_not_asked():
    shown = []

    def call(tokens, t):
        shown.append((tokens, t))
        return torch.stack([torch.zeros(tokens.shape), 9.0 * (tokens < 2)], -1)

    model = MaskedModel(call, 2, LENGTH, "cosine", timed=True)
    x = STATES[torch.randint(16, (50,), generator=torch.Generator().manual_seed(0))]
    out = hidden("count", torch.rand(50, dtype=torch.float64), torch.rand(50, LENGTH))
    got = masked_nelbo(model, x, out)
    tokens, t = shown[0]
    assert torch.equal(tokens, torch.where(out.where, 2, x))
    torch.testing.assert_close(1 - model.schedule.alpha(t), out.share)
    torch.testing.assert_close(got, torch.full((50,), LENGTH * math.log(2)))


def test_what_is_refused():
    with pytest.raises(ValueError, match="masking must be one of count, time, got 'mask'"):
        hidden("mask", torch.rand(3), torch.rand(3, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"u must be \(B,\) and places \(B, L\)"):
        hidden("time", torch.rand(2), torch.rand(3, 2))
    with pytest.raises(ValueError, match="levels must be 2 or more|vocabulary must be an int of 2"):
        masked.begin(recipe(levels=1))


def recipe(**changes) -> masked.Recipe:
    net = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4,
           "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}  # fmt: skip
    given = {"name": "tiny", "net": net, "steps": 30, "batch": 32, "warmup": 5, "lr": 4e-3, **changes}
    return recipes.read({"kind": "masked", **given}, masked.Recipe)


def test_a_tiny_teacher_learns_is_written_and_told_of(tmp_path):
    small = recipe(out=str(tmp_path), exam=20)
    file = masked.run(small)
    model = load_masked(file)
    _, meta = checkpoint.read(file)
    metrics, text = meta["training"]["metrics"], file.with_suffix(".md").read_text()
    # 17 levels at random are 4.09 bits; those of a pixel as they come are 2.8, but a net must find that out
    assert metrics["bits_held_out"] < 3.6 and model.vocabulary == 17
    assert "Labels are 0..9" in text and f"**{metrics['bits_held_out']:.3f}**" in text
    # what was measured is what was stored
    images, labels = (torch.from_numpy(a) for a in digits("held_out"))
    again = masked.bits_per_token(model, to_tokens(images, 17), label=labels)
    assert abs(again - metrics["bits_held_out"]) < 1e-4
    assert file.stat().st_size < 200_000


def test_a_run_is_decided_by_its_seed():
    """Three losses of the first step."""
    losses = []
    for seed in (0, 0, 1):
        small = recipe(seed=seed)
        model, source = masked.begin(small)
        losses.append(float(masked.loss(model, source, small, Draws(seed, 0, 0, 32, 32)).detach()))
    assert losses[0] == losses[1] != losses[2]


def test_the_embedded_model_is_the_recipe_s_and_worth_what_its_card_says():
    path = checkpoint.DATA / "digits-masked.safetensors"
    assert path.stat().st_size <= 1_000_000
    _, meta = checkpoint.read(path)
    shipped = recipes.read("digits-masked", masked.Recipe)
    said = meta["training"]["recipe"]
    assert all(
        said[key] == getattr(shipped, key) for key in ("steps", "batch", "lr", "net", "levels", "masking")
    )
    images, labels = (torch.from_numpy(a) for a in digits("held_out"))
    model, tokens = load_masked("digits-masked"), to_tokens(images, 17)
    bits = masked.bits_per_token(model, tokens, passes=2, label=labels)
    assert abs(bits - meta["training"]["metrics"]["bits_held_out"]) < 0.05
    nobody = torch.full_like(labels, model.null["label"])
    assert masked.bits_per_token(model, tokens, passes=2, label=nobody) > bits + 0.02
    assert masked.bits_per_token(model, tokens, passes=2, label=(labels + 1) % 10) > bits + 0.1
