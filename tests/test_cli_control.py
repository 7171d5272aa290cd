"""``fewstep control``: every shipped recipe runs, small, and says what it did."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")

from fewstep import cli
from fewstep.cli.control import ControlRecipe, find, names, run
from fewstep.distill import recipe as recipes

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
        ([str(mine), "colour=red"], "ControlRecipe has"),
        (["digits-inpaint", "operator.hide=all"], "operator.hide must be one of"),
        ([str(mine), "--out", "a.gif"], "--out must end in"),
    ):
        assert cli.main(["control", *words]) == 2
        assert message in capsys.readouterr().err
    assert recipes.read(recipes.raw(find("digits-anneal")), ControlRecipe).options["particles"] == 8
