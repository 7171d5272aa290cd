"""LayerNorm with modulation by the interpreter: the reference in float64, both ways, and that kernels ran."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases
from fewstep.kernels import layer_norm_modulate as norms
from fewstep.kernels.layer_norm_modulate import layer_norm_modulate

SMALL = [c for c in norms.CASES if not c.real]
ROUNDED = 2**-7  # one unit in the last place of bfloat16; the interpreter truncates instead of rounding


def gradients(run, arguments, seed=9):
    """Its result and the gradients of all its tensors."""
    leaves = [v.requires_grad_() for v in arguments.values() if isinstance(v, torch.Tensor)]
    y = run(**arguments)
    dy = cases.randn(*y.shape, seed=seed).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_reference_in_float64(case, monkeypatch):
    expected = gradients(norms.reference, cases.exact(case.make("cpu")))
    for name in ("reference", "reference_backward"):  # whoever answers now, it is not the reference
        monkeypatch.setattr(norms, name, None)
    found = gradients(layer_norm_modulate, case.make("cpu"))
    assert cases.error(found[0], expected[0]) <= case.tolerance
    assert cases.error(found[1], expected[1]) <= max(case.tolerance, 1e-6)


def test_the_reference_on_request(monkeypatch):
    arguments = SMALL[2].make("cpu")
    monkeypatch.setattr(norms, "launch", None)
    assert torch.equal(layer_norm_modulate(**arguments, impl="reference"), norms.reference(**arguments))


def test_bfloat16_within_a_unit():
    case = SMALL[0]._replace(make=norms._case(2, 21, 72, affined=True, dtype=torch.bfloat16))
    expected = gradients(norms.reference, cases.exact(case.make("cpu")))
    y, found = gradients(layer_norm_modulate, case.make("cpu"))
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.bfloat16 for g in found)
    assert cases.error(y, expected[0]) <= ROUNDED and cases.error(found, expected[1]) <= ROUNDED


def test_mixed_dtypes():
    a = norms._case(2, 5, 24)("cpu")
    a["x"] = a["x"].half()
    assert layer_norm_modulate(**a).dtype == torch.float32
    expected = norms.reference(**cases.exact(a))
    assert cases.error(layer_norm_modulate(**a), expected) <= 1e-6


def test_views_are_read_as_they_are():
    """Slices of tokens, chunks of a projection, channels that do not lie side by side: the same bits."""
    a = norms._case(2, 9, 24)("cpu")
    whole = layer_norm_modulate(**a)
    sliced = torch.cat([a["x"], a["x"]], 1)[:, 9:]
    packed = torch.cat([a["shift"], a["scale"], a["shift"]], -1)
    shift, scale, _ = packed.chunk(3, dim=-1)
    assert not sliced.is_contiguous() and not scale.is_contiguous()
    assert torch.equal(layer_norm_modulate(sliced, scale, shift), whole)
    turned = a["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(layer_norm_modulate(turned, scale[:, 0], shift[:, 0]), whole)


def test_a_sample_alone_is_the_sample_in_a_batch():
    a = norms._case(3, 40, 48, affined=True)("cpu")
    whole = layer_norm_modulate(**a)
    alone = {k: a[k][1:2] for k in ("x", "scale", "shift")}
    assert torch.equal(layer_norm_modulate(**a | alone), whole[1:2])


def test_a_large_mean_costs_no_digits():
    """Centred before it is squared: E[x^2] - E[x]^2 in float32 would leave nothing of a variance of 1 at 10^4."""
    x = cases.randn(2, 3, 256) + 1e4
    expected = norms.reference(x.double())
    assert cases.error(layer_norm_modulate(x), expected) < 2e-4  # the mean's own rounding, 10^4 eps / 8
    squares = (x.square().mean(-1) - x.mean(-1).square()).clamp(min=1e-6)
    naive = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(squares)[..., None]
    assert cases.error(naive, expected) > 0.1


def test_only_what_is_wanted_is_summed(monkeypatch):
    """Frozen weights, as beside LoRA: their sums are not made."""
    a = norms._case(2, 6, 16, affined=True)("cpu")
    asked = []
    run = norms.launch_backward

    def watched(*args):
        asked.append(args[-1])
        return run(*args)

    monkeypatch.setattr(norms, "launch_backward", watched)
    a["x"].requires_grad_()
    layer_norm_modulate(**a).sum().backward()
    assert asked == [[False, False]] and a["x"].grad is not None


def test_forward_mode_is_the_references():
    """A custom op would drop the tangent: dispatch takes the reference there, and refuses to be asked otherwise."""
    x, v = cases.randn(2, 5, 16), cases.randn(2, 5, 16, seed=1)
    y, slope = torch.func.jvp(layer_norm_modulate, (x,), (v,))
    step = 1e-6
    ahead, behind = (norms.reference(x.double() + k * step * v.double()) for k in (1, -1))
    assert cases.error(slope, (ahead - behind) / (2 * step)) < 1e-5
    with pytest.raises(ValueError, match="forward-mode derivatives are taken here, and kernels have none"):
        torch.func.jvp(lambda x: layer_norm_modulate(x, impl="triton"), (x,), (v,))


def test_second_derivatives_are_refused():
    x = cases.randn(2, 5, 16).requires_grad_()
    (slope,) = torch.autograd.grad(layer_norm_modulate(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(slope.square().sum(), x)
