"""Gate, residual and next norm by the interpreter: the reference in float64, both ways, and that kernels ran."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases
from fewstep.kernels import gate_residual as gates

SMALL = [c for c in gates.CASES if not c.real]
ROUNDED = 2**-7  # one unit in the last place of bfloat16; the interpreter truncates instead of rounding


def public(norm, **arguments):
    if norm != "none":
        return gates.gate_residual_norm(**arguments)
    return (gates.gate_residual(*(arguments[k] for k in ("x", "h", "gate"))),)


def gradients(run, arguments):
    """The results that are not empty, and the gradients of all tensors."""
    leaves = [v.requires_grad_() for v in arguments.values() if isinstance(v, torch.Tensor)]
    outs = run(**arguments)[: 1 if arguments["norm"] == "none" else 2]
    seeds = [cases.randn(*t.shape, seed=k).to(t.dtype) for k, t in enumerate(outs, 7)]
    return [t.detach() for t in outs], torch.autograd.grad(outs, leaves, seeds)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_reference_in_float64(case, monkeypatch):
    expected = gradients(gates.reference, cases.exact(case.make("cpu")))
    for name in ("reference", "reference_backward"):  # whoever answers now, it is not the reference
        monkeypatch.setattr(gates, name, None)
    found = gradients(public, case.make("cpu"))
    assert cases.error(found[0], expected[0]) <= case.tolerance
    assert cases.error(found[1], expected[1]) <= case.tolerance


def test_bfloat16_within_a_unit():
    """The norm is of r as it is stored, so y is compared with the norm of that r."""
    make = gates._case(2, 21, 72, norm="layer_norm", modulated=1, dtype=torch.bfloat16)
    a = make("cpu")
    r, y = public(**a)
    expected, _ = gates.reference(**cases.exact(a))
    assert r.dtype == y.dtype == torch.bfloat16 and cases.error(r, expected) <= ROUNDED
    normed = gates.norms.reference(r.double(), a["scale"].double(), a["shift"].double(), eps=a["eps"])
    assert cases.error(y, normed) <= ROUNDED


def test_one_result_may_be_unused():
    """Autograd then hands in zeros."""
    for k in (0, 1):
        a = gates._case(2, 5, 20, norm="layer_norm", modulated=1)("cpu")
        b = cases.exact(a)
        for arguments, run in ((a, public), (b, gates.reference)):
            leaves = [arguments[name].requires_grad_() for name in ("x", "h", "gate")]
            arguments["found"] = torch.autograd.grad(run(**arguments)[k].square().sum(), leaves)
        assert cases.error(a["found"], b["found"]) <= 1e-6


def test_views_are_read_as_they_are():
    a = gates._case(2, 9, 24, norm="layer_norm", modulated=1)("cpu")
    whole = public(**a)
    packed = torch.cat([a["gate"], a["shift"], a["scale"]], -1)
    a["gate"], a["shift"], a["scale"] = packed.chunk(3, dim=-1)
    a["h"] = torch.cat([a["h"], a["h"]], 1)[:, 9:]
    a["x"] = a["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert all(torch.equal(one, other) for one, other in zip(whole, public(**a), strict=True))


def test_only_what_is_wanted_is_summed(monkeypatch):
    a = gates._case(2, 6, 16, norm="layer_norm", modulated=1, affined=True)("cpu")
    asked, run = [], gates.launch_backward

    def watched(*args):
        asked.append(args[-1])
        return run(*args)

    monkeypatch.setattr(gates, "launch_backward", watched)
    a["h"].requires_grad_()
    a["scale"].requires_grad_()
    sum(t.sum() for t in public(**a)).backward()
    assert asked == [[False, True, False]] and a["scale"].grad is not None
