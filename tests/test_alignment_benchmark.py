"""The table of tuned models: what it claims follows from its cells, and a claim that is not so is said to be none."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "alignment.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("alignment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(gain, curve=()):
    return {
        "reward": 0.1 + gain, "gain": gain, "gain_error": 0.01, "fd": 5.0, "nearest": 2.1, "kl": 1.0, "iterations": 10,
        "curve": [list(one) for one in curve],
    }  # fmt: skip


def test_claims_follow_from_the_cells(script):
    known = {"base": {"ink": cell(0.0)}}
    known |= {f"run|AWM|ink|{seed}": cell(0.3, [(5, 100, 0.2), (10, 200, 0.4)]) for seed in range(3)}
    known |= {f"run|MaPO|ink|{seed}": cell(0.02) for seed in range(3)}
    known |= {"run|untouched control|ink|0": cell(0.0)}
    known |= {f"run|Flow-GRPO|ink|{seed}": cell(0.1, [(20, 900, 0.2)]) for seed in range(3)}
    said = "\n".join(script.claims(known))
    assert "yes: AWM, ink" in said and "NO: MaPO, ink" in said and "yes: untouched control" in said
    known["run|untouched control|ink|0"] = cell(0.2)
    assert "NO: untouched control" in "\n".join(script.claims(known))
    assert "| ink | 0 | 0.200 | 5, 100 | 20, 900 |" in script.race(known)
    text = script.tables(known)
    assert "| AWM | 0.4 (0.4 .. 0.4) |" in text and "| the base | 0.1 |" in text


def test_every_cell_names_a_recipe_that_ships(script):
    from fewstep.distill import recipe as recipes

    names = {name.split("|")[0] for name, _ in script.jobs()}
    assert names == {"base", "best", "run", "rlg"}
    for recipe, options in script.METHODS.values():
        assert recipe in recipes.names("distill"), recipe
        assert all("=" in option for option in options)
