"""Kernels before their first launch: Triton is imported by nobody, and missing in words."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fewstep.kernels import cases, lang

SOURCE = """
import sys
from fewstep.kernels import cases
found = cases.ops()
assert "philox" in found and not {"triton", "diffusers"} & set(sys.modules), found
from fewstep.kernels.philox import normals_kernel
assert type(normals_kernel).__name__ == "Kernel", normals_kernel
"""


def test_no_op_imports_triton():
    done = subprocess.run([sys.executable, "-c", SOURCE], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


def test_a_kernel_is_no_function():
    kernel = lang.jit(lambda x: x)
    with pytest.raises(TypeError, match="is a kernel: launch it as"):
        kernel(1)
    with pytest.raises(AttributeError, match="tl.zeros exists only inside a kernel"):
        _ = lang._Tl().zeros


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    kernel = lang.jit(lambda x: x)
    with pytest.raises(ImportError, match="kernels need Triton .*: pip install triton"):
        kernel[(1,)](torch.zeros(1))


def test_blocks():
    assert [lang.next_power_of_2(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert [lang.ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("name", cases.ops())
def test_cases_are_the_same_everywhere(name):
    module = cases.ops()[name]
    assert len({case.name for case in module.CASES}) == len(module.CASES)
    for case in module.CASES:
        shapes = [tuple(t.shape) for t in cases.tensors(case.make("meta"))]
        if not case.real:
            assert shapes == [tuple(t.shape) for t in cases.tensors(case.make("cpu"))]
