"""Where each divergence leads a student of two numbers, x0 = a z + b, in float64 with exact scores and ratios.

Expectations are integrals over a grid of x_t, so nothing is left to chance; dx0/da is E[z | x_t] = a (x_t - b) / q.
"""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.distill.losses import dmd_gradient
from fewstep.distill.losses.divergences import DIVERGENCES
from fewstep.models import GaussianMixture, paths

X = torch.linspace(-9, 9, 901, dtype=torch.float64)
DX = float(X[1] - X[0])
PATH = paths.edm()
UPSIDE_DOWN = "upside down"  # forward KL by the ratio of student over teacher
NARROW, WIDE = (0.1, 0.3), (1.0, 2.0)  # noise levels at which two modes are apart, and are one


def teacher(means, std):
    mixture = GaussianMixture([1 / len(means)] * len(means), [[m] for m in means], std**2)
    return mixture, mixture.denoiser(PATH)


def slopes(mixture, d, a, b, sigma, name):
    """d/da and d/db of D_f(p_t || q_t), or of SIM's distance, at noise level sigma."""
    spread = a * a + sigma * sigma
    log_q = -0.5 * ((X - b) ** 2 / spread + math.log(2 * math.pi * spread))
    real, fake = d(X[:, None], sigma)[:, 0], X - sigma**2 * (X - b) / spread
    z, mass = a * (X - b) / spread, log_q.exp() * DX
    if name == "sim":
        # int sg[q] |D_f - D_r|^2 / sigma^2: test_score_matching shows that the loss has this gradient
        pull = 2 * mass * (fake - real) / spread
        return float((pull * 2 * z).sum()), float(pull.sum())
    ratio = (mixture.log_prob(X[:, None], PATH, sigma) - log_q).exp()
    h = DIVERGENCES["kl"].weight(1 / ratio) if name == UPSIDE_DOWN else DIVERGENCES[name].weight(ratio)
    g = dmd_gradient(X[:, None], real[:, None], fake[:, None], 1.0, sigma, "kl", scale=h)[:, 0]
    return float((mass * g * z).sum()), float((mass * g).sum())


def led(mixture, d, name, a, b, sigmas, steps=240, rate=0.15):
    """(a, b) after gradient descent, the levels in turn; steps in units of the student's own spread."""
    for k in range(steps):
        sigma = sigmas[k % len(sigmas)]
        on_a, on_b = slopes(mixture, d, a, b, sigma, name)
        scale = rate * (a * a + sigma * sigma) * min(1.0, 2 * (1 - k / steps))
        a, b = a - scale * max(-2.0, min(2.0, on_a)), b - scale * max(-2.0, min(2.0, on_b))
    return abs(a), b


@pytest.mark.parametrize("name", ["rkl", "kl", "js", "hellinger", "sim"])
def test_every_divergence_leads_a_gaussian_to_a_gaussian(name):
    mixture, d = teacher([0.7], 0.6)
    a, b = led(mixture, d, name, a=1.3, b=-0.8, sigmas=(0.2, 0.5, 1.0))
    assert a == pytest.approx(0.6, rel=0.01) and b == pytest.approx(0.7, rel=0.01)


@pytest.mark.parametrize("name", [*DIVERGENCES, "sim"])
def test_at_the_teacher_s_own_law_nothing_moves(name):
    mixture, d = teacher([0.7], 0.6)
    for sigma in (0.1, 1.0):
        assert max(abs(g) for g in slopes(mixture, d, 0.6, 0.7, sigma, name)) < 1e-10
        assert max(abs(g) for g in slopes(mixture, d, 0.61, 0.7, sigma, name)) > 1e-4


def test_the_reverse_kl_falls_at_every_step():
    mixture, d = teacher([0.7], 0.6)
    a, b, sigma, previous = 1.3, -0.8, 0.3, math.inf
    p = 0.6**2 + sigma**2
    for _ in range(60):
        q = a * a + sigma**2
        divergence = 0.5 * (q / p - 1 - math.log(q / p) + (b - 0.7) ** 2 / p)
        assert divergence <= previous
        previous = divergence
        on_a, on_b = slopes(mixture, d, a, b, sigma, "rkl")
        a, b = a - 0.1 * p * on_a, b - 0.1 * p * on_b
    assert divergence < 1e-4


def led_to_two_modes(name, sigmas):
    """The student starts near one of two modes, and wide enough to know of the other."""
    return led(*teacher([-1.5, 1.5], 0.3), name, a=0.5, b=0.7, sigmas=sigmas)


@pytest.mark.parametrize("name", ["kl", "js", "hellinger"])
def test_covering_divergences_cover_both_modes(name):
    a, b = led_to_two_modes(name, NARROW)
    assert abs(b) < 0.01 and a > 1.4
    if name == "kl":  # the teacher's own standard deviation
        assert a == pytest.approx(math.sqrt(1.5**2 + 0.3**2), rel=0.01)


@pytest.mark.parametrize("name", ["rkl", "softened_rkl", "sim", UPSIDE_DOWN])
def test_seeking_ones_keep_one_mode_and_so_does_forward_kl_with_its_ratio_upside_down(name):
    a, b = led_to_two_modes(name, NARROW)
    assert a == pytest.approx(0.3, rel=0.02) and b == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize("name", ["rkl", "sim"])
def test_at_levels_where_the_modes_are_one_they_cover_both_too(name):
    a, b = led_to_two_modes(name, WIDE)
    assert abs(b) < 0.01 and a > 1.4
