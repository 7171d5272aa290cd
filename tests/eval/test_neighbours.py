"""Nearest neighbours against brute force, and samplers that copy, generalise and fail."""

from __future__ import annotations

import pytest
import torch

from fewstep.eval import memorisation, nearest


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def brute_force(x, reference, k):
    return (x[:, None] - reference).square().sum(dim=2).sqrt().sort(dim=1).values[:, :k]


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_equal_to_brute_force(k, chunk):
    x, reference = normal(50, 6), normal(90, 6, seed=1)
    found = nearest(x, reference, k, chunk)
    assert torch.allclose(found.distance, brute_force(x, reference, k), rtol=1e-13, atol=0)
    assert torch.allclose((x[:, None] - reference[found.index]).norm(dim=2), found.distance, rtol=1e-13)


def test_all_of_the_reference():
    x, reference = normal(4, 2), normal(6, 2, seed=1)
    assert torch.allclose(nearest(x, reference, 6).distance, brute_force(x, reference, 6), rtol=1e-13)


def test_rows_that_rounding_hides():
    # A thousand rows closer together than the matrix product resolves (|x|^2 eps = 1e-9 against gaps of
    # 1e-14 in the squares): the product cannot order them, and the distances must still be right.
    centre = 1000 * torch.ones(1, 5, dtype=torch.float64)
    cloud = centre + 1e-7 * normal(1000, 5)
    reference = torch.cat([cloud, -cloud])
    found = nearest(cloud[:20] + 1e-8, reference, 2)
    assert torch.allclose(found.distance, brute_force(cloud[:20] + 1e-8, reference, 2), rtol=1e-5)
    product = cloud[:20].square().sum(1)[:, None] + reference.square().sum(1) - 2 * cloud[:20] @ reference.T
    assert (
        product.argmin(dim=1) != torch.arange(20)
    ).sum() > 10  # alone, it does not even find the row itself
    assert torch.equal(nearest(cloud, reference).distance, torch.zeros(1000, 1, dtype=torch.float64))


def test_a_sampler_that_copies_its_training_set():
    data = normal(600, 4)
    train, held_out = data[:400], data[400:]
    copies = memorisation(train[torch.arange(0, 400, 3)], train, held_out)
    assert copies.samples == 0 and copies.closer == 1 and copies.held_out > 0.1
    nearly = memorisation(train[:150] + 0.01 * normal(150, 4, seed=2), train, held_out)
    assert nearly.samples < 0.1 * nearly.held_out and nearly.closer == 1


def test_samplers_that_generalise_and_that_fail():
    data = normal(600, 4)
    train, held_out = data[:300], data[300:]
    honest = memorisation(normal(300, 4, seed=2), train, held_out)
    # closer compares with a median of 300: its standard error is sqrt(2) * 0.5 / sqrt(300) = 0.041; four.
    assert abs(honest.closer - 0.5) < 0.17
    assert honest.samples == pytest.approx(honest.held_out, rel=0.25)
    bad = memorisation(3 * normal(300, 4, seed=2), train, held_out)
    assert bad.samples > 2 * bad.held_out and bad.closer < 0.2


def test_bad_input_is_named():
    x = normal(5, 3)
    with pytest.raises(ValueError, match="k is 6 but reference has 5 rows"):
        nearest(x, x, 6)
    with pytest.raises(ValueError, match="k is 0; expected a whole number"):
        nearest(x, x, 0)
    with pytest.raises(ValueError, match="train has 2 dimensions; expected 3"):
        memorisation(x, x[:, :2], x)
    with pytest.raises(ValueError, match="held_out has 0 rows"):
        memorisation(x, x, x[:0])
    with pytest.raises(ValueError, match="samples has NaN or infinity"):
        memorisation(x * float("inf"), x, x)
