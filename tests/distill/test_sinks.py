"""Numbers elsewhere: asked for, they arrive; not asked for, nothing is imported; never online by default."""

from __future__ import annotations

import sys
import types

import pytest

from fewstep.distill.sinks import open_sinks

LINE = {"iteration": 3, "loss": 0.5, "modes": 7, "note": "words"}


def test_wandb_gets_the_numbers_and_stays_offline(monkeypatch, tmp_path):
    seen = {}
    run = types.SimpleNamespace(log=lambda numbers, step: seen.update(numbers=numbers, step=step))
    fake = types.SimpleNamespace(init=lambda **options: seen.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (sink,) = open_sinks(["wandb"], tmp_path, {"name": "a-run"})
    sink(LINE)
    assert seen["mode"] == "offline" and seen["id"] == "a-run"
    assert seen["numbers"] == {"loss": 0.5, "modes": 7} and seen["step"] == 3


def test_tensorboard_gets_each_number(monkeypatch, tmp_path):
    seen = []
    writer = types.SimpleNamespace(add_scalar=lambda *a: seen.append(a), flush=lambda: None)
    module = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (sink,) = open_sinks(["tensorboard"], tmp_path, {"name": "a-run"})
    sink(LINE)
    assert seen == [("loss", 0.5, 3), ("modes", 7, 3)]


def test_what_is_missing_or_unknown_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        open_sinks(["wandb"], tmp_path, {"name": "a-run"})
    with pytest.raises(ValueError, match="tensorboard and wandb, got mlflow"):
        open_sinks(["mlflow"], tmp_path, {})
    assert open_sinks([], tmp_path, {}) == []
