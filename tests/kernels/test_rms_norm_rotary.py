"""RMSNorm and rotary embedding where no kernel runs: against torch, complex numbers, diffusers; errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fewstep.kernels import cases
from fewstep.kernels import rms_norm_rotary as rotary

rms_norm_rotary = rotary.rms_norm_rotary
SMALL = [c for c in rotary.CASES if not c.real and c.name != "half"]


def double(case):
    arguments = cases.exact(case.make("cpu"))
    leaves = {
        k: arguments[k].requires_grad_()
        for k in ("x", "weight", "before", "before_weight")
        if arguments[k] is not None
    }
    return arguments, leaves


def test_the_norm_is_torchs():
    a, _ = double(SMALL[0])
    expected = functional.rms_norm(a["x"], (16,), a["weight"], 1e-6)
    assert cases.error(rms_norm_rotary(**a), expected) < 1e-14


@pytest.mark.parametrize("layout", rotary.LAYOUTS)
def test_the_rotation_is_that_of_complex_numbers(layout):
    a, _ = double(next(c for c in SMALL if c.name == layout))
    n = functional.rms_norm(a["x"], (24,), a["weight"], 1e-6)
    order = torch.arange(24).reshape(12, 2) if layout == "interleaved" else torch.arange(24).reshape(2, 12).T
    first = order[:, 0]
    turn = torch.complex(a["cos"][:, first], a["sin"][:, first])[:, None]
    product = torch.view_as_complex(n[..., order].contiguous()) * turn
    found = rms_norm_rotary(**a)[..., order]
    assert cases.error(found, torch.view_as_real(product)) < 1e-14


@pytest.mark.parametrize(("layout", "dim"), [("interleaved", -1), ("halves", -2)])
def test_the_rotation_is_diffusers(layout, dim):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    arguments = next(c for c in rotary.CASES if c.name == layout).make("cpu")
    n = functional.rms_norm(arguments["x"], (24,), arguments["weight"], 1e-6)
    turns = (arguments["cos"], arguments["sin"])
    expected = embeddings.apply_rotary_emb(n, turns, use_real_unbind_dim=dim, sequence_dim=1)
    assert cases.error(rms_norm_rotary(**arguments), expected) < 3e-7


def test_some_tokens_and_two_weights():
    a, _ = double(next(c for c in SMALL if c.name == "some tokens, halves, before"))
    parts = [
        rms_norm_rotary(a["before"], a["before_weight"]),
        rms_norm_rotary(a["x"], a["weight"]),
    ]
    plain, found = torch.cat(parts, 1), rms_norm_rotary(**a)
    some = slice(2, 7)
    assert torch.equal(found[:, :2], plain[:, :2]) and torch.equal(found[:, 7:], plain[:, 7:])
    turned = plain[:, some] * a["cos"][:, None] + rotary.turned(plain[:, some], "halves") * a["sin"][:, None]
    assert torch.equal(found[:, some], turned)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_gradients_formulas(case):
    a, leaves = double(case)
    y = rotary.reference(**a)
    dy = cases.randn(*y.shape, seed=9).double()
    expected = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    ahead = 0 if a["before"] is None else a["before"].shape[1]
    for name, at, start in (
        ("x", slice(ahead, None), a["start"] - ahead),
        ("before", slice(0, ahead), a["start"]),
    ):
        if a[name] is None:
            continue
        gain = "weight" if name == "x" else "before_weight"
        more = (a["cos"], a["sin"], a["layout"], start, a["eps"])
        dx, dweight = rotary.reference_backward(dy[:, at], a[name], a[gain], *more, True)
        assert cases.error(dx, expected[name]) < 1e-13
        assert (cases.error(dweight, expected[gain]) < 1e-13) if gain in leaves else not dweight.numel()


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_rival_computes_the_same(case):
    """What benchmarks time beside it."""
    a = case.make("cpu")
    assert cases.error(rotary.unfused(**a), rotary.reference(**a)) <= 2e-6


def test_gradcheck():
    make = rotary._case(1, 3, 2, 4, turns=4, start=1, ahead=2)
    a, leaves = double(SMALL[0]._replace(make=make))
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda *v: rms_norm_rotary(**a | dict(zip(names, v, strict=True))), list(leaves.values())
    )


@pytest.mark.parametrize("name", ["norm", "no weight", "before", "halves", "empty", "half"])
def test_opcheck(name):
    arguments = next(c for c in rotary.CASES if c.name == name).make("cpu")
    for k in ("x", "weight", "before", "before_weight"):
        arguments[k] = None if arguments[k] is None else arguments[k].requires_grad_()
    torch.library.opcheck(rotary.op, tuple(arguments.values()))


def test_tables_that_want_gradients_get_them():
    """The kernel has none for them, so that it is not taken."""
    a, _ = double(next(c for c in SMALL if c.name == "interleaved"))
    cos = a["cos"].requires_grad_()
    rms_norm_rotary(**a).sum().backward()
    assert cos.grad is not None
    with pytest.raises(ValueError, match="cos or sin want a gradient"):
        rms_norm_rotary(**a | {"impl": "triton"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(4, 2, 8)), r"x must be floating point \(B, L, H, D\)"),
        (dict(layout="pairs"), "layout must be one of interleaved, halves, got 'pairs'"),
        (dict(sin=None), "cos and sin must both be given or neither"),
        (dict(cos=torch.zeros(3, 4)), r"cos and sin must both be \(tokens, 8\), got \(3, 4\) and \(3, 8\)"),
        (dict(start=2), "cos has tokens 2 to 5, and there are 4"),
        (dict(weight=torch.ones(4)), r"weight must be \(8,\), got \(4,\)"),
        (dict(before_weight=torch.ones(8)), "before_weight is given without before"),
        (dict(before=torch.zeros(1, 4, 3, 8)), r"before must be \(1, tokens, 2, 8\), got \(1, 4, 3, 8\)"),
        (dict(before=torch.zeros(1, 4, 2, 8).half()), "before must have x's dtype"),
        (dict(impl="triton"), "impl='triton' is asked for, but rms_norm_rotary cannot run there"),
    ],
)
def test_errors(change, message):
    arguments = dict(x=torch.zeros(1, 4, 2, 8), cos=torch.ones(3, 8), sin=torch.zeros(3, 8))
    with pytest.raises(ValueError, match=message):
        rms_norm_rotary(**arguments | change)
    with pytest.raises(ValueError, match="even number of channels a head, got 7"):
        rms_norm_rotary(torch.zeros(1, 4, 2, 7), cos=torch.ones(3, 7), sin=torch.ones(3, 7))
