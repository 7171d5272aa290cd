"""Interleaved timing, what a result says of its machine, and files that appear whole."""

from __future__ import annotations

import json
import os
import platform
import threading
import time

import pytest
import torch

from fewstep.eval import bench
from fewstep.eval.files import written_aside


def test_rounds_are_interleaved():
    calls = []
    result = bench.compare({n: lambda n=n: calls.append(n) for n in "ABC"}, repeats=4, warmup=2, inner=3)
    assert calls == [n for _ in range(6) for n in "ABC" for _ in range(3)]
    assert result["order"] == list("ABC") * 6
    assert {len(readings) for readings in result["rounds"].values()} == {4}
    assert result["baseline"] == "A"


def test_ratio_of_sleeps():
    result = bench.compare(
        {"two": lambda: time.sleep(8e-3), "one": lambda: time.sleep(4e-3)}, 15, 1, baseline="one"
    )
    assert result["names"]["two"]["ratio"]["median"] == pytest.approx(2, rel=0.2)
    assert result["names"]["one"]["ratio"]["median"] == 1
    assert result["names"]["one"]["median"] >= 4e-3


def test_ratio_is_taken_round_by_round(monkeypatch):
    # A machine that slows down a hundredfold half way: each round's ratio is 2 all the same.
    readings = iter([1.0, 2.0, 1.0, 2.0, 100.0, 200.0, 1.0, 2.0])
    monkeypatch.setattr(bench, "_read_wall", lambda fn, inner: next(readings))
    result = bench.compare({"a": int, "b": int}, repeats=4, warmup=0)
    ratio = result["names"]["b"]["ratio"]
    assert {ratio[q] for q in ("median", "q10", "q25", "q75", "q90")} == {2.0}
    assert result["names"]["b"]["median"] == 2.0


def test_a_clock_that_reads_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(bench, "_read_wall", lambda fn, inner: 0.0)
    with pytest.raises(ValueError, match="inner is 1, with which the clock reads 0 s for 'a'; expected more"):
        bench.compare({"a": int})


def test_an_error_inside_leaves_the_collector_on():
    import gc

    with pytest.raises(ZeroDivisionError):
        bench.compare({"a": lambda: 1 / 0})
    assert gc.isenabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_and_wall_clock_agree_on_a_gpu():
    x = torch.randn(2048, 2048, device="cuda")
    fns = {"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}
    for clock in ("wall", "events"):
        ratio = bench.compare(fns, repeats=20, inner=5, clock=clock)["names"]["four"]["ratio"]["median"]
        assert ratio == pytest.approx(4, rel=0.25)


def test_environment_says_what_matters_and_nothing_private():
    told = bench.environment()
    assert told["torch"] == torch.__version__ and told["threads"] == torch.get_num_threads()
    assert {"device", "triton", "diffusers", "python", "commit", "fewstep"} <= set(told)
    text = json.dumps(told)
    assert os.sep + "home" not in text and os.getcwd() not in text
    assert len(platform.node()) < 4 or platform.node() not in text


def test_no_commit_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "fewstep" / "eval" / "bench.py"))
    assert bench._commit() == {"commit": None, "changed": None}


def test_save_and_table(tmp_path):
    result = bench.compare({"a": lambda: None, "much longer": lambda: time.sleep(1e-4)}, repeats=3)
    bench.save(tmp_path / "new" / "r.json", {"speed": result, "fd": torch.tensor([1.5])})
    back = json.loads((tmp_path / "new" / "r.json").read_text())
    assert back["results"]["fd"] == [1.5] and back["results"]["speed"] == result
    assert back["environment"]["torch"] == torch.__version__
    lines = bench.table(back["results"]["speed"]).splitlines()
    assert len(lines) == 3 and lines[2].startswith("much longer ")
    # Right-aligned: the heading ends where the ratios do.
    assert len(lines[0]) == lines[1].index("1.000  (") + 5


def test_a_bad_result_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    bench.save(path, {"fd": 1.0})
    before = path.read_bytes()
    for wrong in (float("nan"), float("inf"), object()):
        with pytest.raises(ValueError, match="results cannot be written as JSON"):
            bench.save(path, {"fd": wrong})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["r.json"]


def test_a_broken_write_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    for name in ("a", "b"):
        with pytest.raises(OSError, match="disk full"), written_aside(tmp_path / name) as aside:
            aside.write_text("half")
            raise OSError("disk full")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "environment", dict)
    path, stop, seen = tmp_path / "r.json", threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(len(json.loads(path.read_text())["results"]))

    bench.save(path, list(range(20000)))
    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        bench.save(path, list(range(20000)))
    stop.set()
    reader.join()
    assert set(seen) == {20000}


def test_bad_input_is_named():
    for wrong in ({}, [int], {"a": 3}, None):
        with pytest.raises(ValueError, match="fns is .*; expected a dict of names to callables"):
            bench.compare(wrong)
    for name in ("repeats", "inner"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected a whole number of at least 1"):
            bench.compare({"a": int}, **{name: 0})
    with pytest.raises(ValueError, match="warmup is -1; expected a whole number of at least 0"):
        bench.compare({"a": int}, warmup=-1)
    with pytest.raises(ValueError, match=r"baseline is 'z'; expected one of \['a'\]"):
        bench.compare({"a": int}, baseline="z")
    with pytest.raises(ValueError, match="clock is 'sun'; expected 'wall' or 'events'"):
        bench.compare({"a": int}, clock="sun")
