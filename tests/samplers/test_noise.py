"""Philox as published, normals that are normal, and draws that depend on nothing but their five numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewstep.samplers import starting_noise
from fewstep.samplers.noise import START, STEP, USER, normal, philox, uniform, words

# Random123's known answers for philox4x32-10: counter, key, output
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_by_numpy(counter, key):
    """The same cipher on unsigned words, from its definition: a second opinion on the signed wrap-around."""
    c, k = [np.asarray(v, dtype=np.uint64) for v in counter], [np.asarray(v, dtype=np.uint64) for v in key]
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        one, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(two >> shift) ^ c[1] ^ k[0], two & mask, (one >> shift) ^ c[3] ^ k[1], one & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    out = philox(
        tuple(torch.tensor([c]) for c in hexes(counter)), tuple(torch.tensor([k]) for k in hexes(key))
    )
    assert [int(word) for word in out] == hexes(expected)
    assert [int(word) for word in philox_by_numpy(hexes(counter), hexes(key))] == hexes(expected)


def test_random_counters_agree_with_unsigned_arithmetic():
    drawn = np.random.default_rng(0).integers(0, 2**32, size=(6, 20_000))
    ours = philox(
        tuple(torch.from_numpy(v) for v in drawn[:4]), tuple(torch.from_numpy(v) for v in drawn[4:])
    )
    for mine, other in zip(ours, philox_by_numpy(drawn[:4], drawn[4:]), strict=True):
        assert np.array_equal(mine.numpy().astype(np.uint64), other)


def test_where_the_five_numbers_go():
    seed, ident, row, stream = (7 << 32) + 5, 2**32 - 1, 11, 2
    out = words(seed, torch.tensor([ident]), 3, row, stream)
    expected = philox_by_numpy([np.arange(3), [row] * 3, [stream] * 3, [7] * 3], [[5] * 3, [ident] * 3])
    for mine, other in zip(out, expected, strict=True):
        assert mine[0].tolist() == other.tolist()


# --- the distribution ----------------------------------------------------------------------------------------------

MANY = 400_000
SURE = 5.0  # standard errors: each moment fails by chance once in 1.7 million seeds; the seed is fixed


@pytest.fixture(scope="module")
def many():
    return normal(1, torch.arange(100), (MANY // 100,), dtype=torch.float64).flatten()


@pytest.mark.parametrize(
    ("power", "mean", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]
)
def test_moments(many, power, mean, variance):
    assert abs(float((many**power).mean()) - mean) < SURE * math.sqrt(variance / MANY)


def test_the_distribution_function(many):
    """Dvoretzky-Kiefer-Wolfowitz: P(sup |F_n - F| > e) <= 2 exp(-2 n e^2), here one in a billion."""
    expected = torch.special.ndtr(many.sort().values)
    steps = torch.arange(MANY + 1) / MANY
    distance = max(float((expected - steps[:-1]).max()), float((steps[1:] - expected).max()))
    assert distance < math.sqrt(math.log(2e9) / (2 * MANY))
    shifted = torch.special.ndtr((many + 0.01).sort().values)
    assert float((shifted - steps[:-1]).abs().max()) > math.sqrt(math.log(2e9) / (2 * MANY))


def test_the_tails_end_where_23_bits_do(many):
    assert float(many.abs().max()) <= math.sqrt(2 * 24 * math.log(2)) < 5.77
    beyond = float((many.abs() > 4).double().mean())
    assert abs(beyond - 6.334e-5) < SURE * math.sqrt(6.334e-5 / MANY)


def test_uniforms_are_uniform_and_open():
    u = uniform(3, torch.arange(100), MANY // 100).flatten().sort().values
    steps = torch.arange(MANY + 1, dtype=torch.float64) / MANY
    assert 0 < float(u[0]) and float(u[-1]) < 1
    assert max(float((u - steps[:-1]).max()), float((steps[1:] - u).max())) < math.sqrt(
        math.log(2e9) / (2 * MANY)
    )


BASE = dict(seed=1, ids=torch.arange(40), row=3, stream=STEP)
OTHERS = {
    "seed": dict(seed=2), "high seed": dict(seed=1 + 2**32), "id": dict(ids=torch.arange(40, 80)), "row": dict(row=4),
    "stream": dict(stream=START), "user": dict(stream=USER), "row and seed exchanged": dict(seed=3, row=1),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_draws_that_differ_in_one_number_are_independent(name):
    shape = (1000,)
    one, other = normal(shape=shape, **BASE).flatten(), normal(shape=shape, **(BASE | OTHERS[name])).flatten()
    n = one.numel()
    assert abs(float((one * other).double().mean())) < SURE / math.sqrt(n)
    assert abs(float(((one**2 - 1) * (other**2 - 1)).double().mean())) < SURE * 2 / math.sqrt(n)
    assert float((one == other).double().mean()) < 1e-3


def test_elements_of_a_sample_are_independent():
    z = normal(0, torch.arange(20_000), (8,), dtype=torch.float64)
    correlation = (z.T @ z / len(z) - torch.eye(8)).abs()
    correlation[range(8), range(8)] /= math.sqrt(2)  # Var z^2 = 2
    assert float(correlation.max()) < SURE / math.sqrt(len(z))


# --- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_split_order_and_rows_change_no_bit(shape, dtype):
    ids = torch.arange(64)
    whole = normal(7, ids, shape, row=2, dtype=dtype)
    assert whole.shape == (64, *shape) and whole.dtype == dtype
    assert torch.equal(
        whole, torch.cat([normal(7, ids[k : k + 5], shape, row=2, dtype=dtype) for k in range(0, 64, 5)])
    )
    assert torch.equal(whole, normal(7, ids.flip(0), shape, row=2, dtype=dtype).flip(0))
    assert torch.equal(whole, normal(7, ids.int(), shape, row=torch.full((64,), 2), dtype=dtype))
    mixed = normal(7, ids, shape, row=ids % 3, dtype=dtype)
    assert torch.equal(mixed[2::3], whole[2::3]) and not torch.equal(mixed[:2], whole[:2])


def test_a_shorter_sample_begins_as_a_longer_one():
    ids = torch.arange(3)
    assert torch.equal(normal(0, ids, (5,)), normal(0, ids, (64,))[:, :5])
    assert torch.equal(normal(0, ids, (2, 3)), normal(0, ids, (6,)).reshape(3, 2, 3))


def test_precisions_see_the_same_draw():
    ids = torch.arange(3)
    assert torch.equal(normal(0, ids, (9,), dtype=torch.float64).float(), normal(0, ids, (9,)))


def test_starting_noise_is_a_stream_of_its_own():
    ids = torch.tensor([5, 0])
    assert torch.equal(starting_noise(3, ids, (4,)), normal(3, ids, (4,), stream=START))
    assert torch.equal(starting_noise(3, 6, (4,))[ids], starting_noise(3, ids, (4,)))
    assert starting_noise(0, 0, (4,)).shape == (0, 4)


def test_seeds_of_64_bits():
    ids = torch.arange(2)
    drawn = [normal(seed, ids, (4,)) for seed in (0, 2**31, 2**32, 2**63, 2**64 - 1, np.uint64(2**64 - 1))]
    assert torch.equal(drawn[-1], drawn[-2])
    assert not any(torch.equal(a, b) for k, a in enumerate(drawn[:-1]) for b in drawn[:k])


@pytest.mark.parametrize("seed", [-1, 2**64, 0.0, "0", None, True, torch.tensor(0.5)])
def test_seeds_that_are_none(seed):
    with pytest.raises(ValueError, match="seed must be an int in 0 .. 2\\^64 - 1"):
        normal(seed, torch.arange(2), (4,))


@pytest.mark.parametrize(
    "ids",
    [torch.tensor([-1]), torch.tensor([2**32]), torch.tensor([0.5]), torch.tensor([[1]]), [1, 2], True, -1],
)
def test_ids_that_are_none(ids):
    with pytest.raises(ValueError, match="ids must"):
        starting_noise(0, ids, (4,))
