"""A step costs a fraction of diffusers' own: the benchmark that users run, with generous bounds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_overhead.py"


@pytest.mark.slow
def test_steps_cost_less_than_half_of_diffusers():
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("step_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = module.measure(steps=10, repeats=15)
    finally:
        torch.set_num_threads(threads)
    for name in ("deis 3", "unipc 2", "dpmpp 2M"):
        assert result["ratios"][name]["median"] < 0.5, module.show(result)
