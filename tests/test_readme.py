"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

from fewstep import cli

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.M | re.S)


def test_the_python_examples_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), names)
    assert names["x"].isfinite().all()
    assert "on vp_linear: 5 calls" in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines() if line])
def test_the_shell_examples_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, *words = line.split()
    assert command == "fewstep"
    assert cli.main(words) == 0, capsys.readouterr().err


def test_every_solver_is_in_the_table_and_nothing_else_is():
    from fewstep.samplers import catalogue

    rows = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(catalogue.solvers())
