"""A run from its recipe: it resumes to the bit, is killed without loss, and two ranks make what one does."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.distill import checkpoints
from fewstep.distill.run import run
from fewstep.distill.schema import differences, read

TINY = str(Path(__file__).with_name("tiny.yaml"))
METHODS = {
    "dmd2": ["student.steps=2"],
    "sim": ["method.name=sim"],
    "phased": ["method={name: phased}", "student.steps=4"],
    "fdistill": [
        "method={name: fdistill, divergence: js, gan: {features: critic, layers: [blocks.0], student: 0.1}}"
    ],
}


def tiny(folder, *more):
    return run(TINY, [f"out={folder}", *more])


def weights(folder):
    tensors = load_file(folder / "student.safetensors")
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()


@pytest.fixture(scope="module", params=METHODS)
def unbroken(request, tmp_path_factory):
    options = METHODS[request.param]
    return options, tiny(tmp_path_factory.mktemp("runs"), "train.iters=6", *options)


def test_a_run_that_stopped_at_each_checkpoint_is_the_unbroken_one(unbroken, tmp_path):
    options, whole = unbroken
    if "phased" in str(
        options
    ):  # its phases are shares of the iterations: it cannot be prolonged, only broken off
        pytest.skip("see test_killed_at_any_time_nothing_is_lost")
    for iters in (2, 6):
        folder = tiny(tmp_path, f"train.iters={iters}", *options)
    assert weights(folder) == weights(whole)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 7))


def test_what_a_run_leaves_behind(unbroken):
    _, folder = unbroken
    assert {"config.yaml", "metrics.jsonl", "student.safetensors", "checkpoints"} <= {
        p.name for p in folder.iterdir()
    }
    assert all(checkpoints.trouble(c) is None for c in checkpoints.every(folder / "checkpoints"))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"main", "teacher_mmd", "data_mmd", "modes", "bad"} <= set(last)


def same_run(one, two):
    """Equal but for the order of sums: the losses, and the weights (which Adam moves by no more than its rate)."""
    for a, b in zip(*(map(json.loads, (f / "metrics.jsonl").open()) for f in (one, two)), strict=True):
        for key in {"loss", "critic", "ratio", "weight_square"} & set(a):
            assert abs(a[key] - b[key]) < 1e-4 * max(1, abs(a[key])), key
    for name, tensor in load_file(one / "student.safetensors").items():
        torch.testing.assert_close(load_file(two / "student.safetensors")[name], tensor, rtol=0, atol=5e-4)


def command(folder, *options):
    return [sys.executable, "-m", "fewstep", "distill", TINY, f"out={folder}", *options]


def test_killed_at_any_time_nothing_is_lost(tmp_path):
    options = [*METHODS["phased"], "train.iters=12"]  # the kill may come in either phase
    whole = tiny(tmp_path / "whole", *options)
    process = subprocess.Popen(command(tmp_path / "killed", *options), stderr=subprocess.DEVNULL)
    made = tmp_path / "killed/tiny/checkpoints/step-00000004"
    limit = time.monotonic() + 60
    while not made.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = tiny(tmp_path / "killed", *options)
    assert weights(killed) == weights(whole)
    logged = [json.loads(line)["iteration"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 13))


def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before_it(tmp_path):
    whole = tiny(tmp_path / "whole", "train.iters=6")
    folder = tiny(tmp_path / "hurt", "train.iters=4")
    (folder / "student.safetensors").unlink()
    broken = next((folder / "checkpoints/step-00000004").glob("*.distcp"))
    broken.write_bytes(broken.read_bytes()[:-7] + b"garbage")
    with pytest.warns(UserWarning, match="step-00000004 is passed over: .*distcp is not what was written"):
        tiny(tmp_path / "hurt", "train.iters=6")
    assert weights(folder) == weights(whole)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_to_do(tmp_path, monkeypatch):
    whole = tiny(tmp_path / "whole", "train.iters=6")
    honest, place = os.fsync, tmp_path / "full/tiny/checkpoints"

    def full(handle):
        if (place / "step-00000002").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(handle)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="step-00000004 was not written") as said,
    ):
        patch.setattr(os, "fsync", full)
        tiny(tmp_path / "full", "train.iters=6")
    assert said.value.errno == errno.ENOSPC
    for words in ("No space left", "its last checkpoint is (step-00000002)", "make room", "same command"):
        assert words in str(said.value)
    assert [p.name for p in place.iterdir()] == ["step-00000002"] and checkpoints.trouble(
        checkpoints.newest(place)
    ) is None
    with open(place.parent / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "lo')  # a full disk, or a kill, breaks lines off where it likes
    assert weights(tiny(tmp_path / "full", "train.iters=6")) == weights(whole)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 on a CPU came with torch 2.7")
def test_two_ranks_make_the_losses_of_one(tmp_path, on_two_ranks):
    small = [
        "train.batch=8",
        "train.critic_steps=1",
        "report.exam=16",
        "report.teacher_calls=2",
        "threads=1",
        "name=tiny",
    ]
    kinds = {
        # f-distill's weights are relative to the whole batch, whoever holds its parts
        "replicate": [TINY, "shard=replicate", "train.iters=3", *METHODS["fdistill"]],
        "fsdp": [TINY, "shard=fsdp", "train.iters=3"],
        # a U-Net of several stages up, which take turns at what the way down has left
        "unet": ["dmd2-digits", "shard=fsdp", "train.iters=1", *small],
    }
    on_two_ranks(
        f"for kind, (recipe, *options) in {kinds!r}.items():\n"
        f"    run.run(recipe, ['out={tmp_path}/two-' + kind, *options])"
    )
    for kind, (recipe, *options) in kinds.items():
        same_run(run(recipe, [f"out={tmp_path / kind}", *options]), tmp_path / f"two-{kind}/tiny")


def test_another_config_in_the_same_folder_is_refused_with_the_difference(tmp_path):
    tiny(tmp_path, "train.iters=1")
    with pytest.raises(ValueError, match="another config.*\n  optim.lr: 0.0005 -> 0.1\n  seed: 0 -> 3"):
        tiny(tmp_path, "train.iters=1", "seed=3", "optim.lr=0.1")
    assert differences({"out": "a", "report": {"keep": 1}}, {"out": "b", "report": {"keep": 2}}) == []


def test_a_folder_of_another_version_is_read_where_it_can_be(tmp_path):
    whole = tiny(tmp_path / "whole", "train.iters=2")
    folder = tiny(tmp_path / "old", "train.iters=1")
    config = folder / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("  bad_limit: 20\n", ""))  # a key that came later, at its default
    assert "bad_limit" not in config.read_text()
    assert weights(tiny(tmp_path / "old", "train.iters=2")) == weights(whole)
    config.write_text(text.replace("bad_limit: 20", "tolerance: 20"))
    with pytest.raises(
        ValueError, match="not of this version of fewstep: recipe: Key 'tolerance' not in 'Train'"
    ):
        tiny(tmp_path / "old", "train.iters=3")


def test_a_run_in_phases_cannot_be_prolonged(tmp_path):
    tiny(tmp_path, "train.iters=2", *METHODS["phased"])
    with pytest.raises(ValueError, match="another config.*\n  train.iters: 2 -> 4"):
        tiny(tmp_path, "train.iters=4", *METHODS["phased"])


def test_losses_that_are_not_finite_are_skipped_counted_and_at_last_fatal(tmp_path, monkeypatch):
    from fewstep.distill.methods.dmd2 import DMD2
    from fewstep.distill.training import BadBatches

    honest = DMD2.student_loss

    def sometimes(self, players, batch):
        loss, numbers = honest(self, players, batch)
        return (loss * float("nan"), numbers) if batch.draws.turn // 3 in (1, 2) else (loss, numbers)

    monkeypatch.setattr(DMD2, "student_loss", sometimes)
    folder = tiny(tmp_path / "some", "train.iters=4")
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["bad"] == 2
    assert all(torch.isfinite(t).all() for t in load_file(folder / "student.safetensors").values())
    with pytest.raises(BadBatches, match="train.bad_limit = 1"):
        tiny(tmp_path / "limit", "train.iters=4", "train.bad_limit=1")


def test_data_that_are_not_finite_cost_their_batch_and_no_other(tmp_path, monkeypatch):
    from fewstep.distill.data import Data

    honest = Data.batch

    def sometimes(self, draws):
        batch = honest(self, draws)
        broken = draws.turn in (4, 5) and draws.seed == 0  # the critic's second of a turn, and the student's
        return batch._replace(real=batch.real * float("nan")) if broken else batch

    monkeypatch.setattr(Data, "batch", sometimes)
    folder = tiny(tmp_path, "train.iters=4", *METHODS["fdistill"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["bad"] for line in lines] == [0, 1, 1, 1]  # the student's turn needs no real data
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("method", ["dmd2", "fdistill"])
def test_accumulating_halves_is_the_whole_batch(method, tmp_path):
    options = ["train.iters=3", *METHODS[method]]
    same_run(*(tiny(tmp_path / str(n), f"train.accumulate={n}", *options) for n in (1, 2)))


@pytest.mark.parametrize(
    "override, message",
    [
        ("method.name=dmd3", "method.name must be one of dmd2, fdistill, sim, phased, .*got 'dmd3'"),
        ("method.guidnce=2", "recipe: Key 'guidnce' not in 'DMD2'.*Did you mean: 'guidance'"),
        ("train.iter=5", "recipe: Key 'iter' not in 'Train'.*Did you mean: 'iters'"),
        ("train.batch=15", "train.batch = 15 must be a multiple"),
        ("method.weight=vsd", "weight must be"),
        ("shard=zero", "shard must be one of replicate, fsdp"),
        ("teacher.path=digit-edm", "did you mean 'digits-edm'"),
    ],
)
def test_wrong_input_is_named(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, "train.iters=1", "train.accumulate=2" if "15" in override else "seed=0", override)


def test_print_config_and_dry_run_write_nothing(tmp_path, monkeypatch, capsys):
    from fewstep.distill.run import main

    monkeypatch.chdir(tmp_path)
    assert main([TINY, "--print-config"]) == 0
    assert "hidden_size: 16" in capsys.readouterr().out
    assert main([TINY, "--dry-run"]) == 0
    assert "1 calls" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_presets_are_filled_in_below_the_recipe_s_own_options():
    _, plain = read(TINY, ["method={name: dmd2, preset: fastgen}"])
    assert (plain.weight, plain.critic_weight, plain.gan.features) == ("fastgen", "x0", "teacher")
    _, mixed = read(TINY, ["method={name: dmd2, preset: dmd2, weight: kl, gan: {student: 0.1}}"])
    assert (mixed.weight, mixed.gan.student, mixed.gan.critic) == ("kl", 0.1, 0.01)
    with pytest.raises(ValueError, match="method.preset must be one of dmd2, fastgen, .*got 'sid'"):
        read(TINY, ["method={name: dmd2, preset: sid}"])


def test_the_shipped_recipes_are_read():
    from fewstep.distill.recipe import names

    assert {"dmd2-digits", "dmd2-mixture"} <= set(names("distill"))
    for name in names("distill"):
        assert read(name)[0].name == name


def test_a_method_without_a_critic_has_none(tmp_path, monkeypatch):
    from fewstep.distill import methods, training

    @dataclass
    class Regression:
        """The student learns to answer zero."""

        def student_loss(self, players, batch):
            assert players.critic is None and players.discriminator is None
            loss = batch.generate(players.student).square().mean()
            return loss, {"size": loss.detach()}

    monkeypatch.setitem(methods.METHODS, "regression", Regression)
    seen = []
    honest = training.Trainer.turn
    monkeypatch.setattr(training.Trainer, "turn", lambda self: seen.append(self) or honest(self))
    options = ["method={name: regression}", "optim.lr=0.01"]
    whole = tiny(tmp_path / "whole", "train.iters=4", *options)
    assert set(seen[0].optimizers) == {"student"} and seen[0].state()["critic"] == {}
    tiny(tmp_path / "parts", "train.iters=2", *options)
    assert weights(tiny(tmp_path / "parts", "train.iters=4", *options)) == weights(whole)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    with pytest.raises(ValueError, match="disback.nodes > 0 is for methods with a critic"):
        tiny(tmp_path / "back", "train.iters=1", "disback.nodes=2", *options)


def test_a_folder_in_which_nothing_was_begun_is_free(tmp_path):
    with pytest.raises(ValueError, match="class:0"):
        run("awm-digits", ["reward=class:12", f"out={tmp_path}"])
    with pytest.raises(ValueError, match="group"):  # and not that the folder is another run's
        run("awm-digits", ["reward=class:1", "method.group=7", f"out={tmp_path}", "report.exam=8"])
    folder = tiny(tmp_path, "train.iters=1")
    with pytest.raises(ValueError, match="another config"):
        tiny(tmp_path, "train.iters=1", "seed=5")
    assert (folder / "student.safetensors").is_file()
