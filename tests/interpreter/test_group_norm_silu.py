"""GroupNorm and SiLU by the interpreter: the reference in float64, both ways, split and whole, and that kernels ran."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases
from fewstep.kernels import group_norm_silu as groups

SMALL = [c for c in groups.CASES if not c.real]


def gradients(run, arguments):
    leaves = [v.requires_grad_() for v in arguments.values() if isinstance(v, torch.Tensor)]
    y = run(*arguments.values())[0]
    return y.detach(), torch.autograd.grad(y, leaves, cases.randn(*y.shape, seed=9).to(y.dtype))


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_reference_in_float64(case, monkeypatch):
    expected = gradients(groups.reference, cases.exact(case.make("cpu")))
    for name in ("reference", "reference_backward"):  # whoever answers now, it is not the reference
        monkeypatch.setattr(groups, name, None)
    arguments = case.make("cpu")
    found = gradients(groups.op, arguments)
    assert cases.error(found[0], expected[0]) <= case.tolerance
    assert cases.error(found[1][:3], expected[1][:3]) <= case.tolerance
    for one, other in zip(
        found[1][3:], expected[1][3:], strict=True
    ):  # a sum that cancels: some eps of what it sums
        assert ((one - other).abs() <= 2**-21 * expected[1][0].abs().flatten(2).sum(2)).all()
    assert found[0].stride() == arguments["x"].stride()


@pytest.mark.parametrize("channels", ["first", "last"])
def test_split_is_whole(channels, monkeypatch):
    """However a group is cut, to a rounding."""
    a = groups._case(2, 6, 9, 11, groups=2, added=True, channels=channels)("cpu")
    whole = gradients(groups.op, a)
    monkeypatch.setattr(groups, "WHOLE", 0)
    split = gradients(groups.op, a)
    assert cases.error(split[0], whole[0]) <= 3e-7
    assert cases.error(split[1], whole[1]) <= 1e-6


@pytest.mark.parametrize("size", [(6, 7), (65, 67)])
def test_a_large_mean_costs_no_digits(size):
    """Shifted before it is squared, in one program and in many."""
    a = groups._case(1, 4, *size, groups=2, weights="none", activation="none", offset=1e3)("cpu")
    expected = groups.reference(**cases.exact(a))[0]
    x = a["x"].reshape(1, 2, -1)
    naive = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        (x.square().mean(-1) - x.mean(-1).square()).clamp(min=1e-6)[..., None]
    )
    # the mean itself is rounded to 10^3 eps
    assert (
        cases.error(groups.op(**a)[0], expected)
        <= 5e-5
        < 2e-3
        < cases.error(naive, expected.reshape(x.shape))
    )


def test_bfloat16_within_a_unit():
    a = groups._case(2, 8, 9, 11, groups=2, added=True, dtype=torch.bfloat16)("cpu")
    expected = gradients(groups.reference, cases.exact(a))
    y, found = gradients(groups.op, a)
    # one unit in the last place of bfloat16; the interpreter truncates instead of rounding
    assert cases.error(y, expected[0]) <= 2**-7 and cases.error(found[:3], expected[1][:3]) <= 2**-7


def test_scale_and_shift_and_a_view():
    x, norm = cases.randn(2, 8, 5, 14)[..., ::2], torch.nn.GroupNorm(2, 8)
    scale, shift = (cases.randn(2, 8, seed=k) for k in (1, 2))
    given = (8 // 4, norm.weight, norm.bias, scale, shift)
    found = groups.group_norm_silu(x, *given)
    expected = groups.group_norm_silu(
        x.double(), *(v.double() if isinstance(v, torch.Tensor) else v for v in given)
    )
    assert cases.error(found, expected) <= 1e-6


def test_video_and_signals():
    for shape in ((2, 4, 3, 5, 7), (2, 4, 33)):
        x = cases.randn(*shape)
        for view in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            found = groups.group_norm_silu(view, 2)
            assert cases.error(found, groups.reference(x.double(), 2)[0]) <= 1e-6
            assert found.stride() == view.stride()
