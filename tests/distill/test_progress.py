"""Progress: plain lines where there is no terminal."""

from __future__ import annotations

import re
import sys

from fewstep.distill.progress import track


def test_lines_come_now_and_then_and_at_the_end(capsys):
    for step, say in track(5, "work", every=2):
        say(loss=step / 10)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\(\d+ s\)", "(s)", line) for line in lines] == [
        "work 2/5 loss=0.1 (s)",
        "work 4/5 loss=0.3 (s)",
        "work 5/5 loss=0.4 (s)",
    ]


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for step, say in track(5, "work"):
        say(loss=step / 10)
    shown = capsys.readouterr().err
    assert "work" in shown and "5/5" in shown
