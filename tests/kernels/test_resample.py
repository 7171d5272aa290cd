"""Conditional resampling where no kernel runs: the samplers' own functions, expectation, edges, errors."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels.resample import CASES, op, reference, resample
from fewstep.samplers import resampling

small = pytest.mark.parametrize("case", [c for c in CASES if not c.real], ids=lambda c: c.name)


@small
def test_it_is_what_the_samplers_do(case):
    arguments = case.make("cpu")
    index, ess, log_mean, now = resample(**arguments)
    logs = arguments["log_weights"]
    torch.testing.assert_close(ess, resampling.ess(logs))
    torch.testing.assert_close(log_mean, resampling.log_mean_exp(logs))
    assert torch.equal(now, resampling.ess(logs) < logs.shape[1] / 2)
    stays = torch.arange(logs.shape[1])
    assert torch.equal(index, torch.where(now[:, None], resampling.systematic(logs, arguments["u"]), stays))


def test_the_expectation_is_the_weight():
    """Over u on a grid of n, the mean number of copies is K w_k up to one point in n."""
    logs, n = torch.tensor([[-1.0, 0.5, 0.0, -8.0, 1.0]], dtype=torch.float64), 4000
    u = ((torch.arange(n) + 0.5) / n)[:, None].double()
    index = resample(logs.expand(n, -1), u, torch.tensor([5.0])).index
    copies = torch.stack([(index == k).sum(1) for k in range(5)], 1)
    expected = 5 * logs.softmax(-1)
    assert float((copies.double().mean(0) - expected).abs().max()) <= 1 / n
    assert (copies >= expected.floor()).all() and (copies <= expected.ceil()).all()


def test_limits_and_nothing_left():
    logs = torch.zeros(3, 7)
    logs[1, 0] = 1e-3
    logs[2] = -torch.inf
    u = torch.full((3, 1), 0.4)
    found = resample(logs, u, torch.tensor([7 * (1 - 1e-12)], dtype=torch.float64))
    assert found.resampled.tolist() == [False, True, False]
    assert found.ess[2].isnan() and torch.equal(found.index[2], torch.arange(7))
    assert not resample(logs, u, torch.zeros(1)).resampled.any()
    assert resample(logs, u, torch.tensor([0.0, 8.0, 0.0])).resampled.tolist() == [False, True, False]


@small
def test_opcheck(case):
    torch.library.opcheck(op, tuple(case.make("cpu").values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"log_weights": torch.zeros(3)}, r"log_weights must have shape \(groups, particles\), got \(3,\)"),
        ({"u": torch.zeros(2)}, r"u must have shape \(2, 1\), got \(2,\)"),
        ({"limit": torch.zeros(3)}, r"limit must have shape \(1,\) or \(2,\), got \(3,\)"),
    ],
)
def test_errors(change, words):
    good = {"log_weights": torch.zeros(2, 4), "u": torch.zeros(2, 1), "limit": torch.ones(1)}
    resample(**good)
    with pytest.raises(ValueError, match=words):
        resample(**good | change)
    many = good | {"log_weights": torch.zeros(2, 5000)}
    with pytest.raises(ValueError, match="a group must have at most 4096 particles, got 5000"):
        resample(**many, impl="triton")
    assert resample(**many).index.shape == (2, 5000)
    assert torch.equal(reference(**good)[0], torch.arange(4).expand(2, 4))
