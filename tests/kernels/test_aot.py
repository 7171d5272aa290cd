"""Every real case of every op, compiled for GPUs that are not here: no spills, no float64, wide loads, few registers.

    python -m fewstep.kernels.aot --registers tests/kernels      # keeps the registers of today as the ceilings

The fast lane compiles the first real case of each op for an H100, the slow one all of them for all targets.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.kernels import aot, cases, lang

pytestmark = pytest.mark.skipif(not lang.available(), reason="Triton is not installed")

HERE = Path(__file__).parent
FAULTY = str(HERE / "faulty_kernels.py")
FIRST = {name: next(c.name for c in m.CASES if c.real) for name, m in cases.ops().items()}
ALL = [
    pytest.param(name, case, target, id=f"{name}-{case.name}-{target}", marks=marks)
    for name, case, target in aot.jobs()
    for marks in [[] if target == "sm_90" and case.name == FIRST[name] else [pytest.mark.slow]]
]
WAIVED = [
    pytest.param(name, case, target, id=f"{name}-{case.name}-{target}")
    for name, module in cases.ops().items()
    for case in module.CASES
    for target in case.waived
    if target in aot.TARGETS
]


@pytest.fixture(scope="module")
def compiler():
    with aot.Compiler() as compiler:
        yield compiler


@pytest.mark.parametrize(("name", "case", "target"), ALL)
def test_sound_on_every_target(name, case, target, compiler):
    readings = compiler.compile(name, case.name, target)
    assert readings, "launch compiled no kernel"
    found = [(check, fault) for r in readings for check, fault in r.faults(target).items()]
    assert [fault for check, fault in found if check not in case.waived] == []
    path = HERE / f"registers-{aot.version()}.json"
    if path.exists():
        ceilings = json.loads(path.read_text()).get(name, {}).get(case.name, {}).get(target)
        assert ceilings is not None, f"{path.name} lacks this case: see the top of {Path(__file__).name}"
        used = aot.registers(readings)
        assert {k: v for k, v in used.items() if v > ceilings.get(k, 0)} == {}, f"ceilings are {ceilings}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case", "target"), WAIVED)
def test_a_waived_target_is_rightly_waived(name, case, target, compiler):
    try:
        readings = compiler.compile(name, case.name, target)
    except aot.CompileError:
        return
    assert any(r.faults(target) for r in readings), f"{target} holds this case: waive it no more"


def test_waivers_name_a_check_or_a_target():
    known = {"spills", "shared", "fp64", "wide", *aot.TARGETS}
    for name, module in cases.ops().items():
        for case in module.CASES:
            assert set(case.waived) <= known and all(case.waived.values()), (name, case.name)
        assert any(case.real for case in module.CASES), name


@pytest.mark.parametrize("fault", ["spills", "fp64", "shared", "wide"])
def test_a_fault_is_found(fault, compiler):
    (reading,) = compiler.compile(FAULTY, fault, "sm_90")
    assert list(reading.faults("sm_90")) == [fault], reading


def test_what_does_not_compile_is_said(compiler):
    with pytest.raises(
        aot.CompileError, match="faulty_kernels.py, broken, sm_90: CompilationError(?s:.*)power of 2"
    ):
        compiler.compile(FAULTY, "broken", "sm_90")
    with pytest.raises(ValueError, match="target must be one of sm_80, .*, got 'sm_70'"):
        compiler.compile(FAULTY, "broken", "sm_70")


def test_a_compile_that_takes_too_long_is_ended(compiler):
    compiler.compile(FAULTY, "wide", "sm_90")
    child = compiler._child.pid
    compiler.limit, limit = 0.5, compiler.limit
    with pytest.raises(aot.CompileError, match="endless, sm_90: no result within 0.5 s"):
        compiler.compile(FAULTY, "endless", "sm_90")
    compiler.limit = limit
    assert not Path(f"/proc/{child}").exists()
    assert compiler.compile(FAULTY, "wide", "sm_90")  # by another child
    assert compiler._child.pid != child
