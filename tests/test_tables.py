"""No number in the README or in a report drifts from what was measured, and what was measured can be measured again."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_what_was_measured():
    tables, readme = script("tables"), (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.placed(readme, tables.section()) == readme, "python benchmarks/tables.py writes them anew"
    assert tables.placed(readme, "something else") != readme
    with pytest.raises(ValueError, match="marks"):
        tables.placed("no marks", "")


def test_every_table_has_all_of_its_cells():
    text = script("tables").section()
    rows = {line.split("|")[1].strip().split(",")[0] for line in text.splitlines() if line.startswith("|")}
    assert {"DDPM", "DDIM", "F-PNDM", "DEIS", "Heun", "UniPC", "digits", "mixture"} <= rows
    columns = [*(f"{n} steps" for n in (5, 10, 20)), "20 %", "30 %", *(f"{n} calls" for n in range(4, 11))]
    assert all(f"| {column} |" in text for column in columns)


def test_the_reports_are_what_their_json_renders_to():
    search, shift = script("search"), script("shift_and_teleport")
    for name, render in (
        ("search-cpu", lambda found: search.markdown(found["rows"], found["device"])),
        ("search-fd-cpu", search.markdown_by_metric),
        ("shift-and-teleport-cpu", lambda found: shift.markdown(found["results"])),
    ):
        found = json.loads((RESULTS / f"{name}.json").read_text())
        assert (RESULTS / f"{name}.md").read_text() == render(found), name


@pytest.mark.parametrize("calls", [4, 10])
def test_a_searched_table_that_was_kept_is_as_good_as_it_is_said_to_be(calls):
    """The mixture is exact: its rows come out again to all figures, with the same noise and the same reference."""
    search = script("search")
    kept = {
        (row["problem"], row["calls"]): row
        for row in json.loads((RESULTS / "search-cpu.json").read_text())["rows"]
    }
    row, test = kept["mixture", calls], search.Test("mixture")
    gaps = test.gaps(search.usf(test.d.path, row["times"], steps=row["steps"]))
    assert search.error(gaps) == pytest.approx(row["error"], rel=1e-8)
    assert np.sqrt((gaps**2).mean()) == pytest.approx(row["rmse"], rel=1e-8)
    hand = dict(search.handmade(test.d.path, calls))[row["best_by_hand"]]
    assert search.error(test.gaps(hand.table(test.d.path))) == pytest.approx(row["error_by_hand"], rel=1e-8)
