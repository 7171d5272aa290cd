"""The benchmark's arithmetic: what counts as skipped at no loss, and tables that hold every row."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "shift_and_teleport.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("shift_and_teleport", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def rows(*distances):
    made = []
    for k, fd in enumerate(distances):
        cell = {"fd": fd, "rms": 0.1 * k}
        row = {
            "problem": "p",
            "solver": "s",
            "skipped": k,
            "calls": 10 - k,
            "share": k / 10,
            "rho": 5.0 / (k or 1),
        }
        made.append({**row, "seeded, for all": cell})
    return made


def test_skipping_counts_as_lossless_up_to_the_first_loss_and_not_beyond(script):
    (found,) = script.lossless(rows(2.0, 2.01, 1.9, 2.1, 1.8))
    assert found["share"] == 0.2 and found["fd"] == 1.9
    (none,) = script.lossless(rows(2.0, 3.0))
    assert none["share"] == 0


def test_the_error_of_a_loss_is_that_of_its_samples(script):
    """Of means the jackknife is the standard error of the difference, that of pairs."""
    generator = torch.Generator().manual_seed(0)
    problem = script.Problem("p", None, None, {}, None, lambda x: float(x.mean()), {}, 0.0)
    x, noise = torch.randn(4000, 1, generator=generator), torch.randn(4000, 1, generator=generator)
    found = script.loss(problem, x + 0.1 * noise + 0.3, x)
    assert found["loss"] == pytest.approx(0.3, abs=0.01)
    # of ten blocks, whose spread is known within a quarter or so
    assert found["loss_se"] == pytest.approx(0.1 / 4000**0.5, rel=0.6)


def test_the_smallest_run_fills_every_table(script):
    # the real judge is slow, and called ten times a cell
    problem = replace(script.of_mixture(100), judge=lambda x: float(x.std()))
    results = {"num": 100, "floor": {"mixture-vp": problem.judge(problem.truth)}}
    script.PAPER, script.STEPS = {5: (40, 200)}, 6
    results["shift"], results["skip"] = script.shift_rows(problem), script.skip_rows(problem)
    results["lossless"] = script.lossless(results["skip"])
    text = script.markdown(results)
    assert sum(line.startswith("| mixture-vp") for line in text.splitlines()) == 4 + 4 * 6 + 4
    plain = [row for row in results["skip"] if row["skipped"] == 0 and row["solver"] == "DEIS"]
    assert plain[0]["seeded, for all"]["rms"] < 0.5 and "cold" not in plain[0]
