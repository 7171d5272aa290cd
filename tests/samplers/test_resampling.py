"""Resampling: expectations exact or within five standard errors, what may be counted counted, groups alone."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.samplers.noise import uniform
from fewstep.samplers.resampling import SCHEMES, ess, log_mean_exp, resample, systematic

WEIGHTS = torch.tensor([0.02, 0.31, 0.0, 0.125, 0.3, 0.045, 0.2], dtype=torch.float64)
K = len(WEIGHTS)


def counts(index: torch.Tensor, count: int = K) -> torch.Tensor:
    return torch.nn.functional.one_hot(index, count).sum(-2).double()


def drawn(scheme: str, log_weights: torch.Tensor, groups: int, seed: int = 0) -> torch.Tensor:
    return resample(log_weights.expand(groups, -1), torch.arange(groups), 0, seed, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_particle_stands_as_often_as_its_weight_says(scheme):
    groups = 40_000
    seen = counts(drawn(scheme, WEIGHTS.log(), groups))
    error = (seen.var(0) / groups).sqrt()
    assert ((seen.mean(0) - K * WEIGHTS).abs() <= 5 * error + 1e-12).all()
    assert (seen[:, WEIGHTS == 0] == 0).all() and (seen.sum(-1) == K).all()
    wrong = torch.roll(K * WEIGHTS, 1)  # the control: other weights are told apart
    assert ((seen.mean(0) - wrong).abs() > 5 * error + 1e-12).any()


def test_systematic_stands_floor_or_ceil_times_and_is_exact_over_u():
    u = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    seen = counts(systematic(WEIGHTS.log().expand(1000, -1), u))
    expected = K * WEIGHTS
    assert ((seen >= expected.floor()) & (seen <= expected.ceil())).all()
    assert ((seen.mean(0) - expected).abs() <= 1e-3).all()  # a midpoint rule on a step function


def test_systematic_differs_least_and_multinomial_most():
    values = torch.linspace(-1, 1, 64, dtype=torch.float64)
    log_weights = -3 * (values - 0.3) ** 2
    spread = {scheme: values[drawn(scheme, log_weights, 4000)].mean(-1).var() for scheme in SCHEMES}
    assert 20 * spread["systematic"] < spread["multinomial"]
    assert spread["stratified"] < spread["residual"] < spread["multinomial"]
    p = log_weights.softmax(-1)
    exact = ((p * values**2).sum() - (p * values).sum() ** 2) / 64
    assert abs(spread["multinomial"] / exact - 1) < 5 * math.sqrt(2 / 4000)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "multinomial"])
@pytest.mark.parametrize("count", [1, 2, 7, 49, 1000])
def test_equal_weights_change_nothing(scheme, count):
    index = drawn(scheme, torch.full((count,), -3.7, dtype=torch.float64), 16)
    assert torch.equal(index, torch.arange(count).expand(16, -1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_group_is_resampled_alike_in_any_batch(scheme):
    log_weights = torch.randn(6, 33, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([5, 900, 0, 31, 2, 77])
    together = resample(log_weights, ids, 4, 1, scheme)
    alone = torch.cat([resample(log_weights[k : k + 1], ids[k : k + 1], 4, 1, scheme) for k in range(6)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, resample(log_weights, ids, 5, 1, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_particle_with_all_the_weight_takes_every_place(scheme):
    log_weights = torch.full((1, 9), -math.inf)
    log_weights[0, 4] = -1e4  # far below what exp can hold
    assert (resample(log_weights, torch.tensor([3]), 0, 0, scheme) == 4).all()


def test_birth_death_is_the_jump_process_of_small_weights():
    d = torch.tensor([0.02, -0.05, 0.01, 0.04, -0.03, 0.01], dtype=torch.float64)  # log-weights of mean 0
    groups = 200_000
    index = drawn("birth_death", d, groups)
    moved = (index != torch.arange(6)).double().mean(0)
    rates = (-d).clamp_min(0)  # die at rate max(0, -d), be born in proportion to max(0, d)
    assert ((moved - rates).abs() <= d**2 + 5 * (rates / groups).sqrt() + 1e-3).all()
    heirs = counts(torch.where(index != torch.arange(6), index, 2), 6)[:, [0, 3]].mean(0)
    assert abs(heirs[1] / heirs[0] - 2) < 0.2  # 0.04 against 0.02


def test_effective_size_and_mean():
    log_weights = torch.log(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]).double()) - 800
    assert torch.allclose(ess(log_weights), torch.tensor([36 / 14, 3.0], dtype=torch.float64), rtol=1e-10)
    assert torch.allclose(
        log_mean_exp(log_weights), torch.tensor([2.0, 1.0], dtype=torch.float64).log() - 800
    )


def test_uniforms_of_resampling_are_not_those_of_users():
    index = resample(torch.zeros(1, 50).index_fill(1, torch.arange(25), 1.0), torch.tensor([0]), 2, 0)
    u = uniform(0, torch.tensor([0]), 1, 2)
    assert not torch.equal(index, systematic(torch.zeros(1, 50).index_fill(1, torch.arange(25), 1.0), u))


def test_what_is_not_a_scheme_is_refused():
    with pytest.raises(ValueError, match="scheme must be one of systematic, .* got 'bootstrap'"):
        resample(torch.zeros(1, 3), torch.tensor([0]), scheme="bootstrap")
    with pytest.raises(ValueError, match="log_weights must have shape"):
        resample(torch.zeros(3), torch.tensor([0]))
