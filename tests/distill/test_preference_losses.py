"""Preference losses on a Gaussian: the optimum in closed form, log 2 at the start, signs; inversion there and back."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.distill.losses import (
    dpo_loss,
    invert,
    mapo_loss,
    mapo_score,
    network_error,
    output_weight,
    preference_logit,
    smoothed_labels,
    smpo_loss,
)
from fewstep.models import GaussianMixture, paths
from fewstep.models.denoiser import Denoiser

PATHS = {"edm": (paths.edm(), 0.8), "vp": (paths.vp_linear(), 0.4), "flow": (paths.flow(), 0.55)}
S = 0.7  # the data's standard deviation


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Gaussian:
    """N(m, S^2) on a path: its denoiser is m + K (x_t - alpha m), whose error at x0 is (1 - K alpha) (x0 - m) - ...

    In errors of a pair under one noise the terms of the noise are the same: with c = 1 - K alpha and weight w,
    (e_w - e_l) - (b_w - b_l) = -2 w c^2 (m - m_0) (x_w - x_l), exactly.
    """

    def __init__(self, name):
        self.path, self.t = PATHS[name]
        self.alpha, self.sigma = self.path.alpha(self.t), self.path.sigma(self.t)
        self.k = self.alpha * S**2 / (self.alpha**2 * S**2 + self.sigma**2)
        self.weight = (self.alpha / self.sigma) ** 2  # errors of the noise
        self.slope = self.weight * (1 - self.k * self.alpha) ** 2

    def errors(self, m, x0, eps):
        x_t = self.alpha * x0 + self.sigma * eps
        return network_error(m + self.k * (x_t - self.alpha * m), x0, self.weight)

    def logit(self, m, winner, loser, beta, base=0.0):
        eps = normal(*winner.shape, seed=9)
        four = [self.errors(mean, x, eps) for mean in (m, torch.full_like(m, base)) for x in (winner, loser)]
        return preference_logit(*four, beta=beta)


@pytest.fixture(params=PATHS)
def gaussian(request):
    return Gaussian(request.param)


def test_all_begin_at_log_2_and_a_swapped_pair_pulls_the_other_way(gaussian):
    winner, loser, p = 1 + normal(64, 1), normal(64, 1, seed=1), normal(64, seed=2).sigmoid()
    losses = {
        "dpo": dpo_loss,
        "geometric": lambda u: smpo_loss(u, p),
        "expected": lambda u: smpo_loss(u, p, "expected"),
    }
    for name, loss in losses.items():
        gradients = []
        for pair in ((winner, loser), (loser, winner)):
            m = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            value = loss(gaussian.logit(m, *pair, beta=3.0))
            value.backward()
            assert value.item() == pytest.approx(math.log(2), abs=1e-12), name
            gradients.append(m.grad.item())
        assert gradients[0] == pytest.approx(-gradients[1], rel=1e-9) and gradients[0] != 0, name
    m = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    dpo_loss(gaussian.logit(m, winner, loser, beta=3.0)).backward()
    # -1/2 E[du/dm], u = beta w c^2 m (x_w - x_l): towards the winners
    assert m.grad.item() == pytest.approx(-1.5 * gaussian.slope * (winner - loser).mean().item(), rel=1e-9)


def test_the_optimum_under_bradley_terry_is_the_tilted_mean(gaussian):
    """p0 exp(r / b) with r = a x is N(m_0 + a S^2 / b, S^2); DPO's beta is b over the error's scale, w c^2 S^2."""
    a, base, b = 0.8, 0.3, 0.6
    x, y = base + S * normal(400, 1), base + S * normal(400, 1, seed=1)
    p = (a * (x - y)[:, 0]).sigmoid()
    beta = b / (gaussian.slope * S**2)

    def slope_at(m):
        mean = torch.tensor([m], dtype=torch.float64, requires_grad=True)
        smpo_loss(gaussian.logit(mean, x, y, beta, base), p, "expected").backward()
        return mean.grad.item()

    tilted = base + a * S**2 / b
    assert abs(slope_at(tilted)) < 1e-12
    assert slope_at(tilted - 0.1) < -1e-4 and slope_at(tilted + 0.1) > 1e-4
    # labels that are drawn and not known: the same in the mean
    which = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) < p
    winner, loser = torch.where(which[:, None], x, y), torch.where(which[:, None], y, x)
    mean = torch.tensor([tilted], dtype=torch.float64, requires_grad=True)
    u = gaussian.logit(mean, winner, loser, beta, base)
    torch.autograd.grad(dpo_loss(u), mean, retain_graph=True)
    each = (
        -(1 - u.sigmoid())
        * torch.autograd.functional.jvp(
            lambda m: gaussian.logit(m, winner, loser, beta, base), mean, torch.ones(1, dtype=torch.float64)
        )[1]
    )
    assert abs(each.mean()) < 4 * each.std() / 20


def test_pairs_that_are_as_likely_either_way_pull_nowhere():
    u = normal(8, seed=3).requires_grad_()
    smpo_loss(u, torch.full((8,), 0.5, dtype=torch.float64)).backward()
    assert not u.grad.any()
    at_start = torch.zeros(8, requires_grad=True)
    smpo_loss(at_start, torch.full((8,), 0.5), "expected").backward()
    assert not at_start.grad.any()


def test_geometric_and_expected_labels_differ_by_the_sharpness_at_the_start_only():
    p = torch.tensor([0.9, 0.6])
    gradients = {}
    for labels in ("geometric", "expected"):
        for where in (0.0, 2.0):
            u = torch.full((2,), where, requires_grad=True)
            smpo_loss(u, p, labels, sharpness=4.0).backward()
            gradients[labels, where] = u.grad
    torch.testing.assert_close(gradients["geometric", 0.0], 4 * gradients["expected", 0.0])
    # beyond sigmoid(u) = p an expected label pulls back, a geometric one never does
    assert (gradients["expected", 2.0][1] > 0) and (gradients["geometric", 2.0] < 0).all()


def test_smoothed_labels_are_the_softmax_of_scores_on_their_range():
    low, high = 0.11543526500463486, 0.28201571106910706  # PickScore's
    scores = torch.tensor([[0.25, 0.2], [0.2, 0.2]], dtype=torch.float64)
    unit = (scores - low) / (high - low)
    torch.testing.assert_close(smoothed_labels(*scores.T, low, high), unit.softmax(1)[:, 0])
    with pytest.raises(ValueError, match="high must exceed low"):
        smoothed_labels(*scores.T, 1.0, 1.0)


@pytest.mark.parametrize("predicts", ["eps", "v", "flow", "score", "x0"])
@pytest.mark.parametrize("path", [paths.vp_linear(), paths.flow(), paths.edm()], ids=lambda p: p.name)
def test_errors_are_those_of_the_network_s_own_answer_to_implied_noise(path, predicts):
    """|F - F*|^2 with F* of the noise that x_t implies, however x_t came about."""
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    x0, x_t, answer = normal(2, 5), normal(2, 5, seed=1), normal(2, 5, seed=2)
    d = Denoiser(lambda x, tau: answer, path, predicts=predicts)
    alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
    eps = (x_t - alpha * x0) / sigma
    wanted = {
        "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "x0": x0,
        "flow": path.alpha_prime(t)[:, None] * x0 + path.sigma_prime(t)[:, None] * eps,
    }[predicts]  # fmt: skip
    for reduce, scale in (("mean", 1), ("sum", 5)):
        got = network_error(d(x_t, t), x0, output_weight(d, t), reduce)
        torch.testing.assert_close(got, scale * (answer - wanted).square().mean(1), rtol=1e-8, atol=1e-8)


def test_edm_errors_have_edm_s_weight():
    d = Denoiser(lambda x, tau: x, paths.edm(), predicts="x0", precond="edm", sigma_data=0.75)
    assert output_weight(d, 0.4) == pytest.approx((0.4**2 + 0.75**2) / (0.4 * 0.75) ** 2, rel=1e-12)


def test_mapo_raises_winners_and_lowers_losers_and_its_score_is_right_at_0_and_far_away():
    winner, loser = (torch.tensor([v], requires_grad=True) for v in (0.4, 0.5))
    loss, u = mapo_loss(winner, loser, beta=0.1)
    loss.backward()
    assert winner.grad > 0 and loser.grad < 0 and u > 0
    same = torch.tensor([0.4])
    assert mapo_loss(same, same)[0].item() == pytest.approx(0.4 + 0.1 * math.log(2), rel=1e-6)
    e = torch.logspace(-8, 1.5, 60, dtype=torch.float64)
    exact = 0.5 * e / torch.expm1(0.5 * e)
    torch.testing.assert_close(
        mapo_score(e.float()).double(), exact, rtol=20 * 2**-24, atol=0
    )  # exp(-16) of 16
    torch.testing.assert_close(mapo_score(e), exact, rtol=1e-13, atol=0)
    ends = torch.tensor([0.0, 1e4], requires_grad=True)
    mapo_score(ends).sum().backward()
    torch.testing.assert_close(ends.grad, torch.tensor([-0.25, 0.0]))
    naive = 0.5 * e.float() / (torch.exp(0.5 * e.float()) - 1)  # what it would be without expm1
    assert not torch.allclose(naive.double(), exact, rtol=1e-3)


# --- inversion -----------------------------------------------------------------------------------------------------


def bimodal(path):
    return GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.6]], [0.05, 0.1]).denoiser(path)


def back(d, x, times, told="then"):
    """DDIM steps on the same grid, from noise to data."""
    levels = [float(t) for t in times]
    for now, then in reversed(list(zip(levels, levels[1:], strict=False))):
        ratio = d.path.alpha(now) / d.path.alpha(then)
        x = ratio * x + (d.path.sigma(now) - ratio * d.path.sigma(then)) * d.eps(x, then)
    return x / d.path.alpha(levels[0])


@pytest.mark.parametrize("path", [p for p, _ in PATHS.values()], ids=lambda p: p.name)
def test_there_and_back_again(path):
    """The way back by DDIM misses less the more steps there are, and less where the end of a step was asked."""
    d, x = bimodal(path), torch.tensor([[-0.9, 0.3], [0.7, -0.2]], dtype=torch.float64)

    def missed(n, **options):
        times = path.time_of_rho(torch.linspace(0.05, 1.0, n + 1, dtype=torch.float64))
        return float((back(d, invert(d, x, times, **options), times) - x).abs().max())

    for told in ("now", "then"):
        first = [missed(n, told=told) for n in (10, 20, 40, 80)]
        assert all(1.6 < a / b < 2.4 for a, b in zip(first, first[1:], strict=False)), told  # first order
        again = [missed(20, told=told, refine=k) for k in (0, 1, 2)]
        assert again[1] < 0.65 * again[0] and again[2] < 0.8 * again[1], told


def test_refined_once_from_where_it_is_inversion_is_heun_s():
    d, path = bimodal(paths.edm()), paths.edm()
    x = torch.tensor([[-0.9, 0.3], [0.7, -0.2]], dtype=torch.float64)
    fine = invert(d, x, torch.linspace(0.05, 1.0, 641, dtype=torch.float64), refine=1)
    errors = [
        float(
            (invert(d, x, torch.linspace(0.05, 1.0, n + 1, dtype=torch.float64), refine=1) - fine).abs().max()
        )
        for n in (40, 80)
    ]
    assert 3.3 < errors[0] / errors[1] < 4.7  # second order
    assert path.name == "edm"


def test_a_grid_for_each_sample_is_each_sample_s_own():
    d = bimodal(paths.vp_linear())
    x = torch.tensor([[-0.9, 0.3], [0.7, -0.2]], dtype=torch.float64)
    grids = torch.stack([torch.linspace(0.01, end, 5, dtype=torch.float64) for end in (0.3, 0.8)], 1)
    both = invert(d, x, grids, refine=1, told="then")
    for k in range(2):
        one = invert(d, x[k : k + 1], grids[:, k], refine=1, told="then")
        torch.testing.assert_close(both[k : k + 1], one, rtol=1e-12, atol=1e-12)


def test_the_noise_of_an_inversion_is_ddpm_s_step_back():
    path = paths.vp_linear()
    d = Denoiser(lambda x, tau: torch.zeros_like(x), path, predicts="eps")
    now, then = 0.2, 0.3
    x = torch.zeros(1, 1, dtype=torch.float64)
    added = invert(
        d, x, torch.tensor([now, then], dtype=torch.float64), eta=0.1, noise=lambda k: torch.ones_like(x)
    )
    a, b = path.alpha(now) ** 2, path.alpha(then) ** 2
    assert added.item() == pytest.approx(0.1 * math.sqrt((1 - a) / (1 - b) * (1 - b / a)), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: network_error(torch.ones(2, 3), torch.ones(2, 4), 1.0), "x0's shape"),
        (lambda: network_error(torch.ones(2, 3), torch.ones(2, 3), 1.0, "max"), "reduce must be"),
        (lambda: preference_logit(*torch.ones(3, 2), torch.ones(3)), "one shape"),
        (lambda: smpo_loss(torch.zeros(2), torch.zeros(3)), "p must be one number a pair"),
        (lambda: smpo_loss(torch.zeros(2), torch.zeros(2), "hard"), "labels must be"),
        (lambda: invert(bimodal(paths.edm()), torch.ones(1, 2), torch.tensor([1.0, 0.5])), "must rise"),
        (lambda: invert(bimodal(paths.edm()), torch.ones(1, 2), torch.tensor([0.5, 1.0]), told="so"), "told"),
        (lambda: invert(bimodal(paths.edm()), torch.ones(1, 2), torch.tensor([0.5, 1.0]), eta=1.0), "needs noise"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
