"""Paths: inverses and both ends to rounding, derivatives against autograd, the same kind out as in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fewstep.models import paths

ALL = {
    "vp_linear": paths.vp_linear(),
    "vp_cosine": paths.vp_cosine(),
    "vp_discrete": paths.vp_discrete(paths.ddpm_alphas_cumprod()),
    "vp_discrete_sd": paths.vp_discrete(paths.ddpm_alphas_cumprod("scaled_linear", 0.00085, 0.012)),
    "edm": paths.edm(),
    "flow": paths.flow(),
}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
FUNCTIONS = ("alpha", "sigma", "lam", "rho", "alpha_prime", "sigma_prime")


def inside(path, n=97):
    """Times strictly between the ends, off the integers where a table bends."""
    return path.t_clean + (path.t_max - path.t_clean) * (np.arange(n) + 0.317) / n


@every_path
def test_time_inverts_lam(path):
    t = inside(path)
    scale = path.t_max - path.t_clean
    assert np.abs(path.time(path.lam(t)) - t).max() <= 1e-12 * scale
    torch_t = torch.as_tensor(t)
    assert (path.time(path.lam(torch_t)) - torch_t).abs().max() <= 1e-12 * scale
    for one in t[::16]:
        assert abs(path.time(path.lam(float(one))) - one) <= 1e-12 * scale
        assert abs(path.time_of_rho(path.rho(float(one))) - one) <= 1e-12 * scale
    np.testing.assert_allclose(path.time_of_rho(path.rho(t)), t, rtol=0, atol=1e-12 * scale)
    assert (path.time_of_rho(path.rho(torch_t)) - torch_t).abs().max() <= 1e-12 * scale


@every_path
def test_lam_inverts_time(path):
    lam = np.linspace(
        path.lam(path.t_max) if path.t_max < 1 or path.alpha(path.t_max) > 0 else -9.0, 12.0, 61
    )
    back = path.lam(path.time(lam))
    # an ulp of t moves lam by |dlam/dt| ulp(t); t = -1 + rho/rho_0 of a table is that badly placed at high lam
    t = path.time(lam)
    slope = np.abs(path.alpha_prime(t) / path.alpha(t) - path.sigma_prime(t) / path.sigma(t))
    assert (np.abs(back - lam) <= 1e-13 + 8 * np.spacing(np.maximum(np.abs(t), 1.0)) * slope).all()


@every_path
def test_both_ends_are_exact(path):
    assert path.sigma(path.t_clean) == 0.0 and path.alpha(path.t_clean) == 1.0
    assert path.lam(path.t_clean) == math.inf and path.time(math.inf) == path.t_clean
    assert path.rho(path.t_clean) == 0.0 and path.time_of_rho(0.0) == path.t_clean
    assert abs(path.time(path.lam(path.t_max)) - path.t_max) <= 1e-12 * path.t_max
    assert path.t_clean < path.t_min + 1e-12 < path.t_max or path.t_min == 0.0
    for end in (path.t_clean, path.t_max):
        for kind in (np.array([end]), torch.tensor([end], dtype=torch.float64)):
            assert float(path.sigma(kind)[0]) == pytest.approx(path.sigma(end), abs=1e-15)
            assert float(path.alpha(kind)[0]) == pytest.approx(path.alpha(end), abs=1e-15)
        assert math.isfinite(path.alpha_prime(end))


def test_a_flow_starts_at_alpha_zero():
    path = paths.flow()
    assert path.alpha(1.0) == 0.0 and path.lam(1.0) == -math.inf and path.rho(1.0) == math.inf
    assert path.time(-math.inf) == 1.0 and path.time_of_rho(math.inf) == 1.0


@every_path
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_kind_comes_out(path, function):
    call = getattr(path, function)
    grid = inside(path, 12).reshape(3, 4)
    array, tensor = call(grid), call(torch.as_tensor(grid))
    assert isinstance(array, np.ndarray) and array.dtype == np.float64 and array.shape == (3, 4)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and tensor.shape == (3, 4)
    np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-13, atol=1e-14)
    one = call(float(grid[1, 2]))
    assert type(one) is float and one == pytest.approx(array[1, 2], rel=1e-13)
    assert isinstance(call(np.asarray(grid[0, 0])), (np.ndarray, np.float64))
    assert call(torch.tensor(float(grid[0, 0]), dtype=torch.float32)).dtype == torch.float64
    middle = int(0.5 * path.t_max)
    assert call(middle) == call(float(middle)), "an int is a time like another"


@every_path
def test_derivatives_are_autograds(path):
    t = torch.as_tensor(inside(path)).requires_grad_()
    for function, derivative in ((path.alpha, path.alpha_prime), (path.sigma, path.sigma_prime)):
        value = function(t)
        (slope,) = torch.autograd.grad(value.sum(), t) if value.requires_grad else (torch.zeros_like(t),)
        # both differentiate 1 - alpha^2 near rounding at the noise end: relative to the largest slope there is
        torch.testing.assert_close(derivative(t.detach()), slope, rtol=1e-10, atol=1e-13)


def test_derivatives_at_the_clean_end():
    for path in (ALL["vp_discrete"], ALL["edm"], ALL["flow"]):
        h = 1e-7
        t = path.t_clean
        forward = (path.sigma(t + h) - path.sigma(t)) / h
        assert path.sigma_prime(t) == pytest.approx(forward, rel=4 * h + 4e-16 / h)
    for path in (ALL["vp_linear"], ALL["vp_cosine"]):
        assert path.sigma_prime(0.0) == math.inf  # sigma grows like sqrt(t)


@every_path
def test_lam_is_the_log_ratio(path):
    t = inside(path)
    np.testing.assert_allclose(
        path.lam(t), np.log(path.alpha(t)) - np.log(path.sigma(t)), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(path.rho(t), np.exp(-path.lam(t)), rtol=1e-12)
    assert (np.diff(path.lam(t)) < 0).all()


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("vp")])
def test_variance_preserving(name):
    t = inside(ALL[name])
    np.testing.assert_allclose(ALL[name].alpha(t) ** 2 + ALL[name].sigma(t) ** 2, 1, rtol=1e-14)


def test_edm_and_flow_preserve_no_variance():
    for path in (paths.edm(), paths.flow()):
        assert abs(path.alpha(0.5) ** 2 + path.sigma(0.5) ** 2 - 1) > 0.2


@every_path
def test_a_time_rounds_alike_wherever_it_stands(path):
    t = torch.as_tensor(inside(path, 37))
    for function in FUNCTIONS:
        together = getattr(path, function)(t)
        for n in (1, 3, 5):
            alone = torch.cat([getattr(path, function)(part) for part in t.split(n)])
            assert torch.equal(alone, together), function


@every_path
def test_config_round_trip(path):
    again = paths.from_config(json.loads(json.dumps(path.to_config())))
    assert again == path and hash(again) == hash(path)
    t = inside(path)
    assert np.array_equal(again.lam(t), path.lam(t))


def test_the_table_is_what_it_was_made_from():
    betas = np.linspace(1e-4, 0.02, 1000)
    path = ALL["vp_discrete"]
    expected = np.cumprod(1 - betas)
    k = np.arange(1000.0)
    np.testing.assert_allclose(path.alpha(k) ** 2, expected, rtol=1e-12)
    assert paths.vp_discrete(torch.as_tensor(expected)) == paths.vp_discrete(expected)
    # linear between: lam inside, rho below 0
    assert path.lam(10.25) == pytest.approx(0.75 * path.lam(10.0) + 0.25 * path.lam(11.0), rel=1e-14)
    assert path.rho(-0.4) == pytest.approx(0.6 * path.rho(0.0), rel=1e-14)


@every_path
def test_add_noise_broadcasts(path):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    t = 0.3 * path.t_max
    whole = path.add_noise(x0, t, eps)
    torch.testing.assert_close(whole, path.alpha(t) * x0 + path.sigma(t) * eps, rtol=0, atol=0)
    each = torch.linspace(path.t_clean, path.t_max, 12, dtype=torch.float64).reshape(4, 3)
    frames = path.add_noise(x0, each, eps)
    samples = path.add_noise(x0, each[:, 0], eps)
    for b in range(4):
        one = path.add_noise(x0[b], float(each[b, 0]), eps[b])
        torch.testing.assert_close(samples[b], one, rtol=1e-14, atol=1e-15)
        for f in range(3):
            one = path.add_noise(x0[b, f], float(each[b, f]), eps[b, f])
            torch.testing.assert_close(frames[b, f], one, rtol=1e-14, atol=1e-15)
    assert path.add_noise(x0.float(), each[:, 0], eps.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="broadcast"):
        path.add_noise(x0[0, 0], each, eps[0, 0])


def test_paths_are_frozen():
    with pytest.raises(AttributeError):
        paths.flow().shift = 2.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: paths.vp_linear(beta_0=-1.0), "beta_0"),
        (lambda: paths.vp_linear(beta_0=30.0), "beta_0"),
        (lambda: paths.flow(shift=0.0), "shift"),
        (lambda: paths.edm(sigma_max=0.001), "sigma_max"),
        (lambda: paths.vp_discrete([0.9]), "alphas_cumprod"),
        (lambda: paths.vp_discrete([0.5, 0.9]), "falling"),
        (lambda: paths.vp_discrete([0.9, 0.0]), "terminal"),
        (lambda: paths.by_name("vp"), "vp_linear"),
        (lambda: paths.from_config({"path": "vp"}), "vp_linear"),
        (lambda: paths.from_config({"path": "flow", "shfit": 3.0}), "shfit"),
        (lambda: paths.ddpm_alphas_cumprod("cosine"), "scaled_linear"),
    ],
)
def test_errors_name_the_argument(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_by_name():
    assert all(paths.by_name(name).name == name for name in paths.NAMES)
    assert paths.by_name("flow", shift=3.0).shift == 3.0
