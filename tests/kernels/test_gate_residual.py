"""Gate and residual where no kernel runs: its mathematics in float64, registration, shapes and errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fewstep.kernels import cases
from fewstep.kernels import gate_residual as gates

gate_residual, gate_residual_norm = gates.gate_residual, gates.gate_residual_norm
SMALL = [c for c in gates.CASES if not c.real and c.name != "half"]
TENSORS = ("x", "h", "gate", "scale", "shift", "weight", "bias")


def double(case):
    arguments = cases.exact(case.make("cpu"))
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    return arguments, leaves


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_formula(case):
    a, _ = double(case)
    r = a["x"] + (a["h"] if a["gate"] is None else a["gate"] * a["h"])
    y = torch.zeros(0)
    if a["norm"] != "none":
        y = functional.layer_norm(r, r.shape[-1:], a["weight"], a["bias"], a["eps"])
        y = y if a["scale"] is None else y * (1 + a["scale"]) + a["shift"]
    assert cases.error(gates.reference(**a), (r, y)) < 1e-14


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_gradients_formulas(case):
    """Those that the kernel computes, against autograd through the reference."""
    a, leaves = double(case)
    outs = [t for t in gates.reference(**a) if t.numel() or case.name == "empty"]
    seeds = [cases.randn(*t.shape, seed=k).double() for k, t in enumerate(outs, 7)]
    expected = dict(zip(leaves, torch.autograd.grad(outs, list(leaves.values()), seeds), strict=True))
    dr, dy = (*seeds, torch.zeros(0, dtype=torch.float64))[:2]
    more = (a[k] for k in ("h", "gate", "norm", "scale", "weight", "bias", "eps"))
    found = gates.reference_backward(dr, dy, outs[0], *more, [True] * 3)
    for name, gradient in zip(TENSORS, found, strict=True):
        of_x = name == "h" and a["gate"] is None  # the same tensor
        one_a_token = name == "shift" and a["scale"] is not None and a["scale"].shape[1] > 1
        if name in leaves and not of_x and not one_a_token:
            assert cases.error(gradient, expected[name]) < 1e-13, name
        else:
            assert not gradient.numel()
    if a["gate"] is None:
        assert torch.equal(expected["x"], expected["h"])


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_rival_computes_the_same(case):
    """What benchmarks time beside it."""
    a = case.make("cpu")
    assert cases.error(gates.unfused(**a), gates.reference(**a)) <= 2e-6


def test_gradcheck():
    make = gates._case(2, 3, 5, norm="layer_norm", modulated=1, affined=True)
    a, leaves = double(SMALL[0]._replace(make=make))
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda *v: gate_residual_norm(**dict(zip(names, v, strict=True)), eps=a["eps"]), list(leaves.values())
    )


@pytest.mark.parametrize("name", ["gate", "sum", "gates, norm, per token", "all", "empty", "half"])
def test_opcheck(name):
    arguments = next(c for c in gates.CASES if c.name == name).make("cpu")
    leaves = [v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments.values()]
    torch.library.opcheck(gates.op, tuple(leaves))


def test_the_op_is_its_two_halves():
    x, h = (cases.randn(2, 3, 4, 8, seed=k) for k in (0, 1))
    gate, scale, shift = (cases.randn(2, 8, seed=k) for k in (2, 3, 4))
    r, y = gate_residual_norm(x, h, gate, scale, shift)
    assert r.shape == y.shape == x.shape
    assert torch.equal(r, gate_residual(x, h, gate[:, None, None]))
    assert torch.equal(y, gates.norms.layer_norm_modulate(r, scale, shift))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(h=torch.zeros(2, 3, 8)), r"h must have x's shape \(2, 4, 8\), got \(2, 3, 8\)"),
        (
            dict(gate=torch.zeros(2, 3, 8)),
            r"gate must be \(2, 8\), \(2, 1, 8\) or \(2, 4, 8\), got \(2, 3, 8\)",
        ),
        (dict(scale=torch.zeros(2, 8)), "scale and shift must both be given or neither"),
        (dict(bias=torch.zeros(8)), "bias must come with a weight"),
        (dict(impl="triton"), "impl='triton' is asked for, but gate_residual cannot run there"),
    ],
)
def test_errors(change, message):
    arguments = dict(x=torch.zeros(2, 4, 8), h=torch.zeros(2, 4, 8), gate=torch.zeros(2, 8))
    with pytest.raises(ValueError, match=message):
        gate_residual_norm(**arguments | change)
