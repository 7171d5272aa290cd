"""Particles on chains whose normaliser is a product of matrices, and what a step does to a whole state."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.samplers import deis, grids, init, starting_noise, step
from fewstep.samplers import smc as smc
from fewstep.samplers.noise import uniform
from fewstep.samplers.resampling import SCHEMES

KERNEL = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
POTENTIAL = torch.tensor(
    [[0.2, 1.0, 3.0], [2.0, 0.1, 0.5], [0.3, 4.0, 0.2], [1.0, 0.5, 2.5]], dtype=torch.float64
)
STEPS = len(POTENTIAL)


def exact() -> tuple[float, torch.Tensor]:
    """The normaliser and the last law, by the forward recursion."""
    mass = torch.full((3,), 1 / 3, dtype=torch.float64)
    for row in range(STEPS):
        mass = (mass @ KERNEL) * POTENTIAL[row]
    return float(mass.sum()), mass / mass.sum()


def clouds(groups: int, particles: int, **options):
    ids = torch.arange(groups * particles)

    def move(x, row):
        u = uniform(1, ids, 1, row)
        x = (u > KERNEL[x].cumsum(-1)).sum(-1).clamp_max(2)
        return x, POTENTIAL[row][x].log()

    start = (uniform(1, ids, 1, 1000)[:, 0] * 3).long()
    return smc.run(move, start, STEPS, particles=particles, seed=3, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("when", [0.0, 0.5, 1.0, (0, 2)])
def test_the_normaliser_is_unbiased_and_the_law_right(scheme, when):
    groups, particles = 1000, 16
    end, seen = clouds(groups, particles, scheme=scheme, when=when)
    z, law = exact()
    ratio = end.log_z.exp() / z
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(groups)
    # an unbiased estimate of unnormalised masses: weights times the normaliser
    weights = (end.log_weights + end.log_normaliser[:, None]).exp() / particles
    mass = torch.stack([(weights * (end.state.reshape(groups, -1) == k)).sum(-1) for k in range(3)])
    error = mass.std(-1) / math.sqrt(groups)
    assert ((mass.mean(-1) - z * law).abs() < 4 * error).all()
    flat = torch.stack([(end.state == k).double().mean() for k in range(3)])  # the control: weights left out
    if when != 1.0:
        assert ((flat - law).abs() > 0.02).any()
    if when == 0.0:
        assert not seen.resampled.any() and (end.distinct == particles).all()
    if when == (0, 2):
        assert torch.equal(seen.resampled.all(-1), torch.tensor([True, False, True, False]))


def test_resampling_only_where_the_effective_size_has_fallen():
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    cloud = smc.init(torch.arange(8.0)[:, None], 4)
    after, info = smc.step(cloud, weights.flatten())
    assert info.resampled.tolist() == [False, True]
    assert torch.equal(after.state[:4, 0], torch.arange(4.0)) and (after.state[4:, 0] == 7).sum() >= 3
    assert after.log_weights[1].tolist() == [0.0] * 4 and after.distinct.tolist()[0] == 4
    assert math.isclose(after.log_normaliser[1], math.log((3 + math.exp(5)) / 4), rel_tol=1e-12)
    kept, info = smc.step(cloud, weights, active=False)
    assert not info.resampled.any() and torch.equal(kept.log_weights, weights.double())


def test_a_whole_sampler_state_is_taken_and_slots_keep_their_ids():
    d = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 2.0]], 0.3).denoiser(paths.edm())
    table = deis(d.path, grids.karras(d.path, 6), order=3)
    state = init(table, starting_noise(0, 6, (2,), torch.float64))
    for _ in range(3):
        state, _ = step(d, table, state)
    index = torch.tensor([4, 4, 0, 5, 5, 5])
    taken = smc.take({"sampler": state, "reward": state.x[:, 0], "name": "r"}, index)
    clone = taken["sampler"]
    assert torch.equal(clone.ids, state.ids) and taken["name"] == "r"
    assert torch.equal(taken["reward"], state.x[index, 0])
    for got, had in zip((clone.x, *clone.d), (state.x, *state.d), strict=True):
        assert (got is None and had is None) or torch.equal(got, had[index])
    on, _ = step(d, table, clone)
    wanted, _ = step(d, table, state)
    assert torch.equal(on.x, wanted.x[index])


def test_one_draw_a_group_follows_the_weights_and_is_the_first_where_they_are_equal():
    groups = 20_000
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log().expand(groups, 3)
    cloud = smc.init(torch.zeros(3 * groups, 1), 3)
    assert torch.equal(smc.pick(cloud), 3 * torch.arange(groups))
    drawn = smc.pick(cloud._replace(log_weights=weights)) % 3
    share = torch.bincount(drawn) / groups
    assert ((share - torch.tensor([0.5, 0.2, 0.3])).abs() < 5 * math.sqrt(0.25 / groups)).all()


def test_nothing_waits_for_a_device():
    """On tensors without data whoever looks at a value raises."""
    cloud = smc.init(torch.zeros(12, 2), 4)
    there = smc.Particles(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in cloud))
    for scheme in SCHEMES:
        for when in (0.5, (0,)):
            after, _ = smc.step(there, torch.zeros(12, device="meta"), scheme=scheme, when=when)
            assert after.state.shape == (12, 2) and after.log_z.shape == (3,)
    with pytest.raises(RuntimeError):
        smc.check_alive(smc.Info(after.log_z, after.log_z, after.log_z))  # the control: this does look


def test_bad_input_is_named():
    cloud = smc.init(torch.zeros(6, 2), 3)
    with pytest.raises(ValueError, match=r"log_potentials must be one number a particle, \(6,\) or \(2, 3\)"):
        smc.step(cloud, torch.zeros(5))
    with pytest.raises(ValueError, match="when must be a share"):
        smc.step(cloud, torch.zeros(6), when=1.5)
    with pytest.raises(ValueError, match="scheme must be one of"):
        smc.step(cloud, torch.zeros(6), scheme="bootstrap")
    with pytest.raises(ValueError, match="state must hold a multiple of 4 particles, got 6"):
        smc.init(torch.zeros(6, 2), 4)
    with pytest.raises(TypeError, match="state must hold a tensor"):
        smc.init("nothing", 4)


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_a_group_without_weights_is_named(bad):
    def move(x, row):
        potentials = torch.zeros(2, 3)
        potentials[1] = bad if row == 1 else 0.0
        return x, potentials

    with pytest.raises(ValueError, match="left group 1 without any weight at step 1"):
        smc.run(move, torch.zeros(6, 1), 3, particles=3)
    with_one_left = torch.tensor([-math.inf, 0.0, -math.inf])
    end, _ = smc.run(lambda x, row: (x, with_one_left), torch.arange(3.0)[:, None], 2, particles=3)
    assert (end.state == 1).all() and end.distinct.tolist() == [1]
