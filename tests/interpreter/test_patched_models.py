"""Patched models by the interpreter: float32 kernels against the plain model in float64, with all gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fewstep.kernels import dispatch, gate_residual, group_norm_silu, layer_norm_modulate, rms_norm_rotary
from fewstep.models import patch

OPS = (layer_norm_modulate, gate_residual, rms_norm_rotary, group_norm_silu)


def _load():
    file = Path(__file__).parents[1] / "models" / "patchable.py"
    spec = importlib.util.spec_from_file_location("patchable", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _load()
TAKEN = (zoo.our_dit, zoo.our_modulated_unet, zoo.flux, zoo.sd35, zoo.conditional_unet)


@pytest.mark.parametrize("factory", TAKEN, ids=lambda f: f.__name__)
def test_kernels_in_a_model(factory, monkeypatch):
    if factory in zoo.THEIRS:
        pytest.importorskip("diffusers")
    net, call = zoo.made(factory)
    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "float", torch.Tensor.double)  # diffusers casts to float32 here and there
        expected = zoo.gradients(net, call)
    net, call = zoo.made(factory, torch.float32)
    plain = zoo.apart(zoo.gradients(net, call), expected)
    with patch(net), monkeypatch.context() as m:
        for op in OPS:  # whoever answers now, it is not a reference
            m.setattr(op, "reference", None)
            m.setattr(op, "reference_backward", None)
        found = zoo.apart(zoo.gradients(net, call), expected)
    # as near to float64 as torch's own float32, up to what one rounding more or less may do
    assert found[0] <= max(2 * plain[0], 1e-6) and found[1] <= max(2 * plain[1], 1e-6)
    assert found[0] < 1e-4 and found[1] < 1e-4


def test_references_on_request(monkeypatch):
    net, call = zoo.made(zoo.our_dit, torch.float32)
    expected = call(net)
    for op in OPS:
        monkeypatch.setattr(op, "launch", None)
    with patch(net), dispatch.using("reference"):
        assert torch.allclose(call(net), expected, atol=1e-5)


def test_a_patched_model_compiles_as_one_graph(monkeypatch):
    """Its kernels are opaque ops in it, with their gradients."""
    net, call = zoo.made(zoo.our_dit, torch.float32)
    with patch(net):
        expected = zoo.gradients(net, call)
        fast = torch.compile(net, backend="aot_eager", fullgraph=True)
        ran, launch = [], gate_residual.launch
        monkeypatch.setattr(gate_residual, "launch", lambda *a: ran.append(1) or launch(*a))
        y = call(fast)
        found = y.detach(), torch.autograd.grad(y.sin().sum(), list(net.parameters()), allow_unused=True)
        assert ran and max(zoo.apart(found, expected)) < 1e-5
