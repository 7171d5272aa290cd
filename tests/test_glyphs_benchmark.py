"""The glyphs' benchmark from end to end, with small networks: what runs on a GPU runs here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import fewstep

pytest.importorskip("matplotlib")


@pytest.mark.slow
def test_every_part_has_a_result(tmp_path):
    file = Path(fewstep.__file__).parent / "benchmarks" / "glyphs_gpu.py"
    spec = importlib.util.spec_from_file_location("glyphs_gpu", file)
    glyphs_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(glyphs_gpu)
    threads = torch.get_num_threads()
    try:
        glyphs_gpu.main(
            ["--tiny", "--device", "cpu", "--out", str(tmp_path / "glyphs"), "--runs", str(tmp_path)]
        )
    finally:
        torch.set_num_threads(threads)
    saved = json.loads((tmp_path / "glyphs.json").read_text())
    results = saved["results"]
    assert [*results] == [part.__name__ for part in glyphs_gpu.PARTS] and saved["environment"]["device"]
    wrong = {name: said for name, said in results.items() if isinstance(said, str)}
    assert not wrong
    for name in glyphs_gpu.STUDENTS:
        assert results[name]["calls"] == (4 if name == "phased-glyphs" else 1)
        assert results[name]["seconds an iteration"] > 0 and results[name]["fd"] > 0
    table = (tmp_path / "glyphs.md").read_text()
    assert all(f"| {name} |" in table for name in ("real letters", "teacher, 40 calls", *glyphs_gpu.STUDENTS))
    assert (tmp_path / "glyphs.png").is_file()
