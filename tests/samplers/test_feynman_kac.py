"""Weighted particles against closed forms: rates by automatic differentiation, laws, normalisers, plain sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewstep.models import GaussianMixture, load, paths
from fewstep.samplers import cfg, ddim, deis, grids, heun, sample, sde_dpmpp, starting_noise, targets
from fewstep.samplers.feynman_kac import feynman_kac
from fewstep.samplers.feynman_kac_rates import log_rate

A = GaussianMixture([0.3, 0.7], [[-2.0], [1.5]], [0.16, 0.49])
B = GaussianMixture([0.6, 0.4], [[-1.0], [2.0]], [0.64, 0.25])
P = GaussianMixture([0.3, 0.7], [[-2.0, 0.0], [1.5, 1.0]], [[0.2, 0.5], [0.6, 0.3]])
Q = GaussianMixture([0.5, 0.5], [[-1.0, 0.4], [1.0, 0.0]], 0.4)
ONE = GaussianMixture([1.0], [[0.5, -1.0]], [[0.7, 1.3]])


def unit(groups, dim=1, seed=0):
    return starting_noise(seed, groups, (dim,), torch.float64)


def mass(x, w):
    return (w * (x[..., 0] < 0)).sum(-1)


def below_zero(mixture):
    scale = (2 * mixture.covs[:, 0, 0]).sqrt()
    return float((mixture.weights * 0.5 * torch.erfc(mixture.means[:, 0] / scale)).sum())


def within(values, truth, allowed=0.0, errors=3.0):
    se = values.std() / len(values) ** 0.5
    return bool((values.mean() - truth).abs() <= allowed + errors * se)


# --- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", ["target", "transport"])
@pytest.mark.parametrize("powers", [(2.0, 1.0), (1.0, 1.0), (-1.0, 2.0), (0.5, 0.5), (3.0, -0.5)])
def test_the_rate_is_the_equation_that_the_density_obeys(powers, drift):
    """G = d log pi / d lam + div u + u . S  at fixed y = x / alpha, where the drift is dy/d lam = u = -rho E_k."""
    path = paths.edm()
    mixtures, lam, y = (P, Q), 0.3, torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    rho, total = math.exp(-lam), sum(powers)
    k = [b / total if drift == "transport" else b for b in powers]
    ds = [m.denoiser(path, "eps") for m in mixtures]

    def log_density(lam):
        return sum(b * m.log_prob(y, path, (-lam).exp()) for b, m in zip(powers, mixtures, strict=True))

    ages = torch.autograd.functional.jacobian(log_density, torch.tensor(lam, dtype=torch.float64))

    def velocity(x):
        return -rho * sum(b * d.eps(x, rho) for b, d in zip(k, ds, strict=True))

    score = -sum(b * d.eps(y, rho) for b, d in zip(powers, ds, strict=True)) / rho
    trace = torch.stack(
        [torch.autograd.functional.jacobian(lambda v: velocity(v[None])[0], one).trace() for one in y]
    )
    wanted = ages + trace + (velocity(y) * score).sum(-1)
    outputs = [d.raw(y, rho)[0] for d in ds]
    divergence = -trace / rho * total if drift == "transport" else None
    found = log_rate(y, outputs, ds, powers, rho, divergence)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-10)
    if total != 1:  # the control: the other drift has another rate
        other = log_rate(y, outputs, ds, powers, rho, None if drift == "transport" else -trace / rho)
        assert not torch.allclose(other, wanted, rtol=1e-2)


@pytest.mark.parametrize("beta", [0.3, 2.0, 7.5])
def test_one_gaussian_has_equal_weights_under_the_transport_drift(beta):
    d = ONE.denoiser(paths.edm())
    table = sde_dpmpp(d.path, grids.karras(d.path, 8), order=2)
    options = {"target": targets.anneal(beta), "particles": 20, "when": 0.0}
    _, info = feynman_kac(d, unit(2, 2), table, drift="transport", divergence="exact", **options)
    assert float((info.weights - 1 / 20).abs().max()) < 1e-13
    _, info = feynman_kac(d, unit(2, 2), table, drift="target", **options)
    assert float((info.weights - 1 / 20).abs().max()) > 1e-2  # the control


def test_one_gaussian_is_the_plain_sampler_at_another_scale():
    d = ONE.denoiser(paths.flow(), "flow")
    table = deis(d.path, grids.uniform(d.path, 10), order=3)
    x, _ = feynman_kac(d, unit(3, 2), table, target=targets.anneal(4.0), particles=1, drift="transport")
    plain, centre = sample(d, unit(3, 2), table), sample(d, 0 * unit(3, 2), table)
    assert torch.allclose(x, centre + (plain - centre) / 2, rtol=1e-12)


# --- the trivial target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [paths.edm(), paths.vp_linear(), paths.flow()], ids=lambda p: p.name)
def test_trivial_targets_are_plain_sampling_bit_for_bit(path):
    d, times = P.denoiser(path, "v"), grids.vp(path, 6)
    noise, zero = unit(3, 2, 4), lambda x: 0.0 * x[:, 0]
    for table in (
        ddim(path, times),
        ddim(path, times, eta=1.0),
        sde_dpmpp(path, times, order=2),
        heun(path, times),
    ):
        plain = sample(d, noise, table, seed=9)
        for target in (None, targets.anneal(1.0), targets.product(powers=(1.0,)), targets.tilt(zero)):
            for drift in ("target", "transport"):
                x, info = feynman_kac(
                    d,
                    noise,
                    table,
                    target=target,
                    particles=5,
                    drift=drift,
                    when=1.0,
                    seed=9,
                    scheme="residual",
                )
                assert torch.equal(x, plain) and (info.weights == 0.2).all() and not info.resampled.any()
    other, _ = feynman_kac(
        d, noise, table, target=targets.anneal(1.01), particles=5, seed=9, drift="transport"
    )
    assert not torch.equal(other, plain)  # the control


def test_a_networks_trivial_target_is_its_sample():
    d, noise, cond = load("digits-flow"), starting_noise(0, 2, (1, 8, 8)), {"label": torch.tensor([3, 7])}
    table = ddim(d.path, grids.vp(d.path, 5), eta=0.5)
    guided = cfg(d, 2.0)
    nothing = targets.tilt(lambda x: 0 * x.sum((1, 2, 3)))
    x, _ = feynman_kac(guided, noise, table, target=nothing, particles=1, cond=cond)
    assert torch.equal(x, sample(guided, noise, table, cond=cond))
    x, info = feynman_kac(d, noise, table, target=targets.cfg(scale=2.0), particles=3, cond=cond)
    assert torch.isfinite(x).all() and info.calls == 3 * 2 * 5 and x.shape == noise.shape


# --- laws ------------------------------------------------------------------------------------------------------------

LAWS = {
    "anneal": ((A,), targets.anneal(2.0), below_zero(A.power(2)), A.power(2).log_mass),
    "product": ((A, B), targets.product(), below_zero(A.product(B)), A.product(B).log_mass),
    "rlg": (
        (A, A.tilt([-0.5], -0.5)), targets.geometric(2.0), below_zero(A.tilt([-1.0], -1.0)),
        A.tilt([-1.0], -1.0).log_mass - 2 * A.tilt([-0.5], -0.5).log_mass,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_masses_and_normalisers(name):
    mixtures, target, truth, log_z = LAWS[name]
    path = paths.edm(sigma_max=300.0, sigma_min=0.01)
    ds = [m.denoiser(path) for m in mixtures]
    table = sde_dpmpp(path, grids.logsnr(path, 56), order=2)
    options = {"target": target, "particles": 400, "seed": 3}
    _, info = feynman_kac(ds, unit(16, 1, 3), table, drift="transport", divergence="exact", **options)
    assert within(mass(info.particles, info.weights), truth, 0.01)
    ratio = (info.log_normaliser - log_z).exp()
    assert within(ratio, 1.0, 0.01)  # what so many steps leave
    _, info = feynman_kac(ds, unit(16, 1, 3), table, drift="target", **options)
    assert within(mass(info.particles, info.weights), truth, 0.05)
    # the control: without weights, whatever the drift
    for drift in ("target", "transport"):
        _, info = feynman_kac(ds, unit(16, 1, 3), table, drift=drift, when=0.0, **options)
        found = mass(info.particles, torch.full_like(info.weights, 1 / 400))
        assert not within(found, truth)


@pytest.mark.parametrize("gradient", ["none", "half", "full"])
@pytest.mark.parametrize("of", [None, targets.anneal(2.0)], ids=["plain", "annealed"])
def test_rewards_tilt(gradient, of):
    def reward(x):
        return -x[:, 0] - 0.5 * x[:, 0] ** 2

    base = A if of is None else A.power(2)
    exact = base.tilt([-1.0], -1.0)
    d = A.denoiser(paths.edm(sigma_max=300.0, sigma_min=0.01))
    table = sde_dpmpp(d.path, grids.logsnr(d.path, 72), order=2)
    target = targets.tilt(reward, of=of, gradient=gradient)
    options = {"target": target, "particles": 400, "seed": 5, "drift": "transport", "divergence": "exact"}
    _, info = feynman_kac(d, unit(16, 1, 5), table, **options)
    found = mass(info.particles, info.weights)
    assert within(found, below_zero(exact), 0.01)
    ratio = (info.log_normaliser - exact.log_mass - (0 if of is None else base.log_mass)).exp()
    assert within(ratio, 1.0, 0.02)
    _, zeroed = feynman_kac(d, unit(16, 1, 5), table, **{**options, "when": 0.0})
    flat = mass(zeroed.particles, torch.full_like(zeroed.weights, 1 / 400))
    assert (flat.mean() - below_zero(exact)).abs() > 10 * flat.std() / 4


def test_what_is_left_halves_with_the_step_and_quarters_at_second_order():
    d = A.denoiser(paths.edm(sigma_max=1000.0, sigma_min=0.01))
    options = {
        "target": targets.anneal(2.0),
        "particles": 12_000,
        "drift": "transport",
        "divergence": "exact",
    }
    options["when"] = 0.0

    def bias(steps, second):
        times = grids.logsnr(d.path, steps)
        table = sde_dpmpp(d.path, times, order=2) if second else ddim(d.path, times, eta=1.0)
        quadrature = "trapezoid" if second else "left"
        _, info = feynman_kac(d, unit(1, 1, 1), table, quadrature=quadrature, **options)
        return float((info.log_normaliser - A.power(2).log_mass).exp()) - 1

    # one run's standard error is 0.003
    first = bias(24, False), bias(48, False)
    assert first[0] > 0.08 and 1.7 < first[0] / first[1] < 3.0
    second = bias(16, True), bias(32, True)
    assert second[0] < -0.05 and 2.6 < second[0] / second[1] < 6.5


def test_the_papers_weights_of_half_a_gradient_are_of_first_order():
    d, exact = A.denoiser(paths.edm(sigma_max=300.0, sigma_min=0.01)), A.tilt([-1.0], -1.0)

    def bias(steps, quadrature):
        target = targets.tilt(lambda x: -x[:, 0] - 0.5 * x[:, 0] ** 2, gradient="half")
        table = ddim(d.path, grids.logsnr(d.path, steps), eta=1.0)
        _, info = feynman_kac(d, unit(1, 1, 1), table, target=target, particles=8000, quadrature=quadrature)
        return float((info.log_normaliser - exact.log_mass).exp()) - 1

    # one run's standard error is 0.01
    left = bias(20, "left"), bias(40, "left")
    assert left[0] < -0.1 and 1.4 < left[0] / left[1] < 3.0
    assert abs(bias(20, "trapezoid")) < 0.05


def test_what_random_probes_do_to_the_mean_weight_is_taken_off_by_two():
    """Two modes on the diagonal of three dimensions: the Jacobian is far from diagonal."""
    means = torch.tensor([[1.5], [-1.5]]).double().expand(2, 3)
    d = GaussianMixture([0.5, 0.5], means, 0.3).denoiser(paths.edm(sigma_max=100.0))
    table = sde_dpmpp(d.path, grids.logsnr(d.path, 24, t_min=0.02), order=2)

    def normaliser(divergence):
        options = {"target": targets.anneal(3.0), "drift": "transport", "particles": 250}
        _, info = feynman_kac(d, unit(16, 3), table, divergence=divergence, **options)
        return info.log_normaliser.exp()

    exact, one, two = normaliser("exact"), normaliser(1), normaliser(2)
    se = math.hypot(float(exact.std()), float(two.std())) / 4
    assert abs(float(two.mean() - exact.mean())) < 3 * se
    assert float(one.mean() - exact.mean()) > 8 * se


def variance_of(drift, rho, v, power):
    """Of ancestral steps on one Gaussian's power by itself: E = power * rho (x - m) / (v + rho^2), and noise z."""
    share, noise = {
        "target": (power, 1.0), "tempered": ((1 + power) / 2, power**-0.5), "transport": (1.0, power**-0.5)
    }[drift]  # fmt: skip
    found = rho[0] ** 2 / power
    for now, then in zip(rho[:-1], rho[1:], strict=True):
        to_clean = share * now * now / (v + now * now)  # x - x0 over x - m
        rest = (then / now) ** 2
        found = found * (1 - (1 - rest) * to_clean) ** 2 + (noise * then) ** 2 * (1 - rest)
    return found


@pytest.mark.parametrize("drift", ["target", "tempered", "transport"])
def test_the_root_of_one_gaussian_under_each_drift(drift):
    """Unweighted the SDEs end at three variances, by solving theirs: v (2 + log(w / v)) for w = v + rho^2 at the start,
    v / B^2 and v / B; weighted all at the last. (A power above 1 the first two leave too narrow to be weighed well.)"""
    v, power = 0.8, 0.5
    end = {
        "target": v * (2 + math.log((v + 200.0**2) / v)),
        "tempered": v / power**2,
        "transport": v / power,
    }[drift]
    assert variance_of(drift, np.geomspace(200.0, 1e-3, 20_000), v, power) == pytest.approx(end, rel=4e-3)
    d = GaussianMixture([1.0], [[0.5]], v).denoiser(paths.edm(sigma_max=200.0, sigma_min=0.01))
    table = ddim(d.path, grids.logsnr(d.path, 30), eta=1.0)
    options = {"target": targets.anneal(power), "drift": drift, "particles": 250, "divergence": "exact"}
    _, info = feynman_kac(d, unit(16), table, when=0.0, **options)
    wanted = variance_of(drift, d.path.rho(table.times), v, power)
    assert float(info.particles.var()) == pytest.approx(wanted, rel=3 * (2 / 4000) ** 0.5)
    table = sde_dpmpp(d.path, grids.logsnr(d.path, 60), order=2)
    _, info = feynman_kac(d, unit(16), table, **options)
    weighted = (info.weights * (info.particles[..., 0] - 0.5).square()).sum(-1)
    assert within(weighted, v / power, 0.05)
    log_z = 0.25 * math.log(2 * math.pi * v) - 0.5 * math.log(power)
    assert within((info.log_normaliser - log_z).exp(), 1.0, 0.02)


def test_the_tempered_drift_wants_the_reverse_noise():
    d, noise = P.denoiser(paths.flow(), "flow"), unit(2, 2)
    times = grids.uniform(d.path, 12, t_max=0.99)
    options = {"target": targets.anneal(1.5), "drift": "tempered", "particles": 4}
    for table in (ddim(d.path, times, eta=1.0), sde_dpmpp(d.path, times, order=2)):
        x, _ = feynman_kac(d, noise, table, **options)
        assert torch.isfinite(x).all()
    for table in (ddim(d.path, times, eta=0.5), heun(d.path, times)):
        bad(
            "table must draw the reverse SDE's own noise", lambda t=table: feynman_kac(d, noise, t, **options)
        )
    # where B = 1 there is nothing to temper
    same = [
        feynman_kac(d, noise, ddim(d.path, times, eta=0.5), drift=drift, particles=3)[0]
        for drift in ("target", "tempered", "transport")
    ]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


def test_paths_and_predictions_change_nothing():
    rho = np.append(np.geomspace(50.0, 0.02, 20), 0.0)
    for target, ds in ((targets.product(2.0), (P, Q)), (targets.geometric(3.0), (P, P.tilt([0.3, 0.1])))):
        for drift in ("target", "transport"):
            seen = []
            for path, predicts in ((paths.edm(), "x0"), (paths.vp_linear(), "eps"), (paths.flow(), "flow")):
                table = ddim(path, np.append(path.time_of_rho(rho[:-1]), path.t_clean), eta=0.7)
                models = [m.denoiser(path, p) for m, p in zip(ds, (predicts, "score"), strict=True)]
                _, info = feynman_kac(
                    models, unit(2, 2), table, target=target, particles=16, drift=drift, when=0.9
                )
                seen.append(info)
            for info in seen[1:]:
                assert torch.allclose(info.particles, seen[0].particles, rtol=1e-8, atol=1e-8)
                assert torch.allclose(info.weights, seen[0].weights, rtol=1e-7, atol=1e-10)
                assert torch.allclose(info.log_normaliser, seen[0].log_normaliser, rtol=1e-8, atol=1e-8)


def test_a_flow_may_open_at_pure_noise_with_the_transport_drift():
    path = paths.flow()
    d, table = A.denoiser(path, "flow"), sde_dpmpp(path, grids.logsnr(path, 80), order=2)
    options = {"target": targets.anneal(2.0), "particles": 500}
    _, info = feynman_kac(d, unit(16), table, drift="transport", divergence="exact", **options)
    assert within(mass(info.particles, info.weights), below_zero(A.power(2)), 0.02)
    assert within((info.log_normaliser - A.power(2).log_mass).exp(), 1.0, 0.02)
    with pytest.raises(ValueError, match="drift='target' cannot open at alpha = 0"):
        feynman_kac(d, unit(2), table, **options)
    feynman_kac(d, unit(2), ddim(path, grids.uniform(path, 5, t_max=0.99), eta=1.0), **options)


# --- groups, conditions, options -------------------------------------------------------------------------------------


def test_groups_are_alone_and_have_conditions_of_their_own():
    d = P.denoiser(paths.edm())
    table = ddim(d.path, grids.karras(d.path, 8), eta=1.0)
    labels, ids = torch.tensor([1, 0, 1]), torch.tensor([7, 3, 12])
    options = {"target": targets.cfg(None, {"label": -1}, 2.0), "particles": 6, "when": 1.0, "seed": 2}
    x, info = feynman_kac(d, unit(3, 2), table, cond={"label": labels}, ids=ids, **options)
    assert info.resampled.any()
    for k in range(3):
        own = {"cond": {"label": labels[k : k + 1]}, "ids": ids[k : k + 1]}
        y, alone = feynman_kac(d, unit(3, 2)[k : k + 1], table, **own, **options)
        assert torch.equal(y[0], x[k]) and torch.equal(alone.particles[0], info.particles[k])
    given = {"target": targets.cfg({"label": labels}, {"label": -1}, 2.0), "ids": ids}
    again, _ = feynman_kac(d, unit(3, 2), table, cond={"label": 0 * labels}, **{**options, **given})
    assert torch.equal(again, x)
    assert (
        len({tuple(row.tolist()) for row in info.particles.flatten(0, 1)}) == 18
    )  # clones went their own ways


@pytest.mark.parametrize("drift", ["target", "transport"])
def test_particles_in_batches_are_the_same_bits(drift):
    seen = []
    models = [P.denoiser(paths.edm()), Q.denoiser(paths.edm(), "eps")]
    for d in models:
        d.call = lambda x, tau, shift=None, inner=d.call: (
            seen.append(len(x)),
            inner(x, tau) + (0 if shift is None else shift[:, None]),
        )[1]
    table = sde_dpmpp(models[0].path, grids.logsnr(models[0].path, 5, t_max=20.0), order=2)
    target = targets.tilt(lambda x: (seen.append(len(x)), -x.square().sum(-1))[1], of=targets.product())
    cond = {"shift": torch.tensor([0.0, 0.1, -0.2], dtype=torch.float64)}
    options = {"target": target, "particles": 6, "drift": drift, "divergence": 2, "when": 1.0, "cond": cond}
    whole, info = feynman_kac(models, unit(3, 2), table, **options)
    assert set(seen) == {18}
    for batch in (1, 5, 6, 100):
        seen.clear()
        x, parts = feynman_kac(models, unit(3, 2), table, batch=batch, **options)
        assert max(seen) == min(batch, 18) and parts.calls == info.calls and parts.passes == info.passes
        assert torch.equal(x, whole) and torch.equal(parts.particles, info.particles)
        assert torch.equal(parts.weights, info.weights) and torch.equal(
            parts.log_normaliser, info.log_normaliser
        )


def test_a_rewards_gradient_in_batches_is_the_same():
    d, table = P.denoiser(paths.edm()), ddim(paths.edm(), grids.logsnr(paths.edm(), 8), eta=1.0)
    target = targets.tilt(lambda x: -x.square().sum(-1), gradient="full")
    whole, batched = (
        feynman_kac(d, unit(2, 2), table, target=target, particles=5, batch=batch)[1].particles
        for batch in (None, 3)
    )
    assert torch.equal(whole, batched)


def test_the_calls_that_are_said_are_the_calls_that_are_made():
    made = []
    d = P.denoiser(paths.edm())
    inner = d.call
    d.call = lambda x, tau, **cond: (made.append(len(x)), inner(x, tau, **cond))[1]
    for table in (ddim(d.path, grids.karras(d.path, 4), eta=1.0), heun(d.path, grids.karras(d.path, 4))):
        for target, drift, models in (
            (targets.anneal(2.0), "target", d),
            (targets.product(), "transport", [d, d]),
        ):
            made.clear()
            _, info = feynman_kac(models, unit(2, 2), table, target=target, particles=3, drift=drift)
            assert sum(made) == 2 * info.calls, (table.solver, drift)
            assert info.passes == (3 * 4 if drift == "transport" else 0)


def test_resampling_may_be_kept_to_an_interval_and_weights_are_kept_in_full():
    d = A.denoiser(paths.edm())
    table = sde_dpmpp(d.path, grids.logsnr(d.path, 40, t_min=0.01), order=2)
    options = {"target": targets.product(powers=(1.5,)), "particles": 400, "when": 1.0}
    _, info = feynman_kac(d, unit(16), table, interval=(0.1, 2.0), **options)
    rho = d.path.rho(table.times)[1:]
    inside = torch.tensor((rho > 0.1) & (rho <= 2.0))
    assert torch.equal(info.resampled.any(-1), inside)
    p = torch.linspace(-8, 8, 20001)[:, None].double()
    density = (1.5 * A.log_prob(p)).softmax(0)
    assert within(mass(info.particles, info.weights), float(density[p[:, 0] < 0].sum()), 0.02)
    _, loose = feynman_kac(d, unit(16), table, clip=0.01, **options)
    assert loose.weights.std() < info.weights.std()


def bad(match, call, kind=ValueError):
    with pytest.raises(kind, match=match):
        call()


def test_bad_input_is_named():
    d = P.denoiser(paths.edm())
    table = ddim(d.path, grids.karras(d.path, 4), eta=1.0)
    noise = unit(2, 2)
    bad("target must be one of targets", lambda: feynman_kac(d, noise, table, target="anneal"), TypeError)
    bad(
        "drift must be 'target', 'tempered' or 'transport'",
        lambda: feynman_kac(d, noise, table, drift="both"),
    )
    bad("divergence must be", lambda: feynman_kac(d, noise, table, divergence="none"))
    bad("quadrature must be", lambda: feynman_kac(d, noise, table, quadrature="simpson"))
    bad("particles must be a positive integer", lambda: feynman_kac(d, noise, table, particles=0))
    bad("batch must be a positive integer", lambda: feynman_kac(d, noise, table, batch=0))
    bad("table must be a Table", lambda: feynman_kac(d, noise, 4), TypeError)
    bad("noise must have shape", lambda: feynman_kac(d, unit(2, 3), table))
    bad("noise must be a floating-point tensor", lambda: feynman_kac(d, [0.0], table))
    bad("interval must be", lambda: feynman_kac(d, noise, table, interval=(2.0, 1.0)))
    bad("clip must be positive", lambda: feynman_kac(d, noise, table, clip=-1.0))
    churned = heun(d.path, grids.karras(d.path, 6), s_churn=10.0)
    bad("opens 0 steps at grid point 1", lambda: feynman_kac(d, noise, churned))
    bad("other alpha and sigma", lambda: feynman_kac(P.denoiser(paths.flow()), noise, table))
    pair = [d, P.denoiser(paths.flow())]
    bad("must lie on one path", lambda: feynman_kac(pair, noise, table, target=targets.product()))
    ode = ddim(d.path, grids.karras(d.path, 4))
    slope = targets.tilt(lambda x: x[:, 0], gradient="half")
    bad("table must draw noise", lambda: feynman_kac(d, noise, ode, target=slope))


def test_bad_rewards_are_named():
    d = P.denoiser(paths.edm())
    table, noise = ddim(d.path, grids.karras(d.path, 4), eta=1.0), unit(2, 2)

    def raising(x):
        raise RuntimeError("no weights here")

    for reward, match in (
        (lambda x: x, r"reward must answer one number a sample, \(16,\), got \(16, 2\)"),
        (lambda x: x[:, 0] * math.nan, "reward must be finite, got nan for 16 of 16"),
        (raising, "reward raised RuntimeError .* no weights here"),
        (lambda x: x[:, 0].detach(), "reward must be differentiable"),
    ):
        target = targets.tilt(reward, gradient="full", ramp=(0.1, 50.0))
        bad(match, lambda target=target: feynman_kac(d, noise, table, target=target))


def test_weights_that_collapse_and_networks_that_break_are_said():
    d = P.denoiser(paths.edm())
    table, noise = ddim(d.path, grids.karras(d.path, 6), eta=1.0), unit(2, 2)
    steep = targets.tilt(lambda x: 1e8 * x[:, 0])
    x, info = feynman_kac(d, noise, table, target=steep, particles=16)
    assert (
        info.distinct.tolist() == [1, 1] and torch.isfinite(x).all()
    )  # one is left, cloned, and the info says so
    assert float(info.ess.min()) == pytest.approx(1.0)
    inner = d.call
    d.call = lambda y, tau, **cond: inner(y, tau, **cond) * (math.inf if float(tau[0]) < 1.0 else 1.0)
    bad("network's output is not finite at step", lambda: feynman_kac(d, noise, table))
