"""The autoregressive teacher: trained by its recipe, written, opened again; and what the embedded one is worth."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fewstep.distill import autoregressive, teacher
from fewstep.models import checkpoint, digits, load

TINY = ["net={codes: 9, width: 16, depth: 1, heads: 2}", "steps=12", "batch=32", "warmup=2"]


def test_a_teacher_by_its_recipe_is_the_same_again_and_is_opened_by_load(tmp_path, monkeypatch):
    file = teacher.run("digits-ar", [f"out={tmp_path}", *TINY])
    tensors, meta = checkpoint.read(file)
    found = meta["training"]["metrics"]
    monkeypatch.setattr(autoregressive, "measure", lambda net: found)  # it takes longer than the training
    again, _ = checkpoint.read(teacher.run("digits-ar", [f"out={tmp_path / 'again'}", *TINY]))
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert meta["kind"] == "autoregressive" and tensors["book.codes"].dtype == torch.float32
    d = load(file)
    assert d.shape == (1, 8, 8) and d.net.config.codes == 9 and not d.net.training
    assert not any(p.requires_grad for p in d.net.parameters())
    # nine codewords are few: rounding to them costs more than other digits do
    assert found["fd_codebook"] > found["fd_train_to_held_out"]
    assert found["nats_held_out"] < math.log(9)
    text = file.with_suffix(".md").read_text()
    assert "fewstep teacher digits-ar" in text and str(found["nats_held_out"]) in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("net={codes: 1}", "codes must be at least 2, got 1"),
        ("net={codes: 100000}", "distinct points"),
        ("net={shape: [1, 4, 4]}", "net.shape must be"),
        ("net={num_class_embeds: 3}", "net.num_class_embeds must be 11"),
        ("net={width: 30, heads: 4}", "divisible by heads"),
        ("steps=0", "steps must be 1 or more"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        teacher.run("digits-ar", [change, f"out={tmp_path}"])


def test_the_embedded_teacher_knows_the_held_out_digits_and_their_classes():
    """Nats a token, by class, against no class, against another class, and against how often tokens are."""
    net = load("digits-ar").net
    images, labels = (torch.from_numpy(a) for a in digits("held_out"))
    tokens = net.book.tokens(images)

    def nats(label):
        with torch.no_grad():
            return float(functional.cross_entropy(net(tokens, label).flatten(0, 1), tokens.flatten()))

    train = net.book.tokens(torch.from_numpy(digits("train")[0]))
    often = (torch.bincount(train.flatten(), minlength=len(net.book)) + 1) / (train.numel() + len(net.book))
    by_count = float(-often.log()[tokens].mean())
    known, none, other = nats(labels), nats(None), nats((labels + 1) % 10)
    assert known < none < other and known < 0.6 * by_count < math.log(len(net.book))
