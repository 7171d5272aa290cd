"""Draws over a vocabulary: frequencies down to 1e-9, log-probabilities, splits, errors."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import philox
from fewstep.kernels.gumbel_draw import CASES, RARE, RIVALS, gumbel_draw, op, reference

SEED = torch.tensor([11])


def test_frequencies():
    """Chi-square over 15 degrees of freedom, at five standard deviations of its normal approximation."""
    draws, logits = 200_000, torch.linspace(-4, 3, 16)
    token, _ = gumbel_draw(logits.expand(draws, -1), SEED, torch.arange(draws), row=5)
    expected = draws * logits.softmax(0)
    assert expected.min() > 50
    found = torch.bincount(token, minlength=16)
    assert float(((found - expected) ** 2 / expected).sum()) < 15 + 5 * (2 * 15) ** 0.5
    # negative control: a logit that is 5% off is seen
    wrong = draws * (1.05 * logits).softmax(0)
    assert float(((found - wrong) ** 2 / wrong).sum()) > 15 + 5 * (2 * 15) ** 0.5


def test_tokens_of_probability_1e_9(monkeypatch):
    """Given that the leading word of a token of probability p is below 2^16, it wins with probability p 2^16."""
    trials, p = 1_000_000, 1e-9
    logits = torch.tensor([1.0, p, p, p]).log().expand(trials, -1)
    generator = torch.Generator().manual_seed(3)

    def words(seed, ids, groups, row, stream):
        drawn = list(torch.randint(2**32, (4, trials, 1), generator=generator))
        if stream == 8:
            drawn[1:] = [w % RARE for w in drawn[1:]]
        kept.append(drawn)
        return tuple(drawn)

    kept: list[list[torch.Tensor]] = []
    monkeypatch.setattr(philox, "words", words)
    token, log_prob = reference(logits, SEED, torch.arange(trials), SEED)
    expected = 3 * trials * p * RARE
    won = int((token > 0).sum())
    assert abs(won - expected) < 5 * expected**0.5 and expected > 190
    assert torch.allclose(log_prob[token > 0], torch.tensor(p).log(), atol=1e-5)
    # negative control: Gumbel noise in float32 from 24 random bits, made of the same words
    u = (torch.cat(kept[0], 1) >> 8).float()
    for uniform in ((u + 0.5) / 2**24, u / 2**24):  # 1 - u: what the rare tokens need is u near 1
        gumbel = -torch.log(-torch.log(1 - uniform))
        naive = int(((logits.float() + gumbel).argmax(-1) > 0).sum())
        assert abs(naive - expected) > 10 * expected**0.5, naive


@pytest.mark.parametrize("case", [c for c in CASES if not c.real], ids=lambda c: c.name)
def test_log_probabilities(case):
    arguments = case.make("cpu")
    token, log_prob = reference(**arguments)
    values = arguments["logits"].double() * arguments.get("scale", torch.ones(1)).reshape(-1, 1).double()
    mask = arguments.get("mask", torch.ones(len(token), dtype=torch.bool))
    wanted = values.log_softmax(-1).gather(1, token.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(log_prob.double(), wanted.where(mask, 0.0), rtol=1e-6, atol=1e-6)
    assert torch.equal(token >= 0, mask)


def test_splits_and_steps():
    logits, ids = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)), torch.arange(6) * 2**29
    whole = gumbel_draw(logits, SEED, ids, row=1)[0]
    assert torch.equal(
        whole, torch.cat([gumbel_draw(logits[k : k + 1], SEED, ids[k : k + 1], row=1)[0] for k in range(6)])
    )
    other = gumbel_draw(logits.repeat(50, 1), SEED, torch.arange(300), row=2)[0]
    assert not torch.equal(other, gumbel_draw(logits.repeat(50, 1), SEED, torch.arange(300), row=3)[0])
    cold = gumbel_draw(logits, SEED, ids, temperature=torch.tensor([1e-4]))
    assert torch.equal(cold[0], logits.argmax(-1))


def test_impossible_tokens():
    logits = torch.full((2, 5), -torch.inf)
    logits[0, 3] = -1000.0
    token, log_prob = gumbel_draw(logits, SEED, torch.arange(2))
    assert token.tolist() == [3, -1] and log_prob[0] == 0 and log_prob[1].isnan()


def test_the_rival_draws_the_same_way():
    """Its picks are its own, of the same law: the mean log-probability of 2000, at five standard deviations."""
    torch.manual_seed(0)
    logits, draws = torch.linspace(-4, 3, 16), 2000
    logs = logits.log_softmax(0)
    mean, spread = (
        float((logs.exp() * logs).sum()),
        float(((logs.exp() * logs**2).sum() - (logs.exp() * logs).sum() ** 2).sqrt()),
    )
    for run in (gumbel_draw, *RIVALS.values()):
        _, log_prob = run(logits=logits.expand(draws, -1), seed=SEED, ids=torch.arange(draws))
        assert abs(float(log_prob.mean()) - mean) < 5 * spread / draws**0.5


@pytest.mark.parametrize("case", [c for c in CASES if not c.real], ids=lambda c: c.name)
def test_opcheck(case):
    arguments = case.make("cpu")
    torch.library.opcheck(op, (), {"stream": 8, **arguments})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(3)}, r"logits must have shape \(N, V\)"),
        ({"logits": torch.zeros(2, 0)}, r"logits must have shape \(N, V\) with V >= 1, got \(2, 0\)"),
        ({"mask": torch.ones(2)}, "mask must hold 2 bools"),
        ({"temperature": torch.ones(3)}, r"temperature must have shape \(1,\) or \(2,\), got \(3,\)"),
    ],
)
def test_errors(change, words):
    good = {"logits": torch.zeros(2, 4), "seed": SEED, "ids": torch.arange(2)}
    gumbel_draw(**good)
    with pytest.raises(ValueError, match=words):
        gumbel_draw(**good | change)
    with pytest.raises(TypeError, match="logits must be floating point, got torch.int64"):
        gumbel_draw(**good | {"logits": torch.zeros(2, 4).long()})
    with pytest.raises(ValueError, match="cannot run there: logits must not be torch.float64"):
        gumbel_draw(**good | {"logits": torch.zeros(2, 4).double()}, impl="triton")
