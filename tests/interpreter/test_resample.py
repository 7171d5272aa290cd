"""The resampling kernel by the interpreter: the reference's particles, and its edges."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases, resample

small = pytest.mark.parametrize(
    "case", [c for c in resample.CASES if not c.real or "4096" in c.name], ids=lambda c: c.name
)


@small
def test_the_references_particles(case, monkeypatch):
    arguments = case.make("cpu")
    index, ess, log_mean, now = resample.reference(**arguments)
    monkeypatch.setattr(resample, "reference", None)
    for found in (resample.op(**arguments), resample.resample(**arguments)):
        assert torch.equal(found[3], now)
        assert cases.error(found[1], ess) <= 1e-6 and cases.error(found[2], log_mean) <= 1e-6
        # float32 weights move the ends of 4096 parts by 1e-7 of the whole: now and then one passes a point
        allowed = 2 if index.numel() > 1000 else 0
        assert int((found[0] != index).sum()) <= allowed
        assert int((found[0] - index).abs().max() if index.numel() else 0) <= 1


def test_weights_far_below_zero_lose_nothing():
    """Log-weights near -3e6 are 0.25 apart in float32: in float64 they come as two of those."""
    logs = cases.randn(2, 50).double() - 3e6
    limit, u = torch.tensor([50.0]), torch.tensor([[0.1], [0.9]])
    found, wanted = resample.launch(logs, u, limit), resample.reference(logs, u, limit)
    assert torch.equal(found[0], wanted[0]) and cases.error(found[1], wanted[1]) <= 1e-6
    # negative control: as one float32
    assert cases.error(resample.launch(logs.float(), u, limit)[1], wanted[1]) > 1e-3


def test_one_holds_everything_or_nobody_does():
    logs = torch.full((4, 9), -200.0)
    logs[0, 8] = logs[1, 0] = 0.0
    logs[2] = -torch.inf
    logs[3] = torch.tensor([0.0, -torch.inf, -1e30] * 3)
    u = torch.tensor([[1 - 2.0**-33], [0.0], [0.5], [0.5]], dtype=torch.float64)
    found = resample.launch(logs, u, torch.tensor([8.0]))
    assert found[0][0].tolist() == [8] * 9 and found[0][1].tolist() == [0] * 9
    assert found[0][2].tolist() == list(range(9)) and found[1][2].isnan()
    assert found[0][3].tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6] and found[3].tolist() == [
        True,
        True,
        False,
        True,
    ]


def test_even_weights_are_left_alone():
    logs = torch.full((1, 11), -3.3)
    assert not resample.launch(logs, torch.rand(1, 1), torch.tensor([11.0]))[3].any()
    moved = resample.launch(logs, torch.full((1, 1), 0.5), torch.tensor([12.0]))
    assert moved[3].all() and moved[0][0].tolist() == list(range(11))


def test_groups_alone_or_together():
    arguments = resample.CASES[1].make("cpu")
    whole = resample.launch(**arguments)[0]
    for g in range(7):
        alone = resample.launch(
            arguments["log_weights"][g : g + 1], arguments["u"][g : g + 1], arguments["limit"]
        )
        assert torch.equal(alone[0][0], whole[g])
    strided = arguments["log_weights"].T.contiguous().T
    assert torch.equal(resample.launch(strided, arguments["u"], arguments["limit"].expand(7))[0], whole)
