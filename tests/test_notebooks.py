"""The notebooks run, with smaller numbers where the real ones take minutes, and without jupyter; none has outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What stands in the cell that is tagged `parameters`, in small.
SMALL = {
    "1-a-solver-in-a-pipeline": {"images": 32, "exact_steps": 60},
    "2-tables-and-search": {"budget": 2500},
    "3-correctors-and-trees": {"particles": 2000, "budget": 8000},
    "4-distil-digits": {"iterations": 12, "batch": 24, "exam": 64, "threads": 1},
    "5-measure": {"many": 500, "few": 120},
}
NEEDS = {"1-a-solver-in-a-pipeline": "diffusers"}


def cells(notebook: Path, kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    if notebook.stem in NEEDS:
        pytest.importorskip(NEEDS[notebook.stem])
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells(notebook)):
        exec(compile("".join(cell["source"]), f"{notebook.stem}, code cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            small = SMALL[notebook.stem]
            assert set(small) <= set(names), "a parameter's name is not the notebook's"
            names.update(small)
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_holds_no_outputs_and_no_magics(notebook):
    code = cells(notebook)
    assert "parameters" in code[0]["metadata"]["tags"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    for cell in code:
        assert not re.search(r"^\s*[%!]", "".join(cell["source"]), re.M)
    assert "".join(code[-1]["source"]).startswith("assert ")
    assert "".join(cells(notebook, "markdown")[0]["source"]).startswith("# ")


def test_there_are_five():
    assert {n.stem for n in NOTEBOOKS} == set(SMALL) and len(NOTEBOOKS) == 5
