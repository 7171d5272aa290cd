"""Minority score, classes and guidance on a mixture whose rare mode is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.models import Denoiser, GaussianMixture, load_classifier, paths
from fewstep.samplers import (
    cfg,
    ddim,
    ddpm,
    deis,
    feature_distance,
    grids,
    heun,
    minority,
    minority_classes,
    minority_score,
    multistep,
    rlg,
    sample,
    sde_dpmpp,
)
from fewstep.samplers.minority import mean_gains

ALL = {name: paths.by_name(name) for name in paths.NAMES}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())

# two modes of 49 %, and a rare one of 2 % as far from both as they are from each other
RARE = GaussianMixture([0.49, 0.49, 0.02], [[-2.0, 0.0], [2.0, 0.0], [0.0, 3.464]], 0.05)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_the_mode(k, number=40, seed=0):
    return RARE.means[k] + math.sqrt(0.05) * normals(number, 2, seed=seed)


def exact_classifier(mixture, path):
    """log p(mode | x_t, t), the best that a classifier could learn."""
    return lambda x, t: mixture.responsibilities(x, path, t).log()


def mass_of_the_rare_mode(x):
    return float((RARE.responsibilities(x).argmax(-1) == 2).float().mean())


# --- the score ----------------------------------------------------------------------------------------------


@every_path
def test_the_rare_mode_scores_on_top_on_every_path_alike(path):
    x = torch.cat([of_the_mode(k, seed=k) for k in range(3)])
    t = path.time_of_rho(1.5)
    score = minority_score(RARE.denoiser(path), x, t, draws=8)
    assert sorted(score.argsort(descending=True)[:40].tolist()) == list(range(80, 120))
    # x / alpha is all that an exact model sees, so a score is no matter of the path
    torch.testing.assert_close(
        score, minority_score(RARE.denoiser(paths.edm()), x, 1.5, draws=8), rtol=1e-9, atol=1e-12
    )
    # control: at next to no noise every sample comes back, and the order says nothing
    early = minority_score(RARE.denoiser(path), x, path.time_of_rho(0.01), draws=8)
    assert (
        early.max() < 1e-3
        and len(set(early.argsort(descending=True)[:40].tolist()) & set(range(80, 120))) < 40
    )


def test_a_score_of_one_gaussian_is_the_closed_form():
    """x0_hat = k (x + rho eps), k = c / (c + rho^2): the mean square of (1 - k) x - k rho eps over these very draws."""
    from fewstep.samplers.noise import USER, normal

    d, rho, c, draws = GaussianMixture([1.0], [[0.0, 0.0]], 0.7).denoiser(paths.edm()), 0.9, 0.7, 3
    x, k = normals(5, 2), c / (c + rho**2)
    eps = normal(4, torch.arange(draws), (2,), 0, USER, torch.float64)
    wanted = (((1 - k) * x[:, None] - k * rho * eps) ** 2).mean((1, 2))
    torch.testing.assert_close(minority_score(d, x, rho, draws=draws, seed=4), wanted, rtol=1e-12, atol=0)
    # every sample gets the same draws: equal samples score equally, wherever they stand in whatever batch
    twice = minority_score(d, torch.cat([x, x[:1]]), rho, draws=draws, seed=4)
    assert twice[5] == twice[0] and torch.equal(
        minority_score(d, x[2:3], rho, draws=draws, seed=4), twice[2:3]
    )
    assert (minority_score(d, x, rho, draws=draws, seed=5) - wanted).abs().max() > 0.01


def test_a_score_may_use_any_distance_and_conditions():
    judge, d = (
        load_classifier(),
        Denoiser(lambda x, tau, label: x * 0 + label[:, None, None, None] / 10, paths.edm(), "x0"),
    )
    x, label = torch.rand(6, 1, 8, 8), torch.arange(6)
    score = minority_score(d, x, 0.5, feature_distance(judge.features), draws=1, cond={"label": label})
    one, two = (judge.features(v).flatten(1) for v in (x, d(x, 0.5, label=label)))
    wanted = 2 - 2 * torch.cosine_similarity(one, two)
    torch.testing.assert_close(score, wanted, rtol=1e-4, atol=1e-5)


def test_the_default_time_is_the_paper_s_noise_level_on_any_path():
    x = of_the_mode(0, 4)
    vp = paths.vp_linear()
    torch.testing.assert_close(
        minority_score(RARE.denoiser(vp), x), minority_score(RARE.denoiser(vp), x, 0.6)
    )
    torch.testing.assert_close(
        minority_score(RARE.denoiser(paths.flow()), x), minority_score(RARE.denoiser(vp), x, 0.6)
    )


def test_classes_are_ordered_equal_in_size_and_never_empty():
    scores = torch.rand(1003, generator=torch.Generator().manual_seed(0))
    classes = minority_classes(scores, 100)
    counts = torch.bincount(classes, minlength=100)
    assert counts.min() == 10 and counts.max() == 11
    assert (scores[classes == 7].max() < scores[classes == 8].min()) and classes[scores.argmax()] == 99
    assert torch.bincount(minority_classes(torch.zeros(50), 10)).tolist() == [5] * 10  # ties


# --- guidance -----------------------------------------------------------------------------------------------


@every_path
def test_in_every_form_it_is_the_score_plus_the_gradient(path):
    d, classifier = RARE.denoiser(path, "eps"), exact_classifier(RARE, path)
    guided, x = minority(d, classifier, 1.7, target=2), normals(6, 2)
    each = torch.tensor([path.time(lam) for lam in (1, 0.5, 0, -0.5, -1, -1.2)], dtype=torch.float64)
    for t in (path.time(0.8), path.time(-1.0), each):
        alpha, sigma = (
            torch.as_tensor(f(t), dtype=torch.float64).reshape(-1, 1) for f in (path.alpha, path.sigma)
        )
        point = x.clone().requires_grad_()
        log_p = classifier(point, torch.as_tensor(t, dtype=torch.float64).expand(6))[:, 2].sum()
        (slope,) = torch.autograd.grad(log_p, point)
        for got, wanted in (
            (guided(x, t), d(x, t) + 1.7 * sigma**2 / alpha * slope),
            (guided.eps(x, t), d.eps(x, t) - 1.7 * sigma * slope),
            (guided.score(x, t), d.score(x, t) + 1.7 * slope),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        # with the exact p(mode | x_t), scale 1 is the model of that mode alone
        alone = d(x, t, label=torch.full((6,), 2))
        torch.testing.assert_close(minority(d, classifier, 1.0, target=2)(x, t), alone, rtol=1e-7, atol=1e-7)
    assert guided.affine(0.5) is None and guided.parts() == d.parts()
    assert torch.equal(minority(d, classifier, 0.0, target=2)(x, 0.5), d(x, 0.5))


def trained_classifier(path, classes):
    """A small network that learns p(class of its score | x_t, t) from noised samples of the mixture."""
    generator = torch.Generator().manual_seed(1)
    data = RARE.sample(4000, seed=1)
    target = minority_classes(
        minority_score(RARE.denoiser(path), data, path.time_of_rho(1.5), draws=8), classes
    )
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, classes)
    ).double()

    def classifier(x, t):
        lam = path.lam(t).clamp(-4, 4)[:, None]
        return net(torch.cat([x / (path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt()[:, None], lam / 4], 1))

    best = torch.optim.Adam(net.parameters(), 4e-3)
    for _ in range(350):
        index = torch.randint(4000, (512,), generator=generator)
        lam = 8 * torch.rand(512, generator=generator, dtype=torch.float64) - 4
        noise = torch.randn(512, 2, generator=generator, dtype=torch.float64)
        t = path.time(lam)
        loss = nn.functional.cross_entropy(
            classifier(path.add_noise(data[index], t, noise), t), target[index]
        )
        best.zero_grad()
        loss.backward()
        best.step()
    return classifier, data, target


def test_a_trained_classifier_guides_to_the_rare_mode_the_more_the_stronger():
    path = paths.vp_linear()
    classifier, data, target = trained_classifier(path, 20)
    rare = RARE.responsibilities(data).argmax(-1) == 2
    assert (target[rare] == 19).float().mean() > 0.8  # 2 % of the data are in the rarest 5 %
    d, noise = RARE.denoiser(path), normals(1500, 2)
    table = multistep(path, grids.vp(path, 12), form="x0", variable="vp", nodes=2)
    masses = [
        mass_of_the_rare_mode(sample(minority(d, classifier, w, target=target), noise, table))
        for w, target in ((0.0, -1), (0.5, -1), (1.0, -1), (3.0, -1), (1.0, 0))
    ]
    error = math.sqrt(0.02 * 0.98 / 1500)
    assert abs(masses[0] - 0.02) < 4 * error + 0.005
    assert masses[0] < masses[1] < masses[2] < masses[3] and masses[3] > 0.2
    assert masses[4] <= masses[0]  # towards the commonest class: no more of it
    # control: a classifier that has learned nothing guides nowhere
    blind = sample(minority(d, lambda x, t: torch.zeros(len(x), 20).to(x) + 0 * x.sum(), 3.0), noise, table)
    torch.testing.assert_close(blind, sample(minority(d, classifier, 0.0), noise, table))


def test_it_runs_under_any_solver_noise_and_blend():
    path, generator = paths.flow(), normals(8, 2)
    d = RARE.denoiser(path, "flow")
    guided = minority(d, exact_classifier(RARE, path), 2.0, target=2)
    for solver in (deis, heun, sde_dpmpp, ddpm):  # from t = 1, where alpha = 0 and nothing is added
        assert sample(guided, generator, solver(path, grids.uniform(path, 6))).isfinite().all()
    assert torch.equal(guided(generator, 1.0), d(generator, 1.0))
    x, t = normals(4, 2), 0.5
    blend = rlg(d, guided, 0.5)
    torch.testing.assert_close(blend(x, t), 0.5 * d(x, t) + 0.5 * guided(x, t))
    over = cfg(guided, 2.0, null={"label": -1})
    label = torch.tensor([0, 1, 2, 1])
    wanted = 2 * guided(x, t, label=label) - guided(x, t)
    torch.testing.assert_close(over(x, t, label=label), wanted)
    # gradients of samples flow where they are asked for
    start = x.clone().requires_grad_()
    sample(guided, start, ddim(path, grids.uniform(path, 2)), grad="all").sum().backward()
    assert start.grad.isfinite().all() and start.grad.abs().min() > 0


# --- the two modes ------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_factor_between_moving_the_score_and_moving_the_mean(path, variance):
    """A DDPM row's mean moves by  w g (alpha_n/alpha_s)(sigma_s^2 - sigma_n^2 alpha_s^2/alpha_n^2)  against w c^2 g."""
    times = grids.logsnr(path, 7) if path.name != "flow" else np.linspace(0.95, 0, 8)
    table, w = ddpm(path, times, variance=variance), 1.3
    constant = torch.tensor(
        [0.4, -0.7], dtype=torch.float64
    )  # a classifier whose log p has this gradient everywhere

    def classifier(x, t):
        z = x @ constant
        return torch.stack([torch.zeros_like(z), z], 1) * 1.0

    def slope(x):
        return (1 - torch.sigmoid(x @ constant))[:, None] * constant

    d, x = RARE.denoiser(path), normals(4, 2)
    by_score, by_mean = minority(d, classifier, w), minority(d, classifier, w, mode="mean", table=table)
    for row in range(table.calls):
        s, n = float(table.times[row]), float(table.times[row + 1])
        a_s, s_s, a_n, s_n = path.alpha(s), path.sigma(s), path.alpha(n), path.sigma(n)
        into_x0 = table.b[row + 1, 0, 0, table.slot[row]]
        assert table.form[row] == "x0"
        moved, moved_officially = (into_x0 * (one(x, s) - d(x, s)) for one in (by_score, by_mean))
        g, c2 = slope(x), table.c[row + 1, 0, 0] ** 2
        wanted = w * g * (a_n / a_s) * (s_s**2 - s_n**2 * a_s**2 / a_n**2)
        torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moved_officially, w * c2 * g, rtol=1e-9, atol=1e-12)
        if c2 > 0:
            factor = a_n * s_s**2 / (a_s * s_n**2) if variance == "small" else a_n / a_s
            torch.testing.assert_close(moved, factor * moved_officially, rtol=1e-9, atol=1e-12)
            assert factor > 1 or (path.name, variance) == ("edm", "large")
    # per-sample times find their rows too
    each = torch.as_tensor(table.t[:4, 0].copy())
    one_by_one = torch.cat([by_mean(x[k : k + 1], float(each[k])) for k in range(4)])
    torch.testing.assert_close(by_mean(x, each), one_by_one, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="one of the times of the table"):
        by_mean(x, 0.5 * float(table.times[1] + table.times[2]))


def test_the_two_modes_meet_as_steps_shrink():
    """The gap between their samples is of first order: four times the steps leave a quarter of it, about."""
    path = paths.vp_linear()
    d, classifier, noise = RARE.denoiser(path), exact_classifier(RARE, path), normals(400, 2)
    gaps = []
    for steps in (20, 80):
        table = ddpm(path, grids.logsnr(path, steps), variance="large")
        _, gains = mean_gains(table)
        exact = np.array([path.sigma(t) ** 2 / path.alpha(t) for t in table.t[:, 0]])
        gaps.append(np.abs(gains[steps // 4 : 3 * steps // 4] / exact[steps // 4 : 3 * steps // 4] - 1).max())
        one = sample(minority(d, classifier, 1.0, 2, mode="mean", table=table), noise, table)
        assert mass_of_the_rare_mode(one) > 0.5
    assert 3 < gaps[0] / gaps[1] < 5.5


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d, f: minority_score(d, torch.zeros(2, 2), 0.0), "t must be a time with noise"),
        (lambda d, f: minority_score(d, torch.zeros(2, 2), draws=0), "draws must be"),
        (
            lambda d, f: minority_score(d, torch.zeros(2, 2), distance=lambda a, b: (a - b) ** 2),
            "one number a sample",
        ),
        (lambda d, f: minority_classes(torch.tensor([1.0, math.nan]), 2), "scores must be finite"),
        (lambda d, f: minority_classes(torch.rand(5), 6), "classes must be"),
        (lambda d, f: minority(d, f, math.inf), "scale must be"),
        (lambda d, f: minority(d, f, 1.0, target=0.5), "target must be"),
        (lambda d, f: minority(d, f, 1.0, mode="eps"), "mode must be"),
        (lambda d, f: minority(d, f, 1.0, mode="mean"), "table goes with"),
        (lambda d, f: minority(d, f, 1.0, table=ddpm(d.path, [1.0, 0.5, 0.0])), "table goes with"),
        (
            lambda d, f: minority(d, f, 1.0, mode="mean", table=ddim(d.path, [1.0, 0.5, 0.0])),
            "must be stochastic",
        ),
        (
            lambda d, f: minority(d, f, 1.0, mode="mean", table=sde_dpmpp(d.path, [1.0, 0.7, 0.4, 0.0])),
            "one-step",
        ),
        (lambda d, f: minority(d, f, 1.0, target=2)(torch.zeros(2, 2), 0.5), "logits"),
        (lambda d, f: minority(d, lambda x, t: x.sum(), 1.0)(torch.zeros(2, 2), 0.5), "logits"),
    ],
)
def test_wrong_values_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make(RARE.denoiser(paths.vp_linear()), lambda x, t: x)


def test_what_is_no_function_or_denoiser_is_refused():
    d = RARE.denoiser(paths.vp_linear())
    with pytest.raises(TypeError, match="classifier must be"):
        minority(d, 3, 1.0)
    with pytest.raises(TypeError, match="d must be a Denoiser"):
        minority_score(lambda x, t: x, torch.zeros(2, 2))
