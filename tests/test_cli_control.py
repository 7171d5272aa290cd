"""``fewstep control``: every shipped recipe runs, small, and says what it did."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from fewstep import cli
from fewstep.cli.control import ControlRecipe, find, names, run
from fewstep.distill import recipe as recipes
from fewstep.models.rewards import LUMA

SMALL = {
    "digits-ink-search": ("num=2", "solver.steps=4", "options.budget=12"),
    "digits-seven-sample": ("num=2", "solver.steps=4", "options.budget=16"),
    "digits-anneal": ("num=2", "solver.steps=4", "options.particles=2"),
    "digits-inpaint": ("num=2", "solver.steps=5", "options.particles=2"),
}


def test_every_recipe_is_tried_here():
    assert set(names()) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_runs_and_tells(name, tmp_path, capsys):
    out = tmp_path / "made.npz"
    assert cli.main(["control", name, *SMALL[name], "--out", str(out)]) == 0
    assert "2 samples" in capsys.readouterr().out
    assert np.load(out)["arr_0" if "arr_0" in np.load(out) else "images"].shape[0] == 2
    told = json.loads((tmp_path / "made.npz.json").read_text())
    assert told["recipe"]["num"] == 2 and told["calls"] > 0


@pytest.mark.parametrize(
    "method, options",
    [
        ("best_of_n", {"n": 3}),
        ("importance", {"n": 3}),
        ("smc_steering", {"particles": 3}),
        ("svdd", {"width": 2}),
        ("dps", {"scale": 1.0}),
    ],
)
def test_the_other_methods_run(method, options):
    made = ControlRecipe(
        method=method, num=2, label="3", reward={"name": "ink"}, options=options,
        solver={"name": "ddim", "steps": 3, "eta": 1.0},
    )  # fmt: skip
    x, told = run(made)
    assert x.shape == (2, 1, 8, 8) and len(told["reward"]) == 2


def test_a_recipe_of_ones_own_and_bad_ones(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    mine.write_text("kind: control\nmethod: best_of_n\nnum: 1\nreward: {name: brightness}\noptions: {n: 2}\n"
                    "solver: {name: ddim, steps: 3, eta: 1.0}\n")  # fmt: skip
    assert find(str(mine)) == mine
    assert (
        cli.main(["control", str(mine), "--out", str(tmp_path / "a.png")]) == 0
        and (tmp_path / "a.png").exists()
    )
    capsys.readouterr()
    for words, message in (
        (["digits-ink"], "did you mean 'digits-inpaint'"),
        ([str(mine), "method=up"], "method must be one of"),
        ([str(mine), "reward.name=joy"], "reward.name must be one of"),
        ([str(mine), "label=12"], "label must be"),
        ([str(mine), "num=0"], "num must be positive"),
        ([str(mine), "solver.order=3"], "solver must have options of ddim, eta"),
        ([str(mine), "options.nn=3"], "best_of_n takes n, reward_space, batch; got nn (did you mean n?)"),
        ([str(mine), "reward.name=class_probability"], "reward.label must be given for class_probability"),
        ([str(mine), "reward.strength=2"], "reward brightness takes nothing more; got strength"),
        ([str(mine), "prompt=fox"], "prompt is of no use: digits takes no text"),
        ([str(mine), "method=svdd", "options.width=-1"], "takes width"),
        (["digits-anneal", "target.name=checked"], "target.name must be one of own, anneal"),
        (
            ["digits-inpaint", "operator.name=blur"],
            "operator blur takes std; got hide; hide=null takes it away",
        ),
        ([str(mine), "colour=red"], "ControlRecipe has"),
        (["digits-inpaint", "operator.hide=all"], "operator.hide must be one of"),
        ([str(mine), "--out", "a.gif"], "--out must end in"),
    ):
        assert cli.main(["control", *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["control", "--help"])
    help = capsys.readouterr().out
    assert "Methods: tree_sample" in help and "digits-ink-search options.budget=200" in help
    assert recipes.read(recipes.raw(find("digits-anneal")), ControlRecipe).options["particles"] == 8


def test_targets_with_a_reward_and_guidance():
    made = ControlRecipe(
        method="feynman_kac", num=2, label="all", guidance=2.0, reward={"name": "ink"}, options={"particles": 2},
        target={"name": "tilt", "scale": 20.0}, solver={"name": "ddim", "steps": 3, "eta": 1.0},
    )  # fmt: skip
    x, told = run(made)
    assert x.shape == (2, 1, 8, 8) and len(told["reward"]) == 2 and told["calls"] > 0
    made.options = {"particles": 2, "drift": None}  # as if it had not been said
    assert run(made)[0].equal(x)


def test_a_pipeline_of_texts(tmp_path, capsys):
    """A tiny Stable Diffusion from its folder: two prompts in turn, rewards of decoded images, guidance or none."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "samplers" / "pipelines.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tiny.build("sd").save_pretrained(tmp_path / "sd")
    mine = tmp_path / "mine.yaml"
    mine.write_text("kind: control\nmethod: tree_search\nnum: 2\nreward: {name: brightness}\nprompt: [a b, c d]\n"
                    "options: {budget: 12, batch: 2}\nsolver: {name: ddim, steps: 3, eta: 1.0}\n")  # fmt: skip
    size = [f"model={tmp_path / 'sd'}", "height=16", "width=16"]
    for guidance in ("1.0", "3.0"):
        out = tmp_path / f"{guidance}.npz"
        assert cli.main(["control", str(mine), *size, f"guidance={guidance}", "--out", str(out)]) == 0
        told = json.loads((tmp_path / f"{guidance}.npz.json").read_text())
        pictures = np.load(out)["arr_0"]
        assert pictures.shape == (2, 16, 16, 3) and told["calls"] == 12 and "ess" not in told
        assert np.allclose(told["reward"], told["best_reward"], atol=1e-3)
        assert np.allclose(
            pictures @ np.array(LUMA) / 255 @ np.ones(16) / 16 @ np.ones(16) / 16, told["reward"], atol=2e-3
        )
    capsys.readouterr()
    assert cli.main(["control", str(mine), *size, "prompt=null"]) == 2
    assert "--prompt is needed" in capsys.readouterr().err
