"""``fewstep eval suite`` as a user types it, the papers' recipes with stand-ins for what must be downloaded."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep import cli
from fewstep.cli import eval_suite
from fewstep.eval import save_npz
from fewstep.eval.contestants import contestant
from fewstep.models import GaussianMixture, gaussian, paths
from fewstep.models.load import build, save_checkpoint
from fewstep.samplers import abm, grids


def run(*words, capsys):
    code = cli.main([str(word) for word in ("eval", "suite", *words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_flags_make_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--model",
        "digits-flow",
        "--samplers",
        "deis:order=2,ddim",
        "--nfe",
        "2,3",
        "--metrics",
        "fd,sw2",
    ]
    code, out, err = run(
        *words, "--num", 12, "--batch", 16, "--ref", "digits:held_out", "--out", "page", capsys=capsys
    )
    assert code == 0 and out.splitlines()[-1] == "page/index.html", err
    rows = list(csv.DictReader(open("page/table.csv")))
    assert [(r["sampler"], r["calls"], r["metric"]) for r in rows][:3] == [
        ("deis:order=2", "2", "fd"), ("deis:order=2", "2", "sw2"), ("deis:order=2", "3", "fd")]  # fmt: skip
    assert (
        all(r["reference"] == "digits:held_out" for r in rows)
        and (tmp_path / "page" / "quality.png").is_file()
    )


def test_changes_may_stand_behind_flags(capsys):
    code, out, err = run("digits", "--out", "page", "num=7", "--print-config", "nfe=[3]", capsys=capsys)
    assert code == 0 and "num: 7\n" in out and "nfe:\n- 3\n" in out, err


def test_wrong_words_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["cifar10"], "did you mean 'cifar10-edm'"),
        (["--samplers", "dies"], "deis"),
        (["--nfe", "five"], "recipe: "),
        (["digits", "nmu=3"], "'num'?"),
        (["--metrics", "fid"], "metrics must be among fd"),
        (["--model", "nothing"], "nothing"),
    ):
        code, _, err = run(*words, capsys=capsys)
        assert code == 2 and said in err, (words, err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", eval_suite.names())
def test_recipes_are_read_and_their_expectations_are_rows(name, capsys):
    assert run(name, "--print-config", capsys=capsys)[0] == 0
    arguments = type("Arguments", (), {"words": [name], **dict.fromkeys(eval_suite.FLAGS)})()
    recipe = eval_suite._recipe(arguments)
    for text in recipe.samplers:
        contestant(text)
    for one in recipe.expected:
        # tables are called by what they are, without the budget
        assert any(contestant(text).name == one["sampler"] for text in recipe.samplers), one
        assert one["budget"] in recipe.nfe and one["value"] > 0 and one["source"]


def stand_in(folder, channels: int, side: int) -> None:
    """A network, a table, Gaussian statistics and pictures, small, named as the recipe for CIFAR-10 has them."""
    torch.manual_seed(0)
    net = {"type": "unet", "in_channels": channels, "out_channels": channels, "sample_size": side,
           "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
           "layers_per_block": 1, "norm_num_groups": 4}  # fmt: skip
    config = {"path": paths.edm().to_config(), "predicts": "x0", "precond": "edm", "shape": [channels, side, side],
              "net": net, "time_scale": 1.0}  # fmt: skip
    d = build(config)
    save_checkpoint(folder / "net.safetensors", d, config)
    abm(d.path, grids.vp(d.path, 3)).save(folder / "s3-3.json")
    data = GaussianMixture([1.0], torch.zeros(1, channels * side**2), 0.2).sample(40).float()
    data = data.reshape(40, channels, side, side).clamp(-1, 1)
    gaussian(data, rank=8).save(folder / "cifar10-gaussian.npz")
    save_npz(folder / "ref.npz", data)


CHANGES = ["model=net.safetensors", "ref=ref.npz", "num=6", "batch=3", "nfe=[3]"]


def test_the_recipe_for_cifar_runs_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stand_in(tmp_path, 1, 8)
    code, out, err = run("cifar10-edm", *CHANGES, "features=digits", "--dry-run", capsys=capsys)
    assert code == 0 and "10 cells would be made" in out and not (tmp_path / "report").exists(), err
    code, out, err = run("cifar10-edm", *CHANGES, "features=digits", capsys=capsys)
    assert code == 0, err
    rows = list(csv.DictReader(open("report/table.csv")))
    assert len(rows) == 10 and all(r["calls"] == "3" for r in rows)
    assert len({r["value"] for r in rows}) == 9  # the searched table of this test is abm's own


def test_the_very_command_under_torchrun_with_weights_of_inception(tmp_path):
    spec = importlib.util.spec_from_file_location(
        "inception_stand_in", Path(__file__).parent / "eval" / "inception_stand_in.py"
    )
    stands = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stands)
    stands.random_inception(tmp_path / "inception.pth")
    stand_in(tmp_path, 3, 32)
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "fewstep",
    ]
    words += ["eval", "suite", "cifar10-edm", *CHANGES, "weights=inception.pth", "samplers=abm,euler@karras"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "report" / "results.json").read_text())["rows"]
    assert [r["sampler"] for r in rows] == ["abm", "euler@karras"] and rows[0]["features"] == "inception"
    assert (tmp_path / "report" / "index.html").is_file() and done.stdout.count("index.html") == 1
