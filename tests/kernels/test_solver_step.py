"""The fused step's reference and registration, where no kernel runs."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import solver_step
from fewstep.kernels.solver_step import APART, NOWHERE

SMALL = [c for c in solver_step.CASES if not c.real]


OPTIONAL = (
    "euler",
    "five dimensions, two registers",
    "all of it",
    "empty",
)  # between them, all that may be absent


@pytest.mark.parametrize("case", [c for c in SMALL if c.name in OPTIONAL], ids=lambda c: c.name)
def test_opcheck(case):
    torch.library.opcheck(solver_step.op, (), case.make("cpu"))


def by_hand(a: dict, b: int) -> dict:
    """One sample of a step, from the definition, in Python's own order."""
    row, lane = (int(a[k][b if a[k].numel() > 1 else 0]) for k in ("row", "lane"))
    w = a["table"][row, lane].double()
    held = [None if t is None else t[b].double() for t in a["history"]]
    sources = [a["x"][b].double(), a["y"][b].double(), None, *held, *(t[b].double() for t in a["outputs"])]
    first = 3 + len(held)

    def total(which):
        return sum(
            float(w[which, k]) * s
            for k, s in enumerate(sources)
            if s is not None and a["masks"][which] >> k & 1
        )

    if a["limit"] is not None:
        sources[first:] = [total(0).clamp(-float(a["limit"]), float(a["limit"]))]
    slot = int(a["slots"][row]) if a["slot"] == APART else a["slot"]
    if slot != NOWHERE:
        sources[3 + slot] = total(1)
    return {"x": total(2), "y": total(3) if a["masks"][3] else None, "history": sources[3:first]}


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize(
    ("apart", "slot", "unwritten"),
    [(False, NOWHERE, None), (False, 1, 0), (True, APART, None), (True, APART, 1)],
)
def test_the_definition(two, clips, apart, slot, unwritten):
    make = solver_step._case(
        (4, 2, 3), 2, 2, slot=slot, clips=clips, apart=apart, two=two, unwritten=unwritten
    )
    a = make("cpu")
    positional = {
        k: v for k, v in a.items() if k not in ("masks", "slot", "slots", "z", "seed", "ids", "limit")
    }
    step = solver_step.solver_step(**positional, **{k: a[k] for k in ("masks", "slot", "slots", "limit")})
    assert (step.y is step.x) == (not two) and len(step.history) == 2
    for b in range(4):
        expected = by_hand(a, b)
        torch.testing.assert_close(step.x[b].double(), expected["x"], atol=2e-6, rtol=0)
        if two:
            torch.testing.assert_close(step.y[b].double(), expected["y"], atol=2e-6, rtol=0)
        for found, wanted in zip(step.history, expected["history"], strict=True):
            if wanted is None:
                assert found is None or not found[b].any()
            else:
                torch.testing.assert_close(found[b].double(), wanted, atol=2e-6, rtol=0)


def test_inner_products_are_those_of_the_sums():
    a = solver_step._case((2, 5, 7), 1, 2, slot=0, products=True)("cpu")
    a["masks"] = [*a["masks"][:4], 0b011000, 0b100000]  # u of what is stored and output 1, v of output 2
    w, stored = a["table"][2, 1].double(), solver_step.reference(**a)[1].double()
    one = w[4, 3] * stored + w[4, 4] * a["outputs"][0].double()
    two = w[5, 5] * a["outputs"][1].double()
    products = solver_step.reference(**a)[-1]
    for k, pair in enumerate(((one, one), (one, two), (two, two))):
        torch.testing.assert_close(
            products[:, k].double(), (pair[0] * pair[1]).sum((1, 2)), rtol=1e-5, atol=1e-5
        )


def test_gradients_go_through_the_reference():
    a = SMALL[0].make("cpu")
    out = a["outputs"][0].requires_grad_()
    step = solver_step.solver_step(
        a["x"], a["y"], [], [out], a["table"], a["row"], a["lane"], masks=a["masks"]
    )
    step.x.sum().backward()
    assert torch.allclose(out.grad, a["table"][2, 1, 2, 3].expand_as(out))
