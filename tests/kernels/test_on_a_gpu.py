"""Every kernel where it belongs: on a GPU, against the reference in float64, and by default."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases, dispatch, lang, philox
from fewstep.samplers.noise import normal

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and lang.available()), reason="needs a GPU and Triton"
)
SMALL = [
    pytest.param(module, case, id=f"{name}-{case.name}")
    for name, module in cases.ops().items()
    for case in module.CASES
    if not case.real
]


@pytest.mark.parametrize(("module", "case"), SMALL)
def test_the_references_answer(module, case):
    arguments = case.make("cuda")
    expected = module.reference(**cases.exact(arguments))
    assert cases.error(module.launch(**arguments), expected) <= case.tolerance


def test_triton_is_the_default_on_a_gpu(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.why("cuda")[0] == "triton"
    monkeypatch.setattr(philox, "reference", None)
    assert normal(0, torch.arange(3, device="cuda"), (5,)).shape == (3, 5)


def test_noise_is_the_cpus(monkeypatch):
    ids = torch.arange(64)
    here = normal(7, ids.cuda(), (4, 64, 64), row=3)
    assert float((here.cpu() - normal(7, ids, (4, 64, 64), row=3)).abs().max()) <= 3e-6
    monkeypatch.setattr(philox, "BLOCK", 64)
    assert torch.equal(here, normal(7, ids.cuda(), (4, 64, 64), row=3))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    ids = torch.arange(3, device="cuda:1")
    assert torch.equal(normal(0, ids, (5,)).cpu(), normal(0, ids.to("cuda:0"), (5,)).cpu())
