"""LayerNorm with modulation where no kernel runs: its mathematics in float64, registration, shapes and errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fewstep.kernels import cases
from fewstep.kernels import layer_norm_modulate as norms
from fewstep.kernels.layer_norm_modulate import layer_norm_modulate

SMALL = [c for c in norms.CASES if not c.real and c.name != "half"]
TENSORS = ("x", "scale", "shift", "weight", "bias")


def double(case, **kwargs):
    arguments = cases.exact(case.make("cpu"))
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    return arguments, leaves


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_formula(case):
    a, _ = double(case)
    x, eps = a["x"], a["eps"]
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    if a["weight"] is not None:
        y = y * a["weight"] + a["bias"]
    if a["scale"] is not None:
        y = y * (1 + a["scale"]) + a["shift"]
    assert cases.error(layer_norm_modulate(**a), y) < 1e-14


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_gradients_formulas(case):
    """Those that the kernel computes, against autograd through torch's own norm."""
    a, leaves = double(case)
    y = norms.reference(**a)
    dy = cases.randn(*y.shape, seed=9).double()
    expected = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    found = norms.reference_backward(dy, a["x"], a["scale"], a["weight"], a["bias"], a["eps"], [True, True])
    for name, gradient in zip(TENSORS, found, strict=True):
        one_a_token = name == "shift" and a["scale"] is not None and a["scale"].shape[1] > 1
        if name in leaves and not one_a_token:
            assert cases.error(gradient, expected[name]) < 1e-13, name
        else:
            assert not gradient.numel()


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_rival_computes_the_same(case):
    """What benchmarks time beside it."""
    a = case.make("cpu")
    assert cases.error(norms.unfused(**a), norms.reference(**a)) <= 2e-6


def test_gradcheck():
    a, leaves = double(
        SMALL[0]._replace(make=norms._case(2, 3, 5, affined=True)),
    )
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda *v: layer_norm_modulate(**dict(zip(names, v, strict=True)), eps=a["eps"]),
        list(leaves.values()),
    )


@pytest.mark.parametrize("name", ["plain", "per token", "affine, per sample", "empty", "half"])
def test_opcheck(name):
    arguments = next(c for c in norms.CASES if c.name == name).make("cpu")
    leaves = [v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments.values()]
    torch.library.opcheck(norms.op, tuple(leaves))


def test_shapes_of_modulations():
    x = cases.randn(2, 3, 4, 8).double()
    each = cases.randn(2, 8, seed=1).double()
    expected = functional.layer_norm(x, (8,), eps=1e-6) * (1 + each[:, None, None]) + 1
    for shape in ((2, 8), (2, 1, 8), (2, 1, 1, 8)):
        scale = each.reshape(shape)
        assert torch.allclose(layer_norm_modulate(x, scale, torch.ones_like(scale)), expected, atol=1e-14)
    whole = each[:, None, None].expand(x.shape)
    assert torch.allclose(layer_norm_modulate(x, whole, torch.ones_like(whole)), expected, atol=1e-14)
    one = each[:1].requires_grad_()  # a batch of one serves all, and gets all their gradients
    layer_norm_modulate(x, one, torch.zeros_like(one)).sum().backward()
    assert torch.allclose(one.grad[0], functional.layer_norm(x, (8,), eps=1e-6).sum((0, 1, 2)), atol=1e-12)


def test_dtypes_as_torch_promotes_them():
    x, scale = torch.zeros(1, 2, 8, dtype=torch.bfloat16), torch.zeros(1, 8)
    assert layer_norm_modulate(x, scale, scale).dtype == torch.float32
    assert layer_norm_modulate(x, scale.bfloat16(), scale.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shift=None), "scale and shift must both be given or neither"),
        (dict(scale=torch.zeros(3, 8)), r"scale must be \(2, 8\), \(2, 1, 8\) or \(2, 4, 8\), got \(3, 8\)"),
        (dict(shift=torch.zeros(2, 4, 8)), "scale and shift must be alike"),
        (dict(weight=torch.ones(7)), r"weight must be \(8,\), got \(7,\)"),
        (dict(bias=torch.ones(8)), "bias must come with a weight"),
        (dict(x=torch.zeros(8)), r"x must be floating point \(B, ..., C\), got torch.float32 \(8,\)"),
        (dict(x=torch.zeros(2, 4, 8, dtype=torch.int64)), "x must be floating point"),
        (
            dict(impl="triton"),
            "impl='triton' is asked for, but layer_norm_modulate cannot run there: tensors",
        ),
        (dict(impl="triton", x=torch.zeros(2, 4, 8).double()), "a tensor is float64, kernels take float32"),
        (dict(impl="cuda"), "impl must be one of triton, reference, got 'cuda'"),
    ],
)
def test_errors(change, message):
    arguments = dict(x=torch.zeros(2, 4, 8), scale=torch.zeros(2, 8), shift=torch.zeros(2, 8))
    with pytest.raises(ValueError, match=message):
        layer_norm_modulate(**arguments | change)
