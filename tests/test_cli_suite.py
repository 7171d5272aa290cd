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
from fewstep.samplers import abm, euler, grids


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


def script(*parts):
    """A file of the tests that is no test."""
    file = Path(__file__).parent.joinpath(*parts)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return script("eval", "inception_stand_in.py").random_inception(
        tmp_path_factory.mktemp("w") / "inception.pth"
    )


def of_a_pipeline(name):
    def make(folder):
        pytest.importorskip("diffusers")
        script("samplers", "pipelines.py").build(name).save_pretrained(folder / "model")
        (folder / "prompts.txt").write_text("a b\nc\nd e f\ng\n")

    return make


def one_step_student(folder):
    stand_in(folder, 3, 16)
    (folder / "net.safetensors").rename(folder / "model")
    euler(paths.edm(), grids.karras(paths.edm(), 1)).save(folder / "student-1.json")


# a layer of 64: eigenvalues of 2048 would be most of the time
SMALL = ["model=model", "ref=ref.npz", "num=4", "batch=2", "weights=inception.pth", "features=inception-64"]
TEXTS = ["prompts=prompts.txt", "dtype=float32", "variant=null", "nfe=[3]"]
OTHERS = {
    "cifar10-time-shift": (of_a_pipeline("ddpm"), ["nfe=[3]"], 5),
    "imagenet64-student": (one_step_student, ["metrics=[fd,sw2]", "model=model.safetensors"], 1),
    "coco30k-sd15": (of_a_pipeline("sd"), TEXTS, 5),
    "coco10k-sdxl": (of_a_pipeline("sdxl"), TEXTS, 5),
}


def test_every_recipe_is_tried():
    assert set(eval_suite.names()) == {*OTHERS, "cifar10-edm", "digits"}


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("imagenet64-student", "coco30k-sd15") else pytest.param(n, marks=pytest.mark.slow)
        for n in OTHERS
    ],
)
def test_the_other_recipes_run_end_to_end(name, inception, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, changes, cells = OTHERS[name]
    make(tmp_path)
    if (tmp_path / "model").is_file():
        (tmp_path / "model").rename(tmp_path / "model.safetensors")
    save_npz("ref.npz", torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))
    (tmp_path / "inception.pth").symlink_to(inception)
    code, _, err = run(name, *SMALL, *changes, capsys=capsys)
    assert code == 0, err
    rows = list(csv.DictReader(open("report/table.csv")))
    assert len({r["sampler"] for r in rows}) == cells and {r["features"] for r in rows} == {"inception-64"}
    assert all(float(r["value"]) >= 0 and r["num"] == "4" for r in rows)


def test_the_very_command_under_torchrun_with_weights_of_inception(inception, tmp_path):
    (tmp_path / "inception.pth").symlink_to(inception)
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
