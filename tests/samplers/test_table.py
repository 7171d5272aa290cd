"""A table as an artefact: it travels as text, says what it is, and is refused when it is not whole."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from fewstep.models import Denoiser, paths
from fewstep.samplers import Program, Table, ddim, deis, dpmpp, grids, sample, starting_noise

VP, FLOW = paths.vp_linear(), paths.flow()
ARRAYS = ("t", "alpha", "sigma", "slot", "a", "b", "c", "times")


def same(one: Table, other: Table) -> bool:
    bits = all(
        getattr(one, name).dtype == getattr(other, name).dtype
        and getattr(one, name).tobytes() == getattr(other, name).tobytes()
        for name in ARRAYS
    )
    return bits and one.to_json() == other.to_json()


MANY = {
    "deis": lambda: deis(VP, grids.quadratic(VP, 10), order=4),
    "ancestral": lambda: ddim(FLOW, grids.uniform(FLOW, 7), eta=0.3),
    "discrete": lambda: dpmpp(paths.vp_discrete(paths.ddpm_alphas_cumprod()), [999, 500, 20.5, -1]),
    "lanes": lambda: ddim(VP, np.stack([grids.quadratic(VP, 5), grids.logsnr(VP, 5)])),
}


@pytest.mark.parametrize("name", MANY)
def test_text_and_pickle_carry_every_bit(name, tmp_path):
    table = MANY[name]()
    table.save(tmp_path / "deep" / "table.json")
    back = Table.load(tmp_path / "deep" / "table.json")
    assert same(back, table) and back is not table
    assert same(pickle.loads(pickle.dumps(table)), table) and same(copy.deepcopy(table), table)
    json.loads(table.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["table.json"]


READ = """
import importlib, sys, types, torch
import fewstep.models                                                # then the samplers' package without its solvers
package = types.ModuleType("fewstep.samplers"); package.__path__ = [p + "/samplers" for p in fewstep.__path__]
sys.modules["fewstep.samplers"] = package
from fewstep.models import Denoiser, paths
from fewstep.samplers.table import Table
from fewstep.samplers.loop import sample
from fewstep.samplers.noise import starting_noise
d = Denoiser(lambda x, tau: 0.7 * x.clamp(-1, 1) + 0.1, paths.flow(), predicts="x0")
x = sample(d, starting_noise(3, 4, (5,)), Table.load(sys.argv[1]), seed=5)
loaded = {name.rpartition(".")[2] for name in sys.modules if name.startswith("fewstep.samplers.")}
assert loaded == {"table", "plan", "loop", "noise", "fused"}, loaded
print(x.view(torch.int32).tolist())
"""


def test_a_process_without_solvers_draws_the_same_bits(tmp_path):
    table = ddim(FLOW, grids.logsnr(FLOW, 7), eta=0.5)
    table.save(tmp_path / "table.json")
    d = Denoiser(lambda x, tau: 0.7 * x.clamp(-1, 1) + 0.1, FLOW, predicts="x0")
    here = sample(d, starting_noise(3, 4, (5,)), table, seed=5).view(torch.int32).tolist()
    command = [sys.executable, "-c", READ, str(tmp_path / "table.json")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(here)


def test_a_half_written_file_never_appears(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    MANY["deis"]().save(file)
    before = file.read_text()

    def fails(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Table, "to_json", fails)
    with pytest.raises(KeyboardInterrupt):
        MANY["lanes"]().save(file)
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


def test_arrays_are_its_own_and_fixed():
    table = MANY["deis"]()
    for name in ARRAYS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(table, name)[...] = 0
    theirs = np.array(table.a)
    mine = Table(**{**vars(table), "a": theirs})
    theirs[:] = 7.0
    assert same(mine, table)


# --- what is refused -------------------------------------------------------------------------------


def change(**edits):
    def apply(content):
        content.update(edits)

    return apply


def put(name, where, value):
    def apply(content):
        array = np.array(content[name], dtype=object)
        array[where] = value
        content[name] = array.tolist()

    return apply


REFUSED = {
    "version": (change(fewstep_table=99), "format 99; this version reads 1"),
    "no version": (lambda c: c.pop("fewstep_table"), "'fewstep_table' is missing"),
    "missing": (lambda c: (c.pop("sigma"), c.pop("form")), "sigma, form missing"),
    "nan": (put("b", (2, 0, 0, 0), float("nan")), "b is not finite in row 2 of deis"),
    "inf": (put("a", (3, 0, 1, 1), float("inf")), "a is not finite in row 3 of deis"),
    "nothing": (put("c", (3, 0, 1), None), "c is not finite in row 3|c must be an array of numbers"),
    "words": (put("alpha", (0, 0), "one"), "alpha must be an array of numbers"),
    "ragged": (change(t=[[1.0], []]), "t must be an array of numbers"),
    "no row": (change(t=[], form=[]), "at least one row"),
    "number": (change(t=1.0), "at least one row and one lane"),
    "short": (lambda c: c["t"].pop(), r"t must have shape \(4, 1\) for 4 calls, got \(3, 1\)"),
    "flat": (change(b=[0.0]), r"b must have shape \(5, 1, 2, 0\)"),
    "form": (change(form=["eps", "eps", "noise", "eps"]), "form must be one of x0, eps, v, got 'noise'"),
    "forms": (change(form="eps"), "form must be a list"),
    "slot": (put("slot", 1, 9), r"slot must lie in 0 .. 2"),
    "half a slot": (put("slot", 1, 0.5), "slot must be integers"),
    "unwritten": (put("b", (1, 0, 0, 2), 1.0), "row 1 reads slot 2, which no call has written yet"),
    "path": (change(path={"path": "spiral"}), "path must be one of .* got 'spiral'"),
    "path's key": (change(path={"path": "flow", "twist": 3}), "wrong key"),
    "times": (change(times=[1.0, 0.5, 0.7, 0.1, 0.0]), "times must be finite and fall strictly"),
    "times' shape": (change(times=[[1.0, 0.0]] * 3), r"times must have shape \(n \+ 1,\) or \(1, n \+ 1\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_table_is_refused_by_name(name):
    content = json.loads(deis(VP, grids.quadratic(VP, 4)).to_json())
    edit, words = REFUSED[name]
    edit(content)
    with pytest.raises(ValueError, match=words):
        Table.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"solver": "ddim"}'])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="not a table"):
        Table.from_json(text)


# --- for people ------------------------------------------------------------------------------------


def test_it_reads_as_equations():
    text = repr(ddim(FLOW, [1.0, 0.5, 0.0], eta=1.0))
    assert text == (
        "ddim(eta=1.0) on flow: 2 calls, 1 slots\n"
        "call         t     alpha     sigma  then\n"
        "                                    x = y = 1 noise\n"
        "   0         1         0         1  d0 = x0;  x = y = +0.5 d0 +0.5 z\n"
        "   1       0.5       0.5       0.5  d0 = x0;  x = y = 1 d0"
    ).replace("+0.5 d0", "0.5 d0")
    assert "4 lanes (lane 0 shown)" in repr(ddim(FLOW, [[1.0, 0.5, 0.0]] * 4))


def test_it_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for name, make in MANY.items():
        table = make()
        figure = table.plot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (
            table.solver in figure.get_suptitle() and f"{table.calls} network calls" in figure.get_suptitle()
        )
    assert len(list(tmp_path.iterdir())) == len(MANY)


def test_weights_on_x0_sum_to_alpha_where_the_start_is_pure_noise():
    for table in (
        deis(FLOW, grids.uniform(FLOW, 6)),
        dpmpp(FLOW, grids.logsnr(FLOW, 6)),
        ddim(FLOW, grids.uniform(FLOW, 6), eta=1.0),
    ):
        sums = table.unrolled(form="x0").d.sum(axis=1)
        np.testing.assert_allclose(sums, np.append(table.alpha[:, 0], 1.0), atol=1e-12)
    with pytest.raises(ValueError, match="form must be 'stored' or 'x0'"):
        table.unrolled(form="eps")


def test_a_lane_is_a_table():
    times = np.stack([grids.quadratic(VP, 5), grids.logsnr(VP, 5)])
    table = deis(VP, times)
    for k in (0, 1):
        alone = deis(VP, times[k])
        assert table.lane(k).lanes == 1
        for name in ARRAYS:
            np.testing.assert_allclose(
                getattr(table.lane(k), name), getattr(alone, name), rtol=1e-13, atol=1e-15
            )
    for bad in (-1, 2):
        with pytest.raises(ValueError, match="lane must lie in 0 .. 1"):
            table.lane(bad)


# --- how a table is written ------------------------------------------------------------------------


def test_stale_values_are_a_clear_error():
    p = Program(VP, [1.0, 0.5, 0.1, 0.0])
    x = p.start()
    first = p.call(x, at=0)
    later = x * 1.0  # the register's value at row 1
    x = x + 0.5 * first
    second = p.call(x, at=1)
    with pytest.raises(
        RuntimeError, match="row 2 needs a value that was in register x at row 1: pass it on as base="
    ):
        p.table(x + later + second)


def test_noise_of_an_earlier_row_is_a_clear_error():
    p = Program(VP, [1.0, 0.5, 0.0])
    x = p.start()
    z = p.noise()
    first = p.call(x + z, at=0, base=x)
    with pytest.raises(RuntimeError, match="register z at row 0"):
        p.table(x + first + z)


def test_a_row_has_one_normal():
    p = Program(VP, [1.0, 0.5, 0.0])
    x = p.start()
    p.call(x, at=0)
    p.noise()
    with pytest.raises(RuntimeError, match="a row has one normal"):
        p.noise()


def test_a_program_without_a_call_is_no_table():
    p = Program(VP, [1.0, 0.0])
    with pytest.raises(ValueError, match="at least one row"):
        p.table(p.start())


@pytest.mark.parametrize("arguments", [{}, {"at": 0, "t": 0.5}])
def test_a_call_is_at_a_grid_point_or_a_time(arguments):
    p = Program(VP, [1.0, 0.0])
    with pytest.raises(ValueError, match="either at= .* or t="):
        p.call(p.start(), **arguments)


def test_slots_are_as_few_as_are_alive():
    assert [deis(VP, grids.quadratic(VP, 10), order=k).slots for k in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert [deis(VP, grids.quadratic(VP, 2), order=k).slots for k in (1, 2, 3, 4)] == [1, 2, 2, 2]
    # F-PNDM's pattern: three Runge-Kutta steps of four stages that keep one output each, then four nodes
    p = Program(VP, grids.quadratic(VP, 8))
    x, kept = p.start(), []
    for i in range(3):
        stages = []
        for _ in range(4):
            stages.append(p.call(x if not stages else x + 0.1 * stages[-1], at=i, base=x))
        x = x + sum(stages[1:], 0.1 * stages[0])
        kept.append(stages[0])
    for i in range(3, 8):
        kept.append(p.call(x, at=i))
        x = x + 0.1 * kept[-1] + 0.1 * kept[-2] + 0.1 * kept[-3] + 0.1 * kept[-4]
    assert p.table(x).slots == 2 + 4


TIMES = {
    "rising": ([0.1, 0.5, 1.0], "times must fall strictly, from noise to data: step 0 goes from 0.1 to 0.5"),
    "repeated": ([1.0, 0.5, 0.5, 0.0], "step 1 goes from 0.5 to 0.5"),
    "in a lane": ([[1.0, 0.5, 0.0], [1.0, 0.2, 0.3]], "step 1 goes from 0.2 to 0.3"),
    "outside": ([1.5, 0.5, 0.0], r"must lie in \[0, 1\] on vp_linear, got 0 .. 1.5"),
    "negative": ([1.0, 0.5, -0.5], r"must lie in \[0, 1\]"),
    "a pipeline's": ([999, 500, 0], r"must lie in \[0, 1\] on vp_linear, got 0 .. 999"),
    "nan": ([1.0, float("nan"), 0.0], "times must be finite"),
    "one": ([1.0], "at least one step"),
    "none": ([], "at least one step"),
    "number": (1.0, "at least one step"),
    "cube": (np.zeros((2, 2, 2)), r"got \(2, 2, 2\)"),
    "words": (["a", "b"], "times must be real numbers"),
    "ragged": ([[1.0, 0.0], [1.0]], "times must be real numbers"),
    "complex": ([1.0 + 0j, 0.0], "times must be real numbers"),
    "bools": ([True, False], "times must be real numbers"),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_that_are_refused(name):
    times, words = TIMES[name]
    with pytest.raises(ValueError, match=words):
        ddim(VP, times)


def test_times_that_are_taken():
    expected = ddim(VP, np.array([1.0, 0.5, 0.0]))
    for times in (
        [1, 0.5, 0],
        torch.tensor([1.0, 0.5, 0.0]),
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64),
        (1.0, 0.5, 0.0),
    ):
        assert same(ddim(VP, times), expected)
    assert ddim(paths.edm(), [80, 10, 0]).t[:, 0].tolist() == [
        80.0,
        10.0,
    ]  # whole numbers are times like others
    assert ddim(VP, np.linspace(1, 0, 11)[:, None].T).lanes == 1
    with pytest.raises(TypeError, match="path must be a fewstep path"):
        Program("vp", [1.0, 0.0])
