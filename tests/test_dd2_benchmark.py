"""What benchmarks/dd2.py measured holds what its page says of it, and its table is made of what is there."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "benchmarks" / "dd2.py"))


@pytest.fixture(scope="module")
def known(script):
    return json.loads(script["RESULTS"].read_text())["results"]


def students(known, form):
    return [known[f"run|{form}|{seed}"]["rounded"] for seed in range(3)]


@pytest.mark.parametrize("form", ["sid", "dmd"])
def test_every_student_is_between_the_teacher_and_tokens_drawn_apart(known, form):
    """Of each seed, by FD and by what the teacher thinks of the tokens; the start is beyond both."""
    apart, teacher, start = known["floors"]["set of tokens"], known["teacher"], known["start"]["rounded"]
    for marks in students(known, form):
        for key in ("fd_teacher", "fd_digits", "nats"):
            assert max(row[key] for row in teacher) < marks[key] < apart[key] < start[key]


@pytest.mark.parametrize("form", ["sid", "dmd"])
def test_the_toys_joint_law_is_learnt(known, form):
    for seed in range(3):
        cell = known[f"toy|{form}|{seed}"]
        assert cell["600"] < 0.5 * cell["start"]


def test_one_call_is_faster_than_sixteen(known):
    assert all(cell["ratio"] > 1 for cell in known["time"].values())


def test_the_table_has_a_row_for_each_and_is_the_committed_one(script, known):
    text = script["tables"](known)
    assert text == script["RESULTS"].with_suffix(".md").read_text()
    for name in (
        "autoregressive teacher",
        "DD2, sid",
        "DD2, dmd",
        "student before training",
        "set of tokens",
    ):
        assert f"| {name} |" in text
    assert "set of tokens" not in script["tables"]({})
