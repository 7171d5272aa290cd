"""GaussianMixture against independent routes: autograd, quadrature on grids, dense Gaussians, moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from fewstep.models import GaussianMixture, paths
from fewstep.models.denoiser import PREDICTS
from fewstep.models.mixture import random_mixture, ring

ALL = {name: paths.by_name(name) for name in paths.NAMES}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def isotropic():
    return GaussianMixture(
        [0.2, 0.5, 0.3], [[0.0, 1.0, 2.0], [-1.0, 0.5, 0.0], [1.0, -1.0, 0.3]], [0.1, 0.3, 0.05]
    )


def diagonal():
    covs = [[0.1, 0.4, 0.2], [0.3, 0.05, 0.6], [0.2, 0.2, 0.9]]
    return GaussianMixture([1.0, 2.0, 0.5], [[0.0, 1.0, 2.0], [-1.0, 0.5, 0.0], [1.0, -1.0, 0.3]], covs)


KINDS = {"isotropic": isotropic, "diagonal": diagonal, "full": lambda: random_mixture(3, 4, seed=1)}
every_kind = pytest.mark.parametrize("mixture", [make() for make in KINDS.values()], ids=KINDS.keys())


def dense(mixture, alpha=1.0, sigma=0.0):
    """The same marginal by torch.distributions, with dense covariances."""
    covs = alpha**2 * mixture.covs + sigma**2 * torch.eye(mixture.dim, dtype=torch.float64)
    return MixtureSameFamily(Categorical(mixture.weights), MultivariateNormal(alpha * mixture.means, covs))


def times(path):
    return [path.t_max, *(path.time(lam) for lam in (-1.0, 0.5, 3.0)), path.t_clean]


# --- density, score, denoiser ------------------------------------------------------------------------------------


@every_path
@every_kind
def test_density_is_the_dense_one(path, mixture):
    x = 2 * normals(20, 3)
    torch.testing.assert_close(mixture.log_prob(x), dense(mixture).log_prob(x), rtol=1e-11, atol=1e-11)
    for t in times(path):
        wanted = dense(mixture, path.alpha(t), path.sigma(t)).log_prob(x)
        torch.testing.assert_close(mixture.log_prob(x, path, t), wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mixture.marginal(path, t).log_prob(x), wanted, rtol=1e-10, atol=1e-10)
    each = torch.linspace(path.t_clean, path.t_max, 20, dtype=torch.float64)
    together = mixture.log_prob(x, path, each)
    alone = torch.stack([mixture.log_prob(x[i], path, float(each[i])) for i in range(20)])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)
    assert mixture.log_prob(x.reshape(4, 5, 3), path, 0.5).shape == (4, 5)


@every_path
@every_kind
def test_score_is_the_gradient_of_log_prob(path, mixture):
    x = normals(20, 3).requires_grad_()
    for t in (None, *times(path)):
        where = () if t is None else (path, t)
        (wanted,) = torch.autograd.grad(mixture.log_prob(x, *where).sum(), x)
        torch.testing.assert_close(mixture.score(x.detach(), *where), wanted, rtol=1e-10, atol=1e-10)


@every_path
@every_kind
def test_denoiser_is_tweedies(path, mixture):
    x, d = normals(20, 3), mixture.denoiser(path)
    for t in times(path):
        alpha, sigma = path.alpha(t), path.sigma(t)
        score = mixture.score(x, path, t)
        torch.testing.assert_close(alpha * d(x, t), x + sigma**2 * score, rtol=1e-11, atol=1e-10)
        if 0.05 < sigma and alpha > 0:  # eps from x0 divides its rounding by sigma
            torch.testing.assert_close(d.score(x, t), score, rtol=1e-10, atol=1e-10)
        if sigma > 0:  # negative control: another time's score is seen
            wrong = x + sigma**2 * mixture.score(x, path, 0.9 * t + 0.1 * path.t_clean)
            assert (alpha * d(x, t) - wrong).abs().max() > 1e-7


@every_path
def test_denoiser_by_quadrature(path):
    """E[x0 | x_t] as the integral that it is, by the trapezoidal rule, which is exact on such decay."""
    mixture = GaussianMixture([0.3, 0.7], [[-1.0], [0.8]], [0.09, 0.25])
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    prior = mixture.log_prob(grid[:, None])
    x = torch.tensor([-1.5, 0.1, 0.9], dtype=torch.float64)
    for t in (path.time(lam) for lam in (-2.0, 0.0, 2.0)):
        alpha, sigma = path.alpha(t), path.sigma(t)
        log_weight = prior - (x[:, None] - alpha * grid) ** 2 / (2 * sigma**2)
        wanted = (log_weight.softmax(-1) * grid).sum(-1)
        torch.testing.assert_close(
            mixture.denoiser(path)(x[:, None], t)[:, 0], wanted, rtol=1e-11, atol=1e-11
        )


@every_path
@every_kind
def test_both_ends_of_the_denoiser(path, mixture):
    x, d = normals(5, 3), mixture.denoiser(path)
    assert torch.equal(d(x, path.t_clean), x)
    mixed = d(x, torch.tensor([path.t_clean, path.t_max] * 2 + [path.t_clean], dtype=torch.float64))
    assert torch.equal(mixed[::2], x[::2])
    if path.alpha(path.t_max) == 0:
        torch.testing.assert_close(d(x, path.t_max), mixture.mean.expand(5, 3), rtol=1e-14, atol=1e-14)
    x.requires_grad_()
    for t in (path.t_clean, path.t_max):
        (slope,) = torch.autograd.grad(d(x, t).sum(), x)
        assert torch.isfinite(slope).all()


@every_path
@pytest.mark.parametrize("predicts", PREDICTS)
def test_every_prediction_is_the_same_denoiser(path, predicts):
    mixture = random_mixture(3, 4, seed=2)
    x, plain, other = normals(6, 3), mixture.denoiser(path), mixture.denoiser(path, predicts=predicts)
    assert other.predicts == predicts
    t = torch.tensor([path.time(lam) for lam in (2.0, 1.0, 0.5, 0.0, -1.0, -2.0)], dtype=torch.float64)
    torch.testing.assert_close(other(x, t), plain(x, t), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(other.velocity(x, t), plain.velocity(x, t), rtol=1e-10, atol=1e-10)


def test_derivative_of_the_denoiser_is_the_posterior_covariance():
    mixture, path, t = random_mixture(3, 4, seed=3), paths.vp_cosine(), 0.45
    d, x = mixture.denoiser(path), normals(3)
    assert torch.autograd.gradcheck(lambda x: d(x, t), normals(2, 3).requires_grad_())
    jacobian = torch.autograd.functional.jacobian(lambda x: d(x[None], t)[0], x)
    posterior = mixture.posterior(x, path, t)
    torch.testing.assert_close(posterior.mean, d(x[None], t)[0], rtol=1e-11, atol=1e-11)
    wanted = posterior.cov * path.alpha(t) / path.sigma(t) ** 2
    torch.testing.assert_close(jacobian, wanted, rtol=1e-10, atol=1e-10)
    # evidence: log p_t(x) = log mass + log N(x; 0, sigma^2)
    normal = -0.5 * (x @ x) / path.sigma(t) ** 2 - 1.5 * math.log(2 * math.pi * path.sigma(t) ** 2)
    assert posterior.log_mass + normal == pytest.approx(float(mixture.log_prob(x, path, t)), rel=1e-11)


@every_path
@pytest.mark.parametrize("mixture", [random_mixture(17, 5, 0), random_mixture(64, 3, 0), ring(), diagonal()],
                         ids=["full17", "full64", "ring", "diagonal"])  # fmt: skip
def test_a_sample_is_the_same_bits_in_any_batch(path, mixture):
    x, d = normals(37, mixture.dim), mixture.denoiser(path)
    for t in (torch.linspace(path.t_clean, path.t_max, 37, dtype=torch.float64), path.time(0.3)):
        together = d(x, t)
        back = d(x.flip(0), t if isinstance(t, float) else t.flip(0)).flip(0)
        assert torch.equal(back, together)
        for n in (1, 3, 16, 30):
            parts = [d(x[i : i + n], t if isinstance(t, float) else t[i : i + n]) for i in range(0, 37, n)]
            assert torch.equal(torch.cat(parts), together)


def test_float32_and_shapes():
    mixture, path = random_mixture(6, 3, seed=4), paths.edm()
    x = normals(5, 6)
    wanted = mixture.denoiser(path)(x, 0.7)
    got = mixture.denoiser(path)(x.float(), 0.7)
    assert got.dtype == torch.float32
    # x itself is rounded; the denoiser's slope is Cov[x0 | x] / sigma^2, at most the spread of the mixture over it
    slope = float(torch.linalg.eigvalsh(mixture.cov).max()) / 0.7**2
    rounding = 6e-8 * (x.norm(dim=-1).max() * (1 + slope) + wanted.abs().max())
    assert (got - wanted).abs().max() < 2 * rounding
    image = mixture.denoiser(path)(x.reshape(5, 1, 2, 3), 0.7)
    assert torch.equal(image, wanted.reshape(5, 1, 2, 3))
    low = mixture.to(dtype=torch.float32)
    assert low.denoiser(path)(x.float(), 0.7).dtype == torch.float32
    assert (low.denoiser(path)(x.float(), 0.7) - wanted).abs().max() < 1e-4


def test_labels_keep_one_component():
    mixture, path = random_mixture(3, 4, seed=5), paths.flow()
    x, d = normals(6, 3), mixture.denoiser(path)
    label = torch.tensor([0, 1, 2, 3, -1, 2])
    got = d(x, 0.6, label=label)
    for i, k in enumerate(label.tolist()):
        one = mixture if k < 0 else GaussianMixture([1.0], mixture.means[k : k + 1], mixture.covs[k : k + 1])
        torch.testing.assert_close(
            got[i : i + 1], one.denoiser(path)(x[i : i + 1], 0.6), rtol=1e-11, atol=1e-11
        )
    with pytest.raises(ValueError, match="label must hold a number from -1 to 3"):
        d(x, 0.6, label=label + 1)
    with pytest.raises(ValueError, match="label must hold a number"):
        d(x, 0.6, label=2)


@every_kind
def test_responsibilities(mixture):
    path, x = paths.flow(), normals(7, 3)
    share = mixture.responsibilities(x, path, 0.5)
    torch.testing.assert_close(share.sum(-1), torch.ones(7, dtype=torch.float64))
    each = dense(mixture, 0.5, 0.5)
    wanted = (each.component_distribution.log_prob(x[:, None]) + mixture.weights.log()).softmax(-1)
    torch.testing.assert_close(share, wanted, rtol=1e-10, atol=1e-12)


# --- samples -----------------------------------------------------------------------------------------------------


@every_kind
def test_moments_of_samples(mixture):
    n = 40_000
    x = mixture.sample(n, seed=7)
    assert torch.equal(x, mixture.sample(n, seed=7)) and not torch.equal(x, mixture.sample(n, seed=8))
    centred = x - mixture.mean
    products = centred[:, :, None] * centred[:, None]
    # five standard errors, each from the samples' own spread
    assert ((x.mean(0) - mixture.mean).abs() < 5 * x.std(0) / n**0.5).all()
    assert ((products.mean(0) - mixture.cov).abs() < 5 * products.std(0) / n**0.5).all()
    # and the density: E[-log p] estimated from either half of the draws
    values = mixture.log_prob(x)
    halves = values[: n // 2].mean() - values[n // 2 :].mean()
    assert halves.abs() < 5 * values.std() * (4 / n) ** 0.5
    # negative control: another mixture's mean is far outside
    other = GaussianMixture(mixture.weights, mixture.means + 0.1, mixture.covs)
    assert not ((x.mean(0) - other.mean).abs() < 5 * x.std(0) / n**0.5).any()


def test_weights_of_samples():
    mixture = GaussianMixture([0.1, 0.6, 0.3], [[-10.0], [0.0], [10.0]], 1e-4)
    nearest = mixture.sample(20_000, seed=1).div(10).round().long().flatten() + 1
    counts = torch.bincount(nearest, minlength=3) / 20_000
    assert (
        (counts - mixture.weights).abs() < 5 * (mixture.weights * (1 - mixture.weights) / 20_000).sqrt()
    ).all()


def test_cov_and_mean_by_quadrature():
    mixture = random_mixture(2, 3, seed=6, stds=(0.3, 0.8))
    points, weights = plane()
    p = mixture.log_prob(points).exp() * weights
    torch.testing.assert_close(p @ points, mixture.mean, rtol=1e-10, atol=1e-10)
    centred = points - mixture.mean
    torch.testing.assert_close((p[:, None] * centred).mT @ centred, mixture.cov, rtol=1e-10, atol=1e-10)


# --- closed forms ------------------------------------------------------------------------------------------------


def plane(half=9.0, n=241):
    """A grid of the plane. On a Gaussian of deviation s the trapezoidal rule errs by exp(-2 (pi s / h)^2)."""
    line = torch.linspace(-half, half, n, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    return points, torch.full((n * n,), float(line[1] - line[0]) ** 2, dtype=torch.float64)


def check_expression(log_values, made, points, weights):
    """``made`` is exp(log_values), normalised, and its log_mass is the logarithm of the integral."""
    log_mass = (log_values + weights.log()).logsumexp(0)
    assert made.log_mass == pytest.approx(float(log_mass), rel=1e-10, abs=1e-10)
    kept = log_values - log_mass > -200
    torch.testing.assert_close(
        made.log_prob(points)[kept], (log_values - log_mass)[kept], rtol=1e-9, atol=1e-9
    )
    assert float(made.weights.sum()) == pytest.approx(1, rel=1e-12)


def flat_mixtures():
    return {
        "isotropic": GaussianMixture([0.4, 0.6], [[0.5, -1.0], [-0.7, 0.6]], [0.25, 0.4]),
        "diagonal": GaussianMixture([0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], [[0.3, 0.5], [0.6, 0.2]]),
        "full": random_mixture(2, 3, seed=8, stds=(0.4, 0.9)),
    }


@pytest.mark.parametrize("first", flat_mixtures())
@pytest.mark.parametrize("second", flat_mixtures())
def test_product(first, second):
    p, q = flat_mixtures()[first], flat_mixtures()[second]
    points, weights = plane()
    made = p.product(q)
    assert made.components == p.components * q.components
    check_expression(p.log_prob(points) + q.log_prob(points), made, points, weights)


@pytest.mark.parametrize("kind", flat_mixtures())
@pytest.mark.parametrize("beta", [1, 2, 3.0])
def test_power(kind, beta):
    mixture = flat_mixtures()[kind]
    points, weights = plane(n=301)
    made = mixture.power(beta)
    assert made.components == math.comb(mixture.components + int(beta) - 1, int(beta))
    check_expression(beta * mixture.log_prob(points), made, points, weights)


@pytest.mark.parametrize("beta", [0.4, 1.0, 2.5])
def test_power_of_one_gaussian(beta):
    one = random_mixture(2, 1, seed=9, stds=(0.4, 0.9))
    points, weights = plane()
    made = one.power(beta)
    torch.testing.assert_close(made.covs, one.covs / beta, rtol=1e-12, atol=1e-12)
    check_expression(beta * one.log_prob(points), made, points, weights)


@pytest.mark.parametrize("kind", flat_mixtures())
@pytest.mark.parametrize("B", [None, 0.5, -1.0, [0.3, -0.4], [[0.2, 0.3], [0.3, -0.5]]])
def test_tilt(kind, B):
    mixture = flat_mixtures()[kind]
    a = torch.tensor([0.7, -0.4], dtype=torch.float64)
    points, weights = plane()
    bend = torch.zeros(2, dtype=torch.float64) if B is None else torch.as_tensor(B, dtype=torch.float64)
    matrix = bend if bend.ndim == 2 else torch.diag_embed(bend.expand(2))
    log_values = (
        mixture.log_prob(points) + points @ a + 0.5 * torch.einsum("nd,de,ne->n", points, matrix, points)
    )
    check_expression(log_values, mixture.tilt(a, B), points, weights)


def test_the_expressions_tell_each_other_apart():
    """Negative control of ``check_expression``: near misses do not pass."""
    mixture, (points, weights) = flat_mixtures()["full"], plane()
    for near_miss in (
        mixture.power(2),
        mixture.tilt([1e-3, 0.0]),
        mixture.product(GaussianMixture([1.0], [[0.0, 0.0]], 1e4)),
    ):
        with pytest.raises(AssertionError):
            check_expression(mixture.log_prob(points), near_miss, points, weights)


def test_in_one_dimension():
    p, q = GaussianMixture([0.3, 0.7], [[-1.0], [1.0]], [0.2, 0.1]), GaussianMixture([1.0], [[0.4]], 0.5)
    grid = torch.linspace(-9, 9, 3001, dtype=torch.float64)[:, None]
    weights = torch.full((3001,), 18 / 3000, dtype=torch.float64)
    check_expression(p.log_prob(grid) + q.log_prob(grid), p.product(q), grid, weights)
    check_expression(4 * p.log_prob(grid), p.power(4), grid, weights)
    check_expression(p.log_prob(grid) + grid[:, 0] * 2 + grid[:, 0] ** 2, p.tilt([2.0], 2.0), grid, weights)


@every_path
@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_gaussian_trajectories(path, kind):
    covs = {"isotropic": 0.3, "diagonal": [[0.1, 0.5, 0.9]], "full": random_mixture(3, 1, seed=10).covs}[kind]
    one = GaussianMixture([1.0], [[0.5, -1.0, 2.0]], covs)
    carry = one.gaussian_trajectory
    start, middle, end = path.t_max, path.time(0.3), path.t_clean
    x = path.alpha(start) * one.mean + path.sigma(start) * normals(6, 3)
    # a flow of maps: it composes, it is its own inverse backwards, it stays where it is
    torch.testing.assert_close(
        carry(path, carry(path, x, start, middle), middle, end), carry(path, x, start, end)
    )
    torch.testing.assert_close(carry(path, carry(path, x, start, end), end, start), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(carry(path, x, middle, middle), x, rtol=1e-13, atol=1e-13)
    # it carries the marginal onto the marginal: whitened, nothing moves
    for t in (middle, end):
        before = dense(one, path.alpha(start), path.sigma(start)).log_prob(x)
        after = dense(one, path.alpha(t), path.sigma(t)).log_prob(carry(path, x, start, t))
        shift = after - before
        torch.testing.assert_close(shift, shift[0].expand(6), rtol=1e-9, atol=1e-9)
    # and it solves the ODE: central differences, whose error falls fourfold when h halves
    d, y = one.denoiser(path), carry(path, x, start, middle)
    errors = []
    for h in (2e-3 * middle, 1e-3 * middle):
        slope = (carry(path, y, middle, middle + h) - carry(path, y, middle, middle - h)) / (2 * h)
        errors.append((slope - d.velocity(y, middle)).abs().max().item())
    scale = d.velocity(y, middle).abs().max().item()
    if path.name == "vp_discrete":  # its lam bends at every index: first order, and small
        assert errors[1] < 1e-2 * scale
    else:
        assert errors[1] < 1e-5 * scale
        assert errors[0] / max(errors[1], 1e-16) == pytest.approx(4, rel=0.1) or errors[0] < 1e-10 * scale


def test_a_trajectory_from_alpha_zero():
    one = random_mixture(3, 1, seed=11)
    noise = normals(5, 3)
    got = one.gaussian_trajectory(paths.flow(), noise, 1.0, 0.0)
    values, vectors = torch.linalg.eigh(one.covs[0])
    root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
    torch.testing.assert_close(got, one.mean + noise @ root, rtol=1e-12, atol=1e-12)


def test_ring_and_random_mixture():
    modes = ring(modes=6, radius=3.0, std=0.2)
    torch.testing.assert_close(modes.means.norm(dim=-1), torch.full((6,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(modes.covs[2], 0.04 * torch.eye(2, dtype=torch.float64))
    again = random_mixture(5, 3, seed=1)
    assert torch.equal(again.means, random_mixture(5, 3, seed=1).means)
    assert not torch.equal(again.means, random_mixture(5, 3, seed=2).means)
    assert again.values.min().sqrt() >= 0.1 - 1e-9 and again.values.max().sqrt() <= 0.6 + 1e-9
    torch.testing.assert_close(
        (again.vectors.mT @ again.vectors), torch.eye(5, dtype=torch.float64).expand(3, 5, 5)
    )


TWO = GaussianMixture([0.5, 0.5], [[0.0, 0.0], [1.0, 1.0]], 0.25)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: GaussianMixture([1.0], [0.0], 1.0), ValueError, "means must have shape"),
        (lambda: GaussianMixture([1.0, 1.0], [[0.0]], 1.0), ValueError, "weights must have shape"),
        (lambda: GaussianMixture([0.0], [[0.0]], 1.0), ValueError, "weights must be positive"),
        (lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[1.0, 1.0, 1.0]]), ValueError, "covs must be a number"),
        (lambda: GaussianMixture([1.0], [[0.0]], 0.0), ValueError, "positive definite"),
        (lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]), ValueError, "positive definite"),
        (lambda: GaussianMixture([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]]), ValueError, "symmetric"),
        (lambda: TWO.power(1.5), ValueError, "whole number"),
        (lambda: TWO.power(-1), ValueError, "beta must be positive"),
        (lambda: ring(50).power(8), ValueError, "components"),
        (lambda: TWO.product(random_mixture(3, 1)), ValueError, "dimension 2"),
        (lambda: TWO.product(3.0), ValueError, "dimension 2"),
        (lambda: TWO.tilt([1.0]), ValueError, "a must be"),
        (lambda: TWO.tilt([0.0, 0.0], [1.0, 2.0, 3.0]), ValueError, "B must be a number"),
        (lambda: TWO.tilt([0.0, 0.0], [[0.0, 1.0], [0.0, 0.0]]), ValueError, "symmetric"),
        (lambda: TWO.tilt([0.0, 0.0], 4.0), ValueError, "positive definite"),
        (lambda: TWO.gaussian_trajectory(paths.flow(), torch.zeros(1, 2), 1.0, 0.0), ValueError, "one component"),
        (lambda: TWO.denoiser("flow"), TypeError, "path"),
        (lambda: TWO.denoiser(paths.flow())(torch.zeros(4, 3), 0.5), ValueError, "x must hold 2 numbers"),
        (lambda: TWO.denoiser(paths.flow())(torch.zeros(4, 2), torch.zeros(4, 2)), ValueError, "one a sample"),
        (lambda: TWO.log_prob(torch.zeros(4, 3)), ValueError, "x must have 2 numbers"),
        (lambda: TWO.log_prob(torch.zeros(4, 2), paths.flow()), ValueError, "path and t go together"),
        (lambda: TWO.posterior(torch.zeros(2), paths.flow(), 0.0), ValueError, "sigma > 0"),
        (lambda: random_mixture(0, 3), ValueError, "dim and components"),
        (lambda: random_mixture(2, 3, stds=(0.5, 0.1)), ValueError, "stds"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(make, error, says):
    with pytest.raises(error, match=says):
        make()
