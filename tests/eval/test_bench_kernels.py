"""The benchmark of kernels as a CPU can run it: rows, limits, and what becomes of what fails."""

from __future__ import annotations

import json
import types

import pytest
import torch

from fewstep import cli
from fewstep.eval import bench_kernels
from fewstep.kernels import cases
from fewstep.kernels.cases import Case

CPU = torch.device("cpu")


def module(reference, **more):
    def make(device):
        return {"x": cases.randn(64, 64, device=device)}

    return types.SimpleNamespace(reference=reference, CASES=[Case("c", make)], **more)


def test_a_row():
    made = module(lambda x: x.exp(), flops=lambda x: 2 * x.numel())
    row = bench_kernels.one(made, made.CASES[0], "forward", CPU, repeats=2, copies_per_second=1e9)
    assert row["bytes"] == 2 * 4 * 64 * 64 and row["right"] and 0 < row["errors"]["eager"] < 1e-6
    seconds = row["call"]["eager"]["median"]
    assert row["roofline"]["eager"] == pytest.approx(row["bytes"] / 1e9 / seconds)
    assert row["tflops"]["eager"] == pytest.approx(2 * 64 * 64 / seconds / 1e12)


def test_what_is_wrong_or_fails_is_said():
    made = module(lambda x: x.exp() if x.dtype == torch.float64 else x.exp() + 1e-3)
    row = bench_kernels.one(made, made.CASES[0], "forward", CPU, repeats=1)
    assert not row["right"] and bench_kernels.line(
        {"op": "o", "case": "c", "mode": "forward"} | row
    ).endswith("WRONG")

    def broken(x):
        raise RuntimeError("no\nmore")

    made = module(lambda x: x, RIVALS={"other": broken})
    row = bench_kernels.one(made, made.CASES[0], "forward", CPU, repeats=1)
    assert row["failed_providers"] == {"other": "RuntimeError: no"} and list(row["call"]) == ["eager"]


def test_there_and_back():
    made = module(lambda x: x**3, op=lambda x: x**3)
    row = bench_kernels.one(made, made.CASES[0], "both", CPU, repeats=1)
    assert {"triton", "eager"} <= row["errors"].keys() and row["right"]


def test_one_tensor_given_twice_is_read_once():
    x = torch.zeros(10)
    assert cases.traffic({"x": x, "y": x, "z": [x.clone(), None]}, x + 1) == 3 * 40


def test_no_row_begins_after_its_time():
    result = bench_kernels.run(["philox"], "cpu", minutes=0.0)
    assert result["rows"] == [] and len(result["left_out"]) == 3  # all but the empty one


def test_the_command(tmp_path, capsys):
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    words = ["bench", "kernels", "--op", "philox", "--case", "one", "--repeats", "2", "--out", str(file)]
    assert cli.main([*words, "--plot", str(picture)]) == 0
    run = json.loads(file.read_text())
    assert run["environment"]["torch"] == torch.__version__ and picture.stat().st_size > 1000
    assert [row["case"] for row in run["results"]["rows"]] == ["one"]
    if not torch.cuda.is_available():
        assert "references alone, on small shapes: no GPU is here" in capsys.readouterr().out
    assert cli.main(["bench", "kernels", "--op", "phlox"]) == 2
    assert "ops must be among" in capsys.readouterr().err


def test_the_listing(capsys):
    assert cli.main(["kernels"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert set(cases.ops()) <= lines.keys() and "Philox4x32-10" in lines["philox"]
