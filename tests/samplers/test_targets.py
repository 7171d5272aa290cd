"""Targets: their exponents, their scores against closed forms, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewstep.models import Denoiser, GaussianMixture, load, paths
from fewstep.samplers import Blend, cfg, ddim, grids, targets
from fewstep.samplers.divergence import with_divergence
from fewstep.samplers.guidance import rlg
from fewstep.samplers.powers import Powers, exponents_of, scaled

P = GaussianMixture([0.3, 0.7], [[-2.0, 0.0], [1.5, 1.0]], [[0.2, 0.5], [0.6, 0.3]])
Q = GaussianMixture([0.5, 0.5], [[-1.0, 0.4], [1.0, 0.0]], 0.4)
ONE = GaussianMixture([1.0], [[0.5, -1.0]], 0.7)


def bound(target, *mixtures, path=None):
    path = path or paths.edm()
    return target.bind(tuple(m.denoiser(path) for m in mixtures))


@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "flow", "score"])
@pytest.mark.parametrize("path", [paths.edm(), paths.vp_linear(), paths.flow()], ids=lambda p: p.name)
def test_the_score_of_a_product_of_powers_is_the_sum(path, predicts):
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    t = path.time_of_rho(0.8)
    d = Powers((P.denoiser(path, predicts), Q.denoiser(path, "x0")), (2.0, -0.5))
    wanted = 2 * P.score(x, path, t) - 0.5 * Q.score(x, path, t)
    assert torch.allclose(d.score(x, t), wanted, rtol=1e-9)
    assert torch.allclose(d.eps(x, t), -path.sigma(t) * wanted, rtol=1e-9)
    assert torch.allclose(path.alpha(t) * d(x, t) + path.sigma(t) * d.eps(x, t), x, rtol=1e-9)
    v = path.alpha_prime(t) * d(x, t) + path.sigma_prime(t) * d.eps(x, t)
    assert torch.allclose(d.velocity(x, t), v, rtol=1e-9)
    # the control: a sum of x0 estimates is another vector
    assert not torch.allclose(2 * P.denoiser(path)(x, t) - 0.5 * Q.denoiser(path)(x, t), d(x, t), rtol=1e-2)


def test_exponents_multiply_through_nested_guidance():
    d = load("digits")
    assert exponents_of(targets.anneal(2.0).bind((cfg(d, 3.0),)), 1.0) == (-4.0, 6.0)
    pair = P.denoiser(paths.edm()), Q.denoiser(paths.edm())
    assert exponents_of(targets.geometric(2.5).bind(pair), 1.0) == (-1.5, 2.5)
    assert exponents_of(targets.rlg(*pair, 1.6).bind(pair[:1]), 1.0) == pytest.approx((-0.6, 1.6))
    assert exponents_of(targets.rlg(None, pair[1], 1.6).bind(pair[:1]), 1.0) == pytest.approx((-0.6, 1.6))
    four = rlg(cfg(d, 2.0), cfg(d, 3.0), 1.5)
    assert exponents_of(targets.own().bind((four,)), 1.0) == pytest.approx((0.5, -1.0, -3.0, 4.5))
    assert exponents_of(targets.product(powers=(1.0, 0.5)).bind(pair), 1.0) == (1.0, 0.5)
    assert targets.product(2.0).bind(pair).total == 4.0


def test_cfg_is_of_conditions_of_models_or_of_what_is_guided_already():
    d = P.denoiser(paths.edm())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
    a = targets.cfg({"label": 1}, {"label": -1}, scale=3.0).bind((d,))
    label = {"label": torch.full((4,), 1)}
    wanted = cfg(d, 3.0, null={"label": -1})(x, 0.7, **label)
    assert torch.equal(a.children[0](x, 0.7, label=torch.zeros(4).long()), wanted)
    one, both = GaussianMixture([1.0], P.means[1:], P.covs[1:]).denoiser(paths.edm()), d
    assert torch.allclose(targets.cfg(one, both, scale=3.0).bind((d,)).children[0](x, 0.7), wanted)
    guided = cfg(d, 5.0, null={"label": -1})
    assert exponents_of(targets.cfg().bind((guided,)), 1.0) == (-4.0, 5.0)
    again = targets.cfg(scale=3.0).bind((guided,))
    assert exponents_of(again, 1.0) == (-2.0, 3.0)
    assert torch.equal(again.children[0](x, 0.7, **label), wanted)
    inside = targets.cfg({"label": 1}, {"label": -1}, scale=3.0, interval=(0.5, 2.0)).bind((d,))
    assert exponents_of(inside, 1.0) == (-2.0, 3.0) and exponents_of(inside, 4.0) == (0.0, 1.0)


def test_the_reward_comes_on_in_the_log_of_the_noise():
    path = paths.flow()
    tilt = targets.tilt(lambda x: x[:, 0], 2.0, ramp=(0.1, 10.0)).tilt
    times = np.array([1.0, path.time_of_rho(10.0), path.time_of_rho(1.0), path.time_of_rho(0.1), 0.0])
    assert np.allclose(tilt.beta(path, times), [0.0, 0.0, 1.0, 2.0, 2.0])
    assert targets.tilt(lambda x: x[:, 0], of=targets.anneal(2.0)).bind((P.denoiser(path),)).total == 2.0


def test_a_table_at_another_scale():
    path = paths.vp_linear()
    table = ddim(path, grids.uniform(path, 5), eta=1.0)
    other = scaled(table, 0.5, 0.25)
    a, b = table.unrolled(), other.unrolled()
    assert np.allclose(b.noise, 0.5 * a.noise) and np.allclose(b.z, 0.25 * a.z) and np.array_equal(a.d, b.d)
    assert scaled(table, 1.0, 1.0) is table


def jacobian_trace(d, x, t):
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda y: d.eps(y[None], t)[0], one).trace() for one in x]
    )


def test_divergences_are_traces():
    d = Powers((P.denoiser(paths.flow(), "flow"), Q.denoiser(paths.flow(), "eps")), (2.0, -0.5))
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(2)).double()
    outputs, exact, _ = with_divergence(d, x, 0.6, {})
    wanted = jacobian_trace(d, x, 0.6)
    assert torch.allclose(exact, wanted, rtol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(outputs, d.raw(x, 0.6), strict=True))
    # all four corners of the square are all the signs that there are: their mean is the trace, not only nearly
    corners = [torch.tensor([a, b]).double().expand(3, 2) for a in (-1, 1) for b in (-1, 1)]
    assert torch.allclose(with_divergence(d, x, 0.6, {}, "eps", corners)[1], wanted, rtol=1e-9)
    assert not torch.allclose(with_divergence(d, x, 0.6, {}, "eps", corners[:1])[1], wanted, rtol=1e-2)


def test_networks_without_a_forward_derivative_go_backwards(monkeypatch):
    d = load("digits")
    x, v = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    label = {"label": torch.tensor([3, 7])}
    probes = [v.sign()]
    outputs, forward, _ = with_divergence(d, x, 1.0, label, "eps", probes)

    def refused(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(torch.func, "jvp", refused)
    again, backward, _ = with_divergence(d, x, 1.0, label, "eps", probes)
    assert torch.allclose(forward, backward, rtol=1e-4) and torch.allclose(outputs[0], again[0], atol=1e-5)
    assert not again[0].requires_grad
    h = 1e-2 * probes[0]
    slope = (d.eps(x + h, 1.0, **label) - d.eps(x - h, 1.0, **label)).detach() / 2e-2
    assert torch.allclose((slope * probes[0]).flatten(1).sum(1).double(), forward.double(), rtol=2e-2)


def refuse(match, call, kind=ValueError):
    with pytest.raises(kind, match=match):
        call()


def test_bad_targets_are_named():
    d, e = P.denoiser(paths.edm()), Q.denoiser(paths.edm())
    refuse("beta must be positive, got -1", lambda: targets.anneal(-1.0))
    refuse("beta must be a finite number", lambda: targets.anneal("2"))
    refuse("beta must be a finite number", lambda: targets.product(math.nan))
    refuse("target anneal needs one model, got 2", lambda: targets.anneal(2.0).bind((d, e)))
    refuse("target product needs two models or more", lambda: targets.product().bind((d,)))
    refuse("powers must be one number a model, 2", lambda: targets.product(powers=(1.0,)).bind((d, e)))
    refuse("positive sum", lambda: targets.product(powers=(1.0, -1.0)).bind((d, e)))
    refuse("target geometric needs 2 models", lambda: targets.geometric(2.0).bind((d,)))
    refuse("must be two Denoisers or two sets", lambda: targets.cfg(d, {"label": 1}, 2.0), TypeError)
    refuse("scale must be given", lambda: targets.cfg().bind((d,)))
    refuse("d must be a Denoiser or a list", lambda: targets.anneal(2.0).bind((None,)), TypeError)
    refuse("gradient must be 'none', 'half' or 'full'", lambda: targets.tilt(len, gradient="some"))
    refuse("reward must be a function", lambda: targets.tilt(3.0), TypeError)
    refuse("ramp must be", lambda: targets.tilt(len, ramp=(3.0, 0.1)))
    refuse("ramp must be two noise levels", lambda: targets.tilt(len, ramp=3.0))
    refuse("of must be a target without a reward", lambda: targets.tilt(len, of=targets.tilt(len)))

    def counted(x):
        return x

    counted.differentiable = False
    refuse("gradient must be 'none' for a reward without one", lambda: targets.tilt(counted, gradient="half"))


def test_one_branch_is_refused_for_guidance_by_name():
    """A network whose guidance was distilled into it has no unconditional branch."""
    distilled = Denoiser(lambda x, tau, guidance: x, paths.flow(), predicts="flow")
    refuse(
        "target cfg needs a model with an unconditional branch",
        lambda: targets.cfg(scale=3.5).bind((distilled,)),
    )
    rescaled = cfg(load("digits"), 2.0, rescale=0.5)
    refuse("target own needs models whose score is a weighted sum", lambda: targets.own().bind((rescaled,)))


def test_models_on_other_paths_are_refused():
    pair = P.denoiser(paths.edm()), Q.denoiser(paths.vp_linear())
    for target in (targets.product(), targets.geometric(2.0), targets.rlg(*pair, 2.0)):
        refuse(
            "must lie on one path",
            lambda target=target: target.bind(pair[: 1 if target.name == "rlg" else 2]),
        )
    assert isinstance(targets.geometric(2.0).bind((P.denoiser(paths.edm()),) * 2).children[0], Blend)
