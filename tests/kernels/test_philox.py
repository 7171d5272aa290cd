"""The noise op where no kernel runs: registration, dispatch and its errors."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import dispatch, philox
from fewstep.samplers.noise import normal

CASE = philox.CASES[1]


@pytest.mark.parametrize("case", [c for c in philox.CASES if not c.real], ids=lambda c: c.name)
def test_opcheck(case):
    torch.library.opcheck(philox.op, tuple(case.make("cpu").values()))


def test_compiled_as_one_graph():
    def draw(ids):
        return normal(7, ids, (12,), row=2) * 2

    ids = torch.arange(5)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), draw(ids))


def test_no_kernel_on_a_cpu():
    with pytest.raises(
        ValueError, match="impl='triton' is asked for, but philox cannot run there: tensors are on"
    ):
        normal(0, torch.arange(2), (4,), impl="triton")
    with pytest.raises(ValueError, match="impl must be one of triton, reference, got 'cuda'"):
        normal(0, torch.arange(2), (4,), impl="cuda")


def test_who_decides(monkeypatch):
    tensors, taken = [torch.zeros(1)], "it is odd"
    with dispatch.using("reference"):
        assert dispatch.choose("op", None, tensors) == "reference"
        with pytest.raises(
            ValueError, match="impl='triton' is asked for, but op cannot run there: it is odd"
        ):
            dispatch.choose("op", "triton", tensors, taken)
    with dispatch.using("triton"), pytest.raises(ValueError, match="using\\('triton'\\) is asked for"):
        dispatch.choose("op", None, tensors)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(ValueError, match="FEWSTEP_KERNELS=triton is asked for"):
        dispatch.choose("op", None, tensors)
    with dispatch.using("reference"):
        assert dispatch.choose("op", None, tensors) == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="FEWSTEP_KERNELS must be one of triton, reference, got 'cuda'"):
        dispatch.choose("op", None, tensors)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.why() == ("reference", "FEWSTEP_KERNELS=reference")


def test_a_gpu_would_take_it(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "available", lambda: True)
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda")})()
    assert dispatch.choose("op", None, [on_gpu]) == "triton"
    assert dispatch.choose("op", None, [on_gpu], "it is odd") == "reference"
    monkeypatch.setattr(dispatch, "available", lambda: False)
    assert dispatch.choose("op", None, [on_gpu]) == "reference"
    with pytest.raises(ValueError, match="Triton is not installed"):
        dispatch.choose("op", "triton", [on_gpu])
