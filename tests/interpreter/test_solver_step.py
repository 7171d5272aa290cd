"""The fused step by the interpreter: against the reference in float64, and whole trajectories against the CPU's."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases, dispatch, solver_step
from fewstep.kernels.solver_step import APART, BLOCK

SMALL = [c for c in solver_step.CASES if not c.real]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_the_references_sums(case, monkeypatch):
    arguments = case.make("cpu")
    expected = solver_step.reference(**cases.exact(arguments))
    monkeypatch.setattr(solver_step, "reference", None)  # whoever answers now, it is not the reference
    for run in (solver_step.launch, solver_step.op):
        found = run(**arguments)
        assert [t.dtype for t in found] == [torch.float32] * len(expected)
        assert cases.error(found, expected) <= case.tolerance


def test_a_sample_alone_is_the_sample_in_a_batch():
    """Bit for bit, noise and inner products too, whatever the other samples do."""
    arguments = next(c for c in SMALL if c.name == "all of it").make("cpu")
    check_alone(arguments)
    check_alone(next(c for c in SMALL if c.name == "noise, ragged").make("cpu"))


def check_alone(arguments):
    whole = solver_step.launch(**arguments)
    for b in range(3):
        one = slice(b, b + 1)
        alone = {k: arguments[k][one] for k in ("x", "y", "row", "lane", "ids") if len(arguments[k]) == 3}
        lists = {k: [None if t is None else t[one] for t in arguments[k]] for k in ("history", "outputs")}
        found = solver_step.launch(**arguments | alone | lists)
        assert all(torch.equal(t[one], s) for t, s in zip(whole, found, strict=True))


@pytest.mark.parametrize("name", ["noise, flat", "noise, ragged"])
def test_the_noise_of_any_block(name, monkeypatch):
    arguments = next(c for c in SMALL if c.name == name).make("cpu")
    whole = solver_step.launch(**arguments)
    for block in (16, 4096):
        monkeypatch.setattr(solver_step, "BLOCK", block)
        assert all(torch.equal(t, s) for t, s in zip(whole, solver_step.launch(**arguments)))


def test_strides_do_not_matter():
    arguments = next(c for c in SMALL if c.name == "ragged, guided, two stored").make("cpu")
    turned = {
        k: arguments[k].transpose(1, 2).contiguous().transpose(1, 2) if k in "xy" else arguments[k]
        for k in arguments
    }
    turned["outputs"] = [torch.stack([t, t], -1)[..., 0] for t in arguments["outputs"]]
    assert not turned["outputs"][0].is_contiguous() and not turned["x"].is_contiguous()
    expected = solver_step.launch(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(expected, solver_step.launch(**turned)))


def test_bfloat16_outputs():
    """Exact in float32, so the interpreter's way with bfloat16 does not matter: it is only ever loaded."""
    case = solver_step.CASES[0]._replace(make=solver_step._case((2, 40), 1, 2, torch.bfloat16, slot=0))
    arguments = case.make("cpu")
    assert (
        cases.error(solver_step.launch(**arguments), solver_step.reference(**cases.exact(arguments))) < 1e-6
    )


def test_rows_that_are_not_there_make_nan():
    arguments = SMALL[0].make("cpu")
    for bad in (-1, 5):
        x = solver_step.launch(**arguments | {"row": torch.full((1,), bad)})[0]
        assert bool(x.isnan().all())


def test_a_network_that_fails_is_not_clipped_to_health():
    arguments = next(c for c in SMALL if c.name == "noise, ragged").make("cpu")
    arguments["outputs"][0][1, 2, 0] = float("nan")
    found = solver_step.launch(**arguments)[0]
    assert bool(found[1, 2, 0].isnan()) and int(found.isnan().sum()) == 1


def test_products_do_not_depend_on_what_lies_behind_the_last_element():
    """Noise is drawn for whole blocks: what it makes of the end of one must not be counted."""
    shape = (2, BLOCK + 8)
    arguments = solver_step._case(shape, draws=True, products=True, apart=True)("cpu")
    expected = solver_step.reference(**cases.exact(arguments))
    assert arguments["slot"] != APART
    assert cases.error(solver_step.launch(**arguments), expected) < 2e-6


def test_what_the_kernel_does_not_take():
    arguments = SMALL[0].make("cpu")
    tensors = {k: arguments[k] for k in ("x", "y", "history", "outputs", "table", "row", "lane")}
    for change, message in (
        ({"x": arguments["x"].double()}, "x must be float32, got torch.float64"),
        ({"outputs": [arguments["x"]] * 4}, "outputs must be one to three, got 4"),
        (
            {"outputs": [arguments["x"].clone().requires_grad_()]},
            "gradients flow, and the kernel has no backward",
        ),
    ):
        with pytest.raises(
            ValueError, match=f"impl='triton' is asked for, but solver_step cannot run there: {message}"
        ):
            solver_step.solver_step(**tensors | change, masks=arguments["masks"], impl="triton")
    with dispatch.using("reference"), pytest.raises(IndexError):
        solver_step.solver_step(**tensors | {"row": torch.full((1,), 5)}, masks=arguments["masks"])
