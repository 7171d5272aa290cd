"""Ten million draws: uniform, normal, and independent across lanes, elements, samples, rows and seeds.

Each statistic is asymptotically normal; SURE standard errors fail by chance once in 1.7 million seeds, and the seed is
fixed. The kernel draws the same words, and the same normals within 3e-6 (tests/interpreter/test_philox.py).
"""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.kernels.philox import reference, words

SURE = 5.0
MANY = 10_000_000
ROWS, PER = 10, 1_000_000  # as (row, element), sample by sample below

pytestmark = pytest.mark.slow


def draw(row, seed=3, id=0):
    return reference(torch.tensor([seed]), torch.tensor([id]), PER, torch.tensor([row]), 0)[0]


@pytest.fixture(scope="module")
def normals():
    return torch.stack([draw(row) for row in range(ROWS)])


def chi_square(counts):
    """How many standard errors a chi-square of equally likely bins lies from its mean."""
    expected = float(counts.sum()) / len(counts)
    statistic, free = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    return (statistic - free) / math.sqrt(2 * free)


def test_words_are_uniform():
    """Of every word the upper and the lower 12 bits, and pairs of words, in 4096 bins."""
    one = torch.tensor([0])
    drawn = [torch.cat(w) for w in zip(*(
        [v[0] for v in words(torch.tensor([3]), one, MANY // 4 // ROWS, torch.tensor([row]), 0)] for row in range(ROWS)
    ))]  # fmt: skip
    for word in drawn:
        for bits in (word >> 20, word & 0xFFF, (word >> 10) & 0xFFF):
            assert abs(chi_square(torch.bincount(bits, minlength=4096).double())) < SURE
    for k in range(4):
        pair = (drawn[k] >> 26 << 6) | (drawn[(k + 1) % 4] >> 26)
        assert abs(chi_square(torch.bincount(pair, minlength=4096).double())) < SURE
    tilted = (drawn[0] >> 20).float().mul(1 - 1e-3).long()
    assert abs(chi_square(torch.bincount(tilted, minlength=4096).double())) > SURE


def test_normals_are_normal(normals):
    """Dvoretzky-Kiefer-Wolfowitz: P(sup |F_n - F| > e) <= 2 exp(-2 n e^2), here one in a billion; and moments."""
    ordered = normals.flatten().sort().values.double()
    expected, steps = torch.special.ndtr(ordered), torch.arange(MANY + 1, dtype=torch.float64) / MANY
    distance = max(float((expected - steps[:-1]).max()), float((steps[1:] - expected).max()))
    bound = math.sqrt(math.log(2e9) / (2 * MANY))
    assert distance < bound
    assert float((torch.special.ndtr(ordered + 0.004) - steps[:-1]).abs().max()) > bound
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((ordered**power).mean()) - mean) < SURE * math.sqrt(variance / MANY)
    assert float(ordered.abs().max()) <= math.sqrt(2 * 24 * math.log(2)) < 5.77
    for level in (3.0, 4.0, 5.0):
        tail = math.erfc(level / math.sqrt(2))
        assert abs(float((ordered.abs() > level).double().mean()) - tail) < SURE * math.sqrt(tail / MANY)


def test_normals_are_independent(normals):
    """No correlation of values or squares at lags within a draw, across draws, rows, seeds and samples."""
    z = normals.double()
    pairs = {f"lag {k}": (z[:, :-k], z[:, k:]) for k in (1, 2, 3, 4, 8, 64)}
    pairs["rows"] = (z[:-1], z[1:])
    pairs["seeds"] = (z[:1], draw(0, seed=4).double()[None])
    pairs["high seeds"] = (z[:1], draw(0, seed=3 + 2**32).double()[None])
    pairs["samples"] = (z[:1], draw(0, id=1).double()[None])
    for name, (a, b) in pairs.items():
        n = a.numel()
        assert abs(float((a * b).mean())) < SURE / math.sqrt(n), name
        assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) < SURE * 2 / math.sqrt(n), name
    lanes = z.reshape(-1, 4)
    assert float(
        (lanes.T @ lanes / len(lanes) - torch.eye(4)).abs().fill_diagonal_(0).max()
    ) < SURE / math.sqrt(len(lanes))
