"""The end-to-end benchmark as a CPU can run it: networks of a few thousand parameters through the whole script."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import fewstep

SCRIPT = Path(fewstep.__file__).parent / "benchmarks" / "kernels_end_to_end.py"


def run(monkeypatch, *words):
    spec = importlib.util.spec_from_file_location("kernels_end_to_end", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kernels_end_to_end", script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["kernels_end_to_end.py", *words])
    return script, script.main


@pytest.mark.slow
def test_a_row(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    words = ["--tiny", "--device", "cpu", "--no-compile", "--out", str(file), "--rows", "DiT-XL/2"]
    _, main = run(monkeypatch, *words)
    assert main() == 0
    row = json.loads(file.read_text())["results"]["DiT-XL/2"]
    assert {"ours", "ours, patched", "ours, patched, captured", "diffusers"} == row["times"].keys()
    assert 0 <= row["patching_changed"] < 1e-4 and "layer_norm_modulate" in row["patched"]


def test_a_row_that_fails_is_told_and_the_others_run(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    words = [
        "--tiny",
        "--device",
        "cpu",
        "--no-compile",
        "--out",
        str(file),
        "--rows",
        "SDXL",
        "EDM CIFAR-10",
    ]
    script, main = run(monkeypatch, *words)

    def absent(*_):
        raise ImportError("no diffusers here")

    script.ROWS["SDXL"] = absent
    assert main() == 0
    results = json.loads(file.read_text())["results"]
    assert results["SDXL"] == {"failed": "left out: no diffusers here"} and "times" in results["EDM CIFAR-10"]
