"""MeanFlow, sCM and ECT as runs: without a critic, resumed to the bit, opened again as what samples; LoRA and bf16."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from fewstep.distill.run import main, run
from fewstep.distill.saved import open_student
from fewstep.distill.schema import read
from fewstep.models.jumps import Jumps

TINY = [
    "student.net.hidden_size=16", "student.net.depth=1", "student.warm_up=4", "train.batch=16", "report.exam=64",
    "report.validate=4", "report.checkpoint=2", "report.grid=1000000", "threads=1",
]  # fmt: skip
QUICK = ["train.batch=8", "train.iters=1", "report.exam=20", "report.grid=1000000", "threads=1"]


@pytest.mark.parametrize("method", ["meanflow", "scm", "ect"])
def test_a_run_that_stopped_is_the_unbroken_one(method, tmp_path):
    options = [*TINY, "student.steps=2"]
    whole = run(f"{method}-mixture", [*options, f"out={tmp_path / 'whole'}", "train.iters=4"])
    for iters in (2, 4):
        broken = run(f"{method}-mixture", [*options, f"out={tmp_path / 'broken'}", f"train.iters={iters}"])
    ours, theirs = (load_file(folder / "student.safetensors") for folder in (broken, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    student, recipe, numbers = open_student(whole)
    assert student.calls == 2 and "teacher_mmd" in numbers and recipe.method["name"] == method
    assert isinstance(student.d, Jumps) == (method == "meanflow")
    assert student.sample(torch.randn(5, 2)).isfinite().all()


@pytest.mark.parametrize("method", ["scm", "ect"])
def test_adapters_and_half_precision(method, tmp_path):
    pytest.importorskip("peft")
    options = ["lora.rank=2", "train.precision=bf16"]
    folder = run(f"{method}-digits", [*QUICK, f"out={tmp_path}", *options])
    student, _, _ = open_student(folder)
    assert student.sample(torch.randn(2, 1, 8, 8)).isfinite().all()


def test_mean_flow_from_nothing_needs_no_teacher_s_answers(tmp_path):
    net = "{type: unet, sample_size: 8, block_out_channels: [8, 8], norm_num_groups: 4, num_class_embeds: 11}"
    from_data = [f"student.net={net}", "method.source=data", "method.guidance=2.0", f"out={tmp_path}"]
    student, _, _ = open_student(run("meanflow-digits", [*QUICK, *from_data]))
    assert student.d.net.config.second_time and student.d.ends == (0.0, 1.0)


def test_every_recipe_of_the_family_reads():
    for method in ("meanflow", "scm", "ect"):
        for data in ("digits", "mixture"):
            assert read(f"{method}-{data}")[0].method["name"] == method


def test_a_dry_run_makes_one_turn_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["meanflow-mixture", "--dry-run", "train.batch=8", "student.warm_up=1"]) == 0
    assert "loss" in capsys.readouterr().out and not list(tmp_path.iterdir())
