"""Ancestral sampling on a grid against its exact law; three ways to draw a step, one of them wrong in the tail."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from fewstep.kernels import philox
from fewstep.models.masked import MaskedModel, from_joint
from fewstep.samplers import first_hitting, masked_ancestral, race
from fewstep.samplers.masked_ancestral import DRAWS, grid

SIZE, LENGTH = 2, 3
JOINT = torch.rand((SIZE,) * LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
JOINT /= JOINT.sum()
MODEL = from_joint(JOINT)
RARE = 2**16  # a leading word of 32 bits below this comes once in 2^16


def law(times: torch.Tensor) -> torch.Tensor:
    """The exact law of ancestral sampling on a grid: all contexts' probabilities, carried from step to step."""
    contexts = list(itertools.product(range(SIZE + 1), repeat=LENGTH))
    mass = dict.fromkeys(contexts, 0.0) | {(SIZE,) * LENGTH: 1.0}
    for t, s in itertools.pairwise(times.tolist()):
        stay, after = s / t, dict.fromkeys(contexts, 0.0)
        for context, chance in mass.items():
            p = MODEL(torch.tensor([context]))[0].exp() if chance else None
            ways = [
                [(v, 1.0)] if v < SIZE else [(SIZE, stay), *((k, (1 - stay) * float(p[i, k])) for k in range(SIZE))]
                for i, v in enumerate(context)
            ] if chance else []  # fmt: skip
            for way in itertools.product(*ways) if chance else ():
                after[tuple(v for v, _ in way)] += chance * math.prod(w for _, w in way)
        mass = after
    return torch.tensor([mass[x] for x in itertools.product(range(SIZE), repeat=LENGTH)])


def distance(tokens: torch.Tensor, wanted: torch.Tensor) -> float:
    place = (tokens * SIZE ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    return float(
        0.5 * (torch.bincount(place, minlength=SIZE**LENGTH) / len(tokens) - wanted.flatten()).abs().sum()
    )


def floor(p: torch.Tensor, draws: int) -> float:
    """As in the tests of the first-hitting sampler, at a risk of 1e-6."""
    return float(0.5 * (p.flatten() * (1 - p.flatten()) / draws).sqrt().sum()) + math.sqrt(
        math.log(1e6) / (2 * draws)
    )


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("steps", [2, 5, [1.0, 0.7, 0.65, 0.1, 0.0]])
def test_the_law_is_that_of_the_grid(draws, steps):
    n, wanted = 40_000, law(grid(steps))
    assert abs(wanted.sum() - 1) < 1e-6
    x, _ = masked_ancestral(MODEL, n, steps, draws=draws)
    assert distance(x, wanted) < floor(wanted, n)
    assert distance(x, JOINT) > 1.5 * floor(JOINT, n)  # the control: that is not the joint


def test_the_distance_to_the_joint_falls_as_steps_are_added():
    away = [float(0.5 * (law(grid(steps)) - JOINT.flatten()).abs().sum()) for steps in (1, 2, 4, 8, 16, 32)]
    assert all(b < a for a, b in itertools.pairwise(away))
    assert abs(away[-2] / away[-1] - 2) < 0.1  # as 1 / T


def test_with_many_steps_it_is_the_first_hitting_sampler():
    x, info = first_hitting(MODEL, 2000, seed=4)
    y, other = masked_ancestral(MODEL, 2000, 10**6, seed=4)
    assert torch.equal(x, y) and other.calls == LENGTH
    assert (0 <= info.times - other.times).all() and (info.times - other.times <= 1e-6).all()


def test_calls_are_bounded_by_steps_and_by_tokens_also_in_a_batch():
    """A sample's are T (1 - (1 - 1/T)^L) on average."""
    length, n = 6, 4000
    model = from_joint(torch.ones((2,) * length))
    for steps in (1, 3, 6, 20, 1000):
        _, info = masked_ancestral(model, n, steps)
        assert info.calls == info.needed.max() <= min(steps, length)
        spread = float(info.needed.double().std()) / math.sqrt(n)
        assert abs(info.needed.double().mean() - steps * (1 - (1 - 1 / steps) ** length)) <= 5 * spread + 1e-9
        _, other = masked_ancestral(model, 200, steps, draws="float64")
        assert other.needed.max() <= min(steps, length)
        if steps == 1000:
            assert other.calls > 2 * length  # of the batch, for which somebody always changes


def test_a_timed_model_is_asked_at_the_step_s_beginning():
    asked = []

    def call(tokens, t):
        asked.append(t)
        return torch.zeros(*tokens.shape, 2)

    times = torch.tensor([1.0, 0.9, 0.4, 0.15, 0.0], dtype=torch.float64)
    _, info = masked_ancestral(MaskedModel(call, 2, 3, "cosine", timed=True), 50, times)
    last = info.times.sort(1, descending=True).values  # the ends of steps
    for row in range(50):
        ends = last[row].unique().flip(0)
        wanted = [times[(times == end).nonzero()[0, 0] - 1] for end in ends]
        assert [float(t[row]) for t in asked[: len(ends)]] == [float(t) for t in wanted]


@pytest.mark.parametrize("draws", DRAWS)
def test_prompts_and_splits(draws):
    rows = torch.randint(SIZE + 1, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    whole, info = masked_ancestral(MODEL, rows, 4, seed=9, draws=draws)
    given = rows < SIZE
    assert torch.equal(whole[given], rows[given]) and (whole < SIZE).all() and (info.times[given] == 1).all()
    for k in range(6):
        ids = torch.tensor([k])
        assert torch.equal(
            masked_ancestral(MODEL, rows[k : k + 1], 4, seed=9, ids=ids, draws=draws)[0], whole[k : k + 1]
        )


def rare_reveals(draws: str, monkeypatch, trials: int = 200_000, step: float = 3e-9) -> tuple[int, float]:
    """How many of ``trials`` reveal their token in a first step of length 3e-9, and how many should.

    Only those are drawn for whom it can be: of what decides for a token, the leading word of 32 bits is given to be
    among the 2^16 that favour it, so that it is 2^16 times as likely as else.
    """
    plain = philox.words

    def words(seed, ids, groups, row, stream):
        drawn = list(plain(seed, ids, groups, row, stream))
        if stream in (10, race.STREAM) and int(row) == 0:  # times of "exact"; the others' first step
            for k in range(1 if stream == 10 else 3):  # the fourth column is the mask
                drawn[k] = drawn[k] % RARE + 2**32 - RARE
        return tuple(drawn)

    monkeypatch.setattr(philox, "words", words)
    model = from_joint(torch.tensor([0.2, 0.3, 0.5]))
    _, info = masked_ancestral(model, trials, [1.0, 1 - step, 0.0], draws=draws, seed=2)
    return int((info.times[:, 0] > 0).sum()), trials * step * RARE


@pytest.mark.parametrize("draws", DRAWS)
def test_rare_reveals_come_as_often_as_they_should_but_in_float32(draws, monkeypatch):
    got, expected = rare_reveals(draws, monkeypatch)
    assert expected > 35
    right = abs(got - expected) < 5 * math.sqrt(expected)
    assert right == (draws != "float32"), (got, expected)
    if not right:
        assert got == 0  # probabilities of 1e-9 never win against steps of 2^-24


def test_what_float32_makes_of_a_probability_is_the_lattice_s():
    """1e6 draws each, given a rare leading word: within five standard deviations. The paper's form is far off."""
    n = 1_000_000
    random = torch.Generator().manual_seed(0)
    token, mask = (torch.randint(2**24, (n,), generator=random) for _ in range(2))
    token = token % 2**8 + 2**24 - 2**8  # u of the token is within 2^-16 of 1
    u = torch.stack([token, mask], -1).float() * race.LATTICE
    for q in (2e-8, 5e-8, 2e-7, 4e-7):
        won = int((race.winners(torch.tensor([q, 1.0]), u) == 0).sum())
        expected = n * RARE * float(race.lattice_odds(torch.tensor(q, dtype=torch.float64)))
        assert abs(won - expected) < 5 * math.sqrt(expected), q
        assert abs(won - n * RARE * q) > 10 * math.sqrt(expected)  # the control: what it should be
        continuous = n * RARE * q * math.exp(-race.LATTICE / q)
        assert abs(won - continuous) > 10 * math.sqrt(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_those_of_their_precision(dtype):
    from fewstep.samplers.unmasking import request

    asked = request(MODEL, 2000, 0, None, None, 1.0, 1.0)
    u = race.uniforms(asked, 10, 3, dtype)
    bits = 24 if dtype == torch.float32 else 53
    assert u.dtype == dtype and (u >= 0).all() and (u < 1).all()
    whole = u.double() * 2**bits
    assert (whole == whole.round()).all() and (whole % 2 == 1).any()
    assert abs(float(u.double().mean()) - 0.5) < 5 * math.sqrt(1 / 12 / u.numel())
    assert not torch.equal(u, race.uniforms(asked, 10, 4, dtype))


@pytest.mark.parametrize(
    ("steps", "draws", "message"),
    [
        (0, "exact", "steps must be 1 or more"),
        (-3, "exact", "steps must be 1 or more, or times that fall from 1 to 0, got -3"),
        (True, "exact", "steps must be 1 or more"),
        ([1.0, 0.5], "exact", "times that fall from 1 to 0"),
        ([1.0, 0.5, 0.6, 0.0], "exact", "times that fall from 1 to 0"),
        ([[1.0, 0.0]], "exact", "times that fall from 1 to 0"),
        ([1.0, math.nan, 0.0], "exact", "times that fall from 1 to 0"),
        (4, "float16", "draws must be one of exact, float32, float64, got 'float16'"),
    ],
)
def test_what_is_refused(steps, draws, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        masked_ancestral(MODEL, 2, steps, draws=draws)
