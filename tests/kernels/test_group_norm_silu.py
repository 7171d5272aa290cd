"""GroupNorm and SiLU where no kernel runs: its mathematics in float64, registration, memory formats and errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fewstep.kernels import cases
from fewstep.kernels import group_norm_silu as groups

group_norm_silu = groups.group_norm_silu
SMALL = [c for c in groups.CASES if not c.real and c.name != "half"]


def double(case):
    arguments = cases.exact(case.make("cpu"))
    leaves = {k: v.requires_grad_() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    return arguments, leaves


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_formula(case):
    a, _ = double(case)
    wide = [1] * (a["x"].ndim - 2)
    x = a["x"] if a["add"] is None else a["x"] + a["add"].reshape(*a["add"].shape, *wide)
    parts = x.flatten(2).unflatten(1, (a["groups"], -1))
    centred = parts - parts.mean((2, 3), keepdim=True)
    y = centred / torch.sqrt(centred.square().mean((2, 3), keepdim=True) + a["eps"])
    y = y.reshape(x.shape)
    if a["weight"] is not None:
        weight, bias = (a[k].reshape(-1, x.shape[1], *wide) for k in ("weight", "bias"))
        y = y * weight + bias
    y = y * torch.sigmoid(y) if a["activation"] == "silu" else y
    found = groups.reference(**a)[0]
    assert cases.error(found, y) < 1e-13 and found.stride() == a["x"].stride()


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_gradients_formulas(case):
    a, leaves = double(case)
    y, mean, rstd = groups.reference(**a)
    dy = cases.randn(*y.shape, seed=9).double()
    expected = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    more = (a[k] for k in ("weight", "bias", "add", "activation"))
    found = groups.reference_backward(dy, a["x"], mean, rstd, *more)
    for name, gradient in zip(("x", "weight", "bias"), found, strict=True):
        assert (cases.error(gradient, expected[name]) < 1e-12) if name in leaves else not gradient.numel()
    if a["add"] is not None:
        assert cases.error(found[0].flatten(2).sum(2), expected["add"]) < 1e-12


def test_a_modulated_norm_in_a_residual_block():
    """As diffusers writes it, with its gradients."""
    x, norm = cases.randn(2, 8, 3, 5).double().requires_grad_(), torch.nn.GroupNorm(2, 8).double()
    with torch.no_grad():
        norm.weight.copy_(cases.randn(8, seed=1))
        norm.bias.copy_(cases.randn(8, seed=2))
    scale, shift, add = (cases.randn(2, 8, seed=k).double().requires_grad_() for k in (3, 4, 5))
    leaves = [x, norm.weight, norm.bias, scale, shift, add]

    def wide(v):
        return v[:, :, None, None]

    y = functional.silu(norm(x + wide(add)) * (1 + wide(scale)) + wide(shift))
    found = group_norm_silu(x, 2, norm.weight, norm.bias, scale, shift, add)
    assert cases.error(found, y) < 1e-14
    dy = cases.randn(*y.shape, seed=6).double()
    one, other = (torch.autograd.grad(v, leaves, dy) for v in (found, y))
    assert cases.error(one, other) < 1e-13


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_rival_computes_the_same(case):
    """What benchmarks time beside it."""
    a = case.make("cpu")
    assert cases.error(groups.unfused(**a), groups.reference(**a)) <= 2e-6


def test_gradcheck():
    a, leaves = double(SMALL[0]._replace(make=groups._case(2, 4, 3, groups=2, added=True)))
    names, rest = list(leaves), {k: a[k] for k in ("groups", "eps", "activation")}
    assert torch.autograd.gradcheck(
        lambda *v: group_norm_silu(**dict(zip(names, v, strict=True)), **rest), list(leaves.values())
    )


@pytest.mark.parametrize(
    "name",
    ["whole, channels last", "whole, added, weights of each", "no weights, no activation", "empty", "half"],
)
def test_opcheck(name):
    arguments = next(c for c in groups.CASES if c.name == name).make("cpu")
    leaves = [v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in arguments.values()]
    torch.library.opcheck(groups.op, tuple(leaves))


def test_tokens_transposed_are_channels_last():
    """What attention blocks norm: (B, L, C) turned to (B, C, L) is not copied."""
    x = cases.randn(2, 12, 8).transpose(1, 2)
    assert groups.dense(x) is x and group_norm_silu(x, 4).stride() == x.stride()
    strided = cases.randn(2, 8, 24)[:, :, ::2]
    assert groups.dense(strided).is_contiguous() and group_norm_silu(strided, 4).is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 8)), r"x must be floating point \(N, C, ...\), got torch.float32 \(2, 8\)"),
        (dict(groups=3), "groups must divide the 8 channels, got 3"),
        (dict(activation="gelu"), "activation must be one of silu, none, got 'gelu'"),
        (dict(bias=None), "weight and bias must both be given or neither"),
        (dict(shift=torch.zeros(2, 8)), "scale and shift must both be given or neither"),
        (dict(add=torch.zeros(8)), r"add must be \(2, 8\), got \(8,\)"),
        (dict(impl="triton"), "impl='triton' is asked for, but group_norm_silu cannot run there"),
    ],
)
def test_errors(change, message):
    arguments = dict(x=torch.zeros(2, 8, 3, 3), groups=4, weight=torch.ones(8), bias=torch.zeros(8))
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments | change)
