"""The draw's kernel by the interpreter: the reference's tokens, and its exponentials to the last digits of the tail."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases, gumbel_draw, philox

SEED = torch.tensor([5])


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("case", [c for c in gumbel_draw.CASES if not c.real], ids=lambda c: c.name)
def test_the_references_draws(case, monkeypatch):
    arguments = case.make("cpu")
    token, log_prob = gumbel_draw.reference(**arguments)
    monkeypatch.setattr(gumbel_draw, "reference", None)
    found = gumbel_draw.op(**{"stream": 8, **arguments})
    assert torch.equal(found[0], token)
    assert cases.error(found[1], log_prob) <= case.tolerance
    scale = arguments.pop("scale", None)
    again = gumbel_draw.gumbel_draw(**arguments, temperature=None if scale is None else 1 / scale)
    assert torch.equal(again[0], token)


def exponentials(ids, count=4):
    """E of the first elements of each row, in float64, by the reference's words."""
    w, more = (
        torch.stack(philox.words(SEED, ids, 1, torch.zeros(1), s), -1)[:, 0, :count].double() for s in (8, 9)
    )
    v = torch.where(w < gumbel_draw.RARE, w + (more + 0.5) / 2**32, w + 0.5) / 2**32
    return -torch.log1p(-v)


def test_exponentials_hold_to_the_tail():
    """Token 1 wins over token 0 exactly when its logit passes log(E_1 / E_0): the reference says where that is."""
    everybody = torch.arange(400_000)
    word = philox.words(SEED, everybody, 1, torch.zeros(1), 8)[1][:, 0]
    rare = everybody[word < gumbel_draw.RARE]
    assert 2 <= len(rare) <= 20
    ids = torch.cat([rare, everybody[:20]])
    E = exponentials(ids, 2)
    edge = (E[:, 1] / E[:, 0]).log()
    assert float(edge.min()) < -11
    for shift, winner in ((4e-6, 1), (-4e-6, 0)):
        logits = torch.stack([torch.zeros(len(ids)), (edge + shift * edge.abs().clamp(min=1)).float()], 1)
        token, _ = gumbel_draw.launch(logits, SEED, ids, torch.zeros(1, dtype=torch.int64))
        assert token.tolist() == [winner] * len(ids)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_edges(monkeypatch):
    logits = torch.full((4, 70), -torch.inf)
    logits[0, 66], logits[1, 0], logits[3, 5], logits[3, 69] = -1000.0, 3e38, -500.0, 500.0
    ids, row = torch.arange(4), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(gumbel_draw, "BLOCK", 32)
    token, log_prob = gumbel_draw.launch(logits, SEED, ids, row)
    assert token.tolist() == [66, 0, -1, 69]
    assert log_prob[[0, 1, 3]].tolist() == [0, 0, 0] and log_prob[2].isnan()
    spread = cases.randn(6, 140, seed=4)[:, ::2]
    found = gumbel_draw.launch(spread, SEED, torch.arange(6), row)
    monkeypatch.undo()
    whole = gumbel_draw.launch(spread.contiguous(), SEED, torch.arange(6), row)
    assert torch.equal(found[0], whole[0]) and cases.error(found[1], whole[1]) < 1e-6
    broadcast = gumbel_draw.launch(
        spread, SEED.expand(6), torch.arange(6), row.expand(6), scale=torch.ones(1).expand(6)
    )
    assert torch.equal(broadcast[0], whole[0])
