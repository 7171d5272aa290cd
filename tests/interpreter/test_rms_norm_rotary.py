"""RMSNorm with rotary embedding by the interpreter: the reference in float64, both ways, and that kernels ran."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases
from fewstep.kernels import rms_norm_rotary as rotary

SMALL = [c for c in rotary.CASES if not c.real]
LEAVES = ("x", "weight", "before", "before_weight")


def gradients(run, arguments):
    leaves = [arguments[k].requires_grad_() for k in LEAVES if arguments[k] is not None]
    y = run(**arguments)
    return y.detach(), torch.autograd.grad(y, leaves, cases.randn(*y.shape, seed=9).to(y.dtype))


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_reference_in_float64(case, monkeypatch):
    expected = gradients(rotary.reference, cases.exact(case.make("cpu")))
    for name in ("reference", "reference_backward"):  # whoever answers now, it is not the reference
        monkeypatch.setattr(rotary, name, None)
    found = gradients(rotary.rms_norm_rotary, case.make("cpu"))
    assert cases.error(found[0], expected[0]) <= case.tolerance
    assert cases.error(found[1], expected[1]) <= case.tolerance


def test_bfloat16_within_a_unit():
    a = rotary._case(2, 5, 3, 24, turns=7, ahead=2, dtype=torch.bfloat16)("cpu")
    expected = gradients(rotary.reference, cases.exact(a))
    y, found = gradients(rotary.rms_norm_rotary, a)
    # one unit in the last place of bfloat16; the interpreter truncates instead of rounding
    assert cases.error(y, expected[0]) <= 2**-7 and cases.error(found, expected[1]) <= 2**-7


def test_heads_before_tokens_and_packed_projections():
    """SD3's (B, H, L, D) seen as (B, L, H, D), and a third of a fused projection: the same bits."""
    a = rotary._case(2, 7, 3, 24, turns=7)("cpu")
    whole, x = rotary.rms_norm_rotary(**a), a["x"]
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    third = torch.cat([x, x, x], 2).flatten(2).chunk(3, -1)[1].unflatten(-1, (3, 24))
    assert not turned.is_contiguous() and not third.is_contiguous()
    for view in (turned, third):
        assert torch.equal(rotary.rms_norm_rotary(**a | {"x": view}), whole)


def test_many_heads():
    """More than a program takes."""
    a = rotary._case(1, 3, 18, 256, turns=3)("cpu")
    assert rotary._cut(18, 256, "interleaved")[0] == 16
    expected = gradients(rotary.reference, cases.exact(a))
    found = gradients(rotary.rms_norm_rotary, a)
    assert cases.error(found[0], expected[0]) <= 1e-6 and cases.error(found[1], expected[1]) <= 1e-6
