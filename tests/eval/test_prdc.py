"""Precision, recall, density and coverage against their definitions, by brute force."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.eval import prdc


def brute(ours: torch.Tensor, theirs: torch.Tensor, k: int) -> tuple[float, float, float, float]:
    samples, real = ours.double().tolist(), theirs.double().tolist()

    def radius(points, i):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    r = [radius(real, i) for i in range(len(real))]
    s = [radius(samples, j) for j in range(len(samples))]
    inside = [[math.dist(y, x) <= r[i] for i, x in enumerate(real)] for y in samples]
    return (
        sum(any(row) for row in inside) / len(samples),
        sum(any(math.dist(x, y) <= s[j] for j, y in enumerate(samples)) for x in real) / len(real),
        sum(sum(row) for row in inside) / (k * len(samples)),
        sum(any(inside[j][i] for j in range(len(samples))) for i in range(len(real))) / len(real),
    )


def normal(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_the_definitions(shift, k, chunk):
    samples, real = normal(41, 3, 0) * 1.3 + shift, normal(67, 3, 1)
    assert tuple(prdc(samples, real, k, chunk)) == pytest.approx(brute(samples, real, k), abs=1e-12)


def test_borders_and_repetitions_are_inside():
    # Whole numbers far from the origin: every distance is met many times over, and products are off by rounding.
    draw = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 3, (30, 3), generator=draw).double() + 1e6
    real = torch.randint(0, 3, (40, 3), generator=draw).double() + 1e6
    assert tuple(prdc(samples, real, 2)) == pytest.approx(brute(samples, real, 2), abs=1e-12)
    x = normal(50, 4, 2)
    same = prdc(x, x, k=4)
    assert same == (1.0, 1.0, (4 + 1) / 4, 1.0)  # each closed ball holds its centre and k others


def test_a_model_that_drops_a_mode_has_precision_and_no_recall():
    real = torch.cat([normal(100, 2, 0), normal(100, 2, 1) + 20])
    samples = normal(200, 2, 2)
    found = prdc(samples, real)
    assert found.precision > 0.9 and found.density > 0.8
    assert found.recall < 0.55 and found.coverage < 0.55


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="real has 3 rows; k = 3 needs at least 4"):
        prdc(normal(10, 2, 0), normal(3, 2, 1))
    with pytest.raises(ValueError, match="real has 3 dimensions; expected 2"):
        prdc(normal(10, 2, 0), normal(10, 3, 1))
    with pytest.raises(ValueError, match="samples has NaN"):
        prdc(normal(10, 2, 0) * torch.nan, normal(10, 2, 1))
