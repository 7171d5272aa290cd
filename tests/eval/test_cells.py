"""Cells are kept as they are done: what was there is not made again, an error loses nothing, processes agree."""

import json
from functools import partial

import pytest

from fewstep.eval.cells import command


def answer(x, known):
    if x == "bad":
        raise RuntimeError("a cell went wrong")
    return {"x": x, "before": len(known)}


def told(known):
    return f"{sorted(known)}\n"


def kept(path):
    return json.loads(path.read_text())["results"]


def cells(*names):
    return [(name, partial(answer, name)) for name in names]


def test_what_is_there_is_not_made_again_and_an_error_loses_nothing(tmp_path, capsys):
    path = tmp_path / "results.json"
    with pytest.raises(RuntimeError, match="went wrong"):
        command("", path, cells("a", "b", "bad", "c"), told, [])
    assert kept(path) == {"a": {"x": "a", "before": 0}, "b": {"x": "b", "before": 1}}
    command("", path, cells("a", "b", "c"), told, [])
    assert kept(path)["c"]["before"] == 2 and "'c'" in path.with_suffix(".md").read_text()
    assert capsys.readouterr().out.endswith("['a', 'b', 'c']\n\n")


def test_some_cells_no_time_and_only_a_look(tmp_path):
    path = tmp_path / "results.json"
    command("", path, cells("one|1", "two|2"), told, ["--only", "two"])
    assert list(kept(path)) == ["two|2"]
    command("", path, cells("one|1"), told, ["--seconds", "-1"])
    command("", path, cells("one|1"), told, ["--table"])
    assert list(kept(path)) == ["two|2"]


def test_processes_make_the_same_cells(tmp_path):
    path = tmp_path / "results.json"
    # a function that another process can import, and that takes what is known as its last argument
    command(
        "",
        path,
        [(str(n), partial(dict.get, {"square": n * n}, "square")) for n in range(4)],
        told,
        ["--jobs", "2"],
    )
    assert kept(path) == {str(n): n * n for n in range(4)}
    with pytest.raises(TypeError):
        command("", path, [("bad", partial(int.bit_length, "no number"))], told, ["--jobs", "2"])
    assert len(kept(path)) == 4
