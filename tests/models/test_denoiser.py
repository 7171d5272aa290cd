"""The Denoiser: every prediction on every path says the same x0, eps, velocity and score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.models import Denoiser, paths
from fewstep.models.denoiser import PREDICTS, convert

ALL = {name: paths.by_name(name) for name in paths.NAMES}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
every_prediction = pytest.mark.parametrize("predicts", PREDICTS)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(path, t, x0, eps):
    """What each prediction and each form is made of, with the path's derivatives taken by autograd."""
    t = torch.as_tensor(t, dtype=torch.float64).clone().requires_grad_()
    alpha, sigma = path.alpha(t), path.sigma(t)

    def slope(value):
        (grad,) = torch.autograd.grad(value.sum(), t) if value.requires_grad else (torch.zeros_like(t),)
        return grad

    def wide(value):
        return value.detach().reshape(value.shape + (1,) * (x0.ndim - value.ndim))

    a, s, da, ds = wide(alpha), wide(sigma), wide(slope(alpha)), wide(slope(sigma))
    quantities = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": da * x0 + ds * eps, "score": -eps / s}
    return a * x0 + s * eps, quantities


def middle_times(path):
    """Times where neither signal nor noise is small, so that rounding grows by no more than a few."""
    return [path.time(lam) for lam in (1.5, 0.0, -1.5)]


@every_path
@every_prediction
def test_all_predictions_agree(path, predicts):
    x0, eps = normals(4, 2, 3), normals(4, 2, 3, seed=1)
    frames = torch.tensor([middle_times(path)[:2]] * 4, dtype=torch.float64)
    each = torch.tensor(middle_times(path) + [path.time(0.4)], dtype=torch.float64)
    for t in (*middle_times(path), each, frames, each.numpy()):
        x, exact = truth(path, t, x0, eps)
        d = Denoiser(lambda x, tau, exact=exact: exact[predicts], path, predicts=predicts)
        for got, wanted in (
            (d(x, t), exact["x0"]),
            (d.eps(x, t), exact["eps"]),
            (d.velocity(x, t), exact["flow"]),
            (d.score(x, t), exact["score"]),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@every_path
@every_prediction
def test_affine_is_what_the_calls_do(path, predicts):
    x0, eps = normals(3, 5), normals(3, 5, seed=1)
    times = middle_times(path)
    for i, t in enumerate(times):
        x, exact = truth(path, t, x0, eps)
        d = Denoiser(lambda x, tau, exact=exact: exact[predicts], path, predicts=predicts)
        for form, name in (("x0", "x0"), ("eps", "eps"), ("v", "flow")):
            p, (q,) = d.affine(t, form)
            assert type(p) is float and type(q) is float
            torch.testing.assert_close(p * x + q * d.raw(x, t)[0], exact[name], rtol=1e-12, atol=1e-12)
            # arrays and tensors hold the same numbers
            for kind in (np.array(times), torch.tensor(times, dtype=torch.float64)):
                many_p, (many_q,) = d.affine(kind, form)
                many_p, many_q = np.broadcast_to(many_p, 3), np.broadcast_to(many_q, 3)
                assert many_p[i] == pytest.approx(p, rel=1e-13, abs=1e-15)
                assert many_q[i] == pytest.approx(q, rel=1e-13, abs=1e-15)


@every_path
def test_a_wrong_prediction_is_seen(path):
    """Negative control: an eps network that is called an x0 network misses x0 by far."""
    x0, eps = normals(4, 3), normals(4, 3, seed=1)
    t = path.time(0.0)
    x, exact = truth(path, t, x0, eps)
    wrong = Denoiser(lambda x, tau: exact["eps"], path, predicts="x0")
    assert (wrong(x, t) - x0).abs().mean() > 0.5


@every_path
@pytest.mark.parametrize("given", PREDICTS)
@pytest.mark.parametrize("wanted", PREDICTS)
def test_convert_has_an_inverse(path, given, wanted):
    for t in middle_times(path):
        p, q = convert(path, t, given, wanted)
        back_p, back_q = convert(path, t, wanted, given)
        assert q * back_q == pytest.approx(1, rel=1e-12)
        assert back_p + back_q * p == pytest.approx(0, abs=1e-12)


def test_both_ends():
    x = normals(2, 3)
    flow = paths.flow()
    d = Denoiser(lambda x, tau: torch.ones_like(x), flow, predicts="flow")
    torch.testing.assert_close(d(x, 1.0), x - 1)  # alpha = 0: x0 = x - v
    torch.testing.assert_close(d.eps(x, 1.0), x)
    torch.testing.assert_close(d(x, 0.0), x)  # sigma = 0
    estimate = Denoiser(lambda x, tau: torch.ones_like(x), flow, predicts="x0")
    torch.testing.assert_close(estimate.velocity(x, 1.0), x - 1)
    noise = Denoiser(lambda x, tau: torch.ones_like(x), flow, predicts="eps")
    with pytest.raises(ValueError, match="t must be a time where x0 follows from eps"):
        noise(x, 1.0)
    for path in ALL.values():
        torch.testing.assert_close(Denoiser(lambda x, tau: x + 1, path)(x, path.t_clean), x)
        with pytest.raises(ValueError, match="score"):
            Denoiser(lambda x, tau: x, path).score(x, path.t_clean)


# --- EDM's preconditioning ---------------------------------------------------------------------------------------


def edm_formula(net, x, sigma, sigma_data):
    """x0 as 2206.00364 writes it (table 1), for x = x0 + sigma eps."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    scale = 1 / (sigma**2 + sigma_data**2).sqrt()
    return skip * x + out * net(scale * x, sigma.flatten().log() / 4)


@every_path
def test_edm_preconditioning(path):
    weight = normals(3, 3, seed=2)

    def net(x, tau):
        return torch.tanh(x @ weight + tau[:, None])

    d = Denoiser(net, path, predicts="x0", precond="edm", sigma_data=0.7)
    x = normals(4, 3)
    t = torch.tensor([path.time(lam) for lam in (3.0, 0.5, -0.5, -3.0)], dtype=torch.float64)
    alpha = path.alpha(t)[:, None]
    wanted = edm_formula(net, x / alpha, path.rho(t), 0.7)
    # x / alpha is up to e^3 here, and its rounding passes through c_skip and tanh
    torch.testing.assert_close(d(x, t), wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(d(x, float(t[1]))[1], wanted[1], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        d.eps(x, t), (x - alpha * wanted) / path.sigma(t)[:, None], rtol=1e-11, atol=1e-11
    )


def test_edm_preconditioning_where_alpha_is_zero():
    seen = []

    def net(x, tau):
        seen.append((x, tau))
        return torch.full_like(x, 2.0)

    d = Denoiser(net, paths.flow(), predicts="x0", precond="edm", sigma_data=0.7)
    x = normals(2, 3)
    torch.testing.assert_close(
        d(x, 1.0), torch.full_like(x, 2 * 0.7)
    )  # c_skip/alpha -> 0, c_out -> sigma_data
    torch.testing.assert_close(seen[-1][0], x)  # unit variance already
    assert (seen[-1][1] == math.inf).all()
    torch.testing.assert_close(d(x, torch.ones(2, dtype=torch.float64)), torch.full_like(x, 1.4))
    near = d(x, 1 - 1e-9)
    assert (near - 1.4).abs().max() < 1e-8


def test_edm_preconditioning_at_the_clean_end_keeps_x():
    d = Denoiser(lambda x, tau: torch.ones_like(x), paths.edm(), predicts="x0", precond="edm")
    x = normals(2, 3)
    torch.testing.assert_close(d(x, 0.0), x)


# --- what a network is handed ------------------------------------------------------------------------------------


def test_a_network_gets_one_time_a_sample():
    seen = []

    def net(x, tau):
        seen.append(tau)
        return x

    x = normals(3, 2)
    d = Denoiser(net, paths.flow(), predicts="flow")
    scaled = Denoiser(net, paths.flow(), predicts="flow", time=lambda t: 1000 * t)
    d(x, 0.1), d(x.float(), 0.1), d(x, torch.tensor(0.1)), scaled(x, 0.25), d(x, 1)
    d(x, torch.tensor([0.1, 0.2, 0.3]))
    assert all(tau.shape == (3,) for tau in seen)
    assert [tau.dtype for tau in seen[:2]] == [torch.float64, torch.float32]
    assert seen[0][0] == 0.1 and seen[3][0] == 250.0 and seen[4][0] == 1.0
    assert torch.equal(seen[5], torch.tensor([0.1, 0.2, 0.3]).double())


def test_conditions_pass_through():
    d = Denoiser(lambda x, tau, label: x + label[:, None], paths.edm(), predicts="x0")
    x = normals(2, 3)
    assert torch.equal(d(x, 1.0, label=torch.tensor([1, 2])), x + torch.tensor([[1], [2]]))


def test_a_bfloat16_network_under_a_float32_state():
    net = nn.Linear(4, 4).to(torch.bfloat16)
    seen = []

    def call(x, tau):
        seen.append((x.dtype, tau.dtype))
        return net(x)

    d = Denoiser(call, paths.flow(), predicts="flow", net=net)
    x = normals(3, 4).float()
    assert d.dtype == torch.bfloat16
    answer = d(x, 0.5)
    assert seen == [(torch.bfloat16, torch.float32)]
    assert answer.dtype == torch.float32 and d.raw(x, 0.5)[0].dtype == torch.bfloat16
    # only the network's own numbers are rounded: what it is combined with is float32
    assert torch.equal(answer, x - 0.5 * net(x.to(torch.bfloat16)).float())
    assert torch.equal(d(x, 0.0), x)
    forced = Denoiser(call, paths.flow(), predicts="flow", net=net.float(), dtype=torch.float32)
    forced(x, 0.5)
    assert seen[-1] == (torch.float32, torch.float32)


def test_tap_collects_and_leaves():
    net = nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 2)).double()
    d = Denoiser(lambda x, tau: net(x), paths.edm(), predicts="x0", net=net)
    x = normals(3, 2)
    with d.tap(["0", "1"]) as features:
        answer = d(x, 1.0)
    assert torch.equal(features["0"], net[0](x)) and torch.equal(features["1"], net[1](net[0](x)))
    assert torch.equal(net[2](features["1"]), answer)
    features.clear()
    d(x, 1.0)
    assert not features, "no hook outlives its block"
    with pytest.raises(RuntimeError, match="inside"), d.tap(["0"]):
        raise RuntimeError("inside")
    assert not any(module._forward_hooks for module in net)
    with pytest.raises(ValueError, match="no 7"), d.tap(["7"]):
        pass
    with pytest.raises(ValueError, match="net="), Denoiser(lambda x, tau: x, paths.edm()).tap(["0"]):
        pass


class Blend(Denoiser):
    """A composite as guidance makes them: w of one denoiser, 1 - w of another."""

    def __init__(self, first, second, weight):
        super().__init__(lambda x, tau: x, first.path, predicts="x0")
        self.first, self.second, self.weight = first, second, weight

    def parts(self):
        return self.first.parts() + self.second.parts()

    def raw(self, x, t, **cond):
        return self.first.raw(x, t, **cond) + self.second.raw(x, t, **cond)

    def affine(self, t, form="x0"):
        (p, qs), (r, ss) = self.first.affine(t, form), self.second.affine(t, form)
        w = self.weight
        return w * p + (1 - w) * r, tuple(w * q for q in qs) + tuple((1 - w) * s for s in ss)


def test_a_composite_is_its_parts():
    path = paths.vp_cosine()
    one = Denoiser(lambda x, tau: x.sin(), path, predicts="eps")
    two = Denoiser(lambda x, tau: x.cos(), path, predicts="v")
    three = Denoiser(lambda x, tau: x * 0.5, path, predicts="x0")
    assert one.parts() == (one,)
    blend = Blend(Blend(one, two, 0.3), three, 2.5)
    assert blend.parts() == (one, two, three)
    x, t = normals(4, 3), 0.4
    assert len(blend.raw(x, t)) == len(blend.affine(t)[1]) == 3
    for method in ("__call__", "eps", "velocity", "score"):
        alone = [getattr(part, method)(x, t) for part in blend.parts()]
        wanted = 2.5 * (0.3 * alone[0] + 0.7 * alone[1]) - 1.5 * alone[2]
        torch.testing.assert_close(getattr(blend, method)(x, t), wanted, rtol=1e-12, atol=1e-12)


def test_gradients_pass_through():
    path = paths.vp_linear()
    for predicts in PREDICTS:
        d = Denoiser(lambda x, tau: torch.tanh(x), path, predicts=predicts)
        x = normals(2, 2).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, d=d: d(x, 0.4), x)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(call=3, path=paths.flow()), TypeError, "call must be a function"),
        (dict(call=lambda x, tau: x, path="flow"), TypeError, "path must be a fewstep path"),
        (
            dict(call=lambda x, tau: x, path=paths.flow(), predicts="noise"),
            ValueError,
            "eps, x0, v, flow, score",
        ),
        (
            dict(call=lambda x, tau: x, path=paths.flow(), precond="karras"),
            ValueError,
            "precond must be 'edm'",
        ),
        (dict(call=lambda x, tau: x, path=paths.flow(), precond="edm"), ValueError, "predicts must be 'x0'"),
    ],
)
def test_errors_name_the_argument(arguments, error, says):
    with pytest.raises(error, match=says):
        Denoiser(**arguments)


def test_bad_forms_and_times():
    d = Denoiser(lambda x, tau: x, paths.flow())
    with pytest.raises(ValueError, match="form must be one of x0, eps, v"):
        d.affine(0.5, "flow")
    with pytest.raises(ValueError, match="t must broadcast"):
        d(normals(3, 2), torch.full((3, 2, 2), 0.5))


@every_path
@pytest.mark.parametrize("precond", [None, "edm"])
def test_a_sample_is_the_same_bits_in_any_batch(path, precond):
    d = Denoiser(lambda x, tau: x * 0.5, path, predicts="x0", precond=precond)
    x = normals(37, 3)
    for t in (torch.linspace(path.t_min, path.time(-4.0), 37, dtype=torch.float64), path.time(0.3)):
        for call in (d, d.eps, d.velocity, d.score):
            together = call(x, t)
            for n in (1, 3, 5):
                parts = [
                    call(x[i : i + n], t if isinstance(t, float) else t[i : i + n]) for i in range(0, 37, n)
                ]
                assert torch.equal(torch.cat(parts), together)
