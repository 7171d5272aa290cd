"""Speed reports of solvers and pipelines: all rows there, nothing changed that was lent."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fewstep import cli

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipelines():
    file = Path(__file__).parents[1] / "samplers" / "pipelines.py"
    spec = importlib.util.spec_from_file_location("pipelines", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pipeline_is_timed_and_left_as_it_was(pipelines, tmp_path, capsys):
    from fewstep.eval import bench_pipelines

    pipe = pipelines.sd()
    net, scheduler = pipe.unet, pipe.scheduler
    result = bench_pipelines.measure(pipe, {"prompt": ["a", "b"]}, steps=2, repeats=2)
    assert list(result["names"]) == ["pipeline", "FewstepScheduler", "sample"]
    assert (
        result["names"]["pipeline"]["ratio"]["median"] == 1.0
        and result["pipeline"] == "StableDiffusionPipeline"
    )
    assert pipe.unet is net and pipe.scheduler is scheduler
    bench_pipelines.plot(result, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 3000


def test_from_the_shell(pipelines, tmp_path, capsys):
    pipelines.sd().save_pretrained(tmp_path / "sd")
    words = [
        "bench",
        "pipelines",
        str(tmp_path / "sd"),
        "--prompt",
        "a",
        "--steps",
        "2",
        "--repeats",
        "2",
        "--device",
    ]
    assert cli.main([*words, "cpu", "--out", str(tmp_path / "p.json")]) == 0
    stored = json.loads((tmp_path / "p.json").read_text())
    assert stored["environment"]["torch"] and stored["results"]["steps"] == 2
    assert "FewstepScheduler" in capsys.readouterr().out
    words = [
        "bench",
        "solvers",
        "--steps",
        "3",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--plot",
        str(tmp_path / "s.png"),
    ]
    assert cli.main(words) == 0 and "deis 3" in capsys.readouterr().out
    assert (tmp_path / "s.png").is_file()
    assert (
        cli.main(["bench", "pipelines", str(tmp_path)]) == 2
        and "no model_index.json" in capsys.readouterr().err
    )
    assert cli.main(["bench", "pipelines"]) == 2 and "needs a folder" in capsys.readouterr().err
