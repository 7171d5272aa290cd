"""Guidance against two calls and a sum, against closed forms, and through the fused step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.models import Denoiser, GaussianMixture, paths
from fewstep.models.denoiser import PREDICTS
from fewstep.samplers import (
    Blend,
    abm,
    adapted,
    autoguidance,
    cfg,
    ddpm,
    deis,
    grids,
    multistep,
    rlg,
    sample,
    step,
)
from fewstep.samplers.loop import init

ALL = {name: paths.by_name(name) for name in paths.NAMES}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
every_prediction = pytest.mark.parametrize("predicts", PREDICTS)
NULL = {"label": -1}  # a mixture's word for "no label"


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def middle_times(path):
    return [path.time(lam) for lam in (1.5, 0.0, -1.5)]


MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.0, 0.0]], [0.3, 0.8])
LABEL = torch.tensor([0, 1, 1, 0, 1])


def tiny_net(path=None, predicts="eps", seed=0, precond=None):
    """A class-conditional network of one hidden layer, float64, label 3 for none, that counts its forwards."""
    torch.manual_seed(seed)
    net = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)), "emb": nn.Embedding(4, 4)}
    )
    net = net.double().requires_grad_(False)
    net.null_label = 3
    net.batches = []

    def call(x, tau, label):
        net.batches.append(len(x))
        return net["body"](torch.cat([x + net["emb"](label), tau[:, None]], 1))

    return Denoiser(call, path or paths.flow(), predicts=predicts, net=net, shape=(4,), precond=precond)


# --- a blend is a sum ---------------------------------------------------------------------------------------


@every_path
@every_prediction
def test_cfg_is_two_calls_and_a_sum_in_every_form(path, predicts):
    d = MIXTURE.denoiser(path, predicts)
    guided, x = cfg(d, 2.5, null=NULL), normals(5, 2)
    per_sample = torch.tensor([*middle_times(path), path.time(0.7), path.time(-0.7)], dtype=torch.float64)
    for t in (*middle_times(path), per_sample, per_sample.numpy()):
        for form in ("__call__", "eps", "velocity", "score"):
            with_, without = (getattr(d, form)(x, t, label=label) for label in (LABEL, torch.full((5,), -1)))
            wanted = -1.5 * without + 2.5 * with_
            torch.testing.assert_close(
                getattr(guided, form)(x, t, label=LABEL), wanted, rtol=1e-11, atol=1e-11
            )


@every_path
def test_predictions_may_be_mixed(path):
    x = normals(5, 2)
    for t in middle_times(path):
        wanted = -0.5 * MIXTURE.denoiser(path)(x, t, label=LABEL * 0) + 1.5 * MIXTURE.denoiser(path)(
            x, t, label=LABEL
        )
        for one, two in (("eps", "flow"), ("score", "x0"), ("v", "eps")):
            bad = Denoiser(
                lambda x, tau, label, one=one: MIXTURE.denoiser(path, one).call(x, tau, label=0 * label),
                path,
                one,
            )
            got = autoguidance(MIXTURE.denoiser(path, two), bad, 1.5)(x, t, label=LABEL)
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("predicts", [*PREDICTS, "edm"])
def test_scales_0_and_1_are_the_single_models_bit_for_bit(predicts):
    path = paths.edm() if predicts == "edm" else paths.vp_linear()
    how = {"predicts": "x0", "precond": "edm"} if predicts == "edm" else {"predicts": predicts}
    base, tuned = (tiny_net(path, seed=seed, **how) for seed in (0, 1))
    x, label = normals(5, 4), torch.tensor([0, 1, 2, 0, 1])
    null = torch.full_like(label, 3)
    table, noise = deis(path, grids.logsnr(path, 4), order=3), normals(5, 4, seed=2)
    for composite, alone, its_label in (
        (rlg(base, tuned, 0.0), base, label),
        (rlg(base, tuned, 1.0), tuned, label),
        (cfg(base, 1.0), base, label),
        (cfg(base, 0.0), base, null),
        (cfg(base, 1.0, rescale=0.7), base, label),
        (autoguidance(tuned, base, 1.0), tuned, label),
        (rlg(cfg(base, 1.0), cfg(tuned, 3.0), 0.0), base, label),
    ):
        t = path.time(0.3)
        for form in ("__call__", "eps", "velocity", "score"):
            assert torch.equal(
                getattr(composite, form)(x, t, label=label), getattr(alone, form)(x, t, label=its_label)
            )
        got = sample(composite, noise, table, cond={"label": label})
        assert torch.equal(got, sample(alone, noise, table, cond={"label": its_label}))
    # and the other one is not even called
    base.net.batches.clear(), tuned.net.batches.clear()
    sample(rlg(base, tuned, 1.0), noise, table, cond={"label": label})
    assert base.net.batches == [] and tuned.net.batches == [5] * 4


def test_both_halves_of_cfg_run_as_one_batch_where_they_can():
    d, x, label = tiny_net(), normals(5, 4), torch.tensor([0, 1, 2, 0, 1])
    one = cfg(d, 2.0)(x, 0.5, label=label)
    assert d.net.batches == [10]
    d.net.batches.clear()
    two = cfg(d, 2.0, forwards="two")(x, 0.5, label=label)
    assert d.net.batches == [5, 5]
    torch.testing.assert_close(
        one, two, rtol=1e-13, atol=1e-13
    )  # a matrix product of another height may round otherwise
    # one time a sample goes with its sample
    t = torch.linspace(0.2, 0.8, 5, dtype=torch.float64)
    torch.testing.assert_close(cfg(d, 2.0)(x, t, label=label), cfg(d, 2.0, forwards="two")(x, t, label=label))


def test_conditions_of_every_kind_are_doubled_or_run_apart():
    seen = []

    def call(x, tau, text=None, extra=None, size=None, mode="a"):
        seen.append((len(x), None if text is None else tuple(text.shape)))
        bias = 0.0 if text is None else text.mean((1, 2), keepdim=False)[:, None]
        return x + bias + (0.0 if extra is None else extra["pooled"]) + (0.0 if size is None else size.sum())

    d, x = Denoiser(call, paths.flow(), "flow"), normals(3, 2)
    text, pooled, size = normals(3, 7, 4, seed=1), normals(3, 2, seed=2), normals(2, seed=3)
    cond = {"text": text, "extra": {"pooled": pooled}, "size": size, "mode": "a"}
    none = {
        "text": torch.zeros(7, 4, dtype=torch.float64),
        "extra": {"pooled": torch.zeros(1, 2, dtype=torch.float64)},
    }
    wanted = 3 * d(x, 0.5, **cond) - 2 * d(
        x, 0.5, **{**cond, "text": 0 * text, "extra": {"pooled": 0 * pooled}}
    )
    seen.clear()
    torch.testing.assert_close(cfg(d, 3.0, null=none)(x, 0.5, **cond), wanted)
    assert seen == [(6, (6, 7, 4))]
    # a null text of another length does not fit into one batch, nor does a keyword that is left out
    seen.clear()
    short = {"text": torch.zeros(1, 2, 4, dtype=torch.float64), "extra": {"pooled": 0.0}}
    torch.testing.assert_close(cfg(d, 3.0, null=short)(x, 0.5, **cond), wanted)
    assert seen == [(3, (3, 2, 4)), (3, (3, 7, 4))]
    seen.clear()
    torch.testing.assert_close(cfg(d, 3.0, null={"text": None, "extra": None})(x, 0.5, **cond), wanted)
    assert seen == [(3, None), (3, (3, 7, 4))]


# --- interval and rescale -----------------------------------------------------------------------------------


@every_path
def test_an_interval_guides_inside_and_is_the_conditional_model_outside(path):
    d, x = MIXTURE.denoiser(path), normals(5, 2)
    limited, full = cfg(d, 3.0, null=NULL, interval=(0.5, 2.0)), cfg(d, 3.0, null=NULL)
    times = [
        path.time_of_rho(rho) for rho in (0.3, 0.5 * (1 - 1e-9), 0.5 * (1 + 1e-9), 1.0, 2.0 * (1 - 1e-9), 2.5)
    ]
    wanted = [(full if k in (2, 3, 4) else d)(x, t, label=LABEL) for k, t in enumerate(times)]
    for t, value in zip(times, wanted):
        assert torch.equal(limited(x, t, label=LABEL), value)
    # the same with one time a sample
    t = torch.tensor(times[:5], dtype=torch.float64)
    each = torch.stack([value[k] for k, value in enumerate(wanted[:5])])
    torch.testing.assert_close(limited(x, t, label=LABEL), each, rtol=1e-12, atol=1e-12)
    for kind in (t, t.numpy()):
        p, qs = limited.affine(kind)
        for k, one in enumerate(times[:5]):
            p1, qs1 = limited.affine(one)
            wide = [np.broadcast_to(np.asarray(q), 5)[k] for q in (p, *qs)]
            assert wide == pytest.approx([p1, *qs1], rel=1e-12, abs=1e-12)


def test_outside_the_interval_the_guide_is_not_called():
    d, label = tiny_net(paths.edm()), torch.tensor([0, 1, 2, 0, 1])
    table = multistep(d.path, grids.karras(d.path, 8), form="x0", variable="lam", nodes=3)
    inside = int(((table.sigma > 0.1) & (table.sigma <= 10)).sum())
    limited, noise = cfg(d, 3.0, interval=(0.1, 10.0)), normals(5, 4)
    sample(limited, noise, table, cond={"label": label})
    assert sorted(d.net.batches) == [5] * (table.calls - inside) + [10] * inside and 0 < inside < table.calls
    # at rows of their own all samples make the same sums
    plan = table.on(limited)
    state = init(table, noise)
    apart = state._replace(row=torch.zeros(5, dtype=torch.long))
    for _ in range(table.calls):
        state, info = step(limited, plan, state, cond={"label": label})
        apart, _ = step(limited, plan, apart, cond={"label": label})
        assert len(info.outputs) == 2
        torch.testing.assert_close(info.x0, limited(info.y, info.t, label=label), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apart.x, state.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("phi", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("predicts", ["eps", "v", "flow", "edm"])
def test_rescale_against_the_formula_by_hand(phi, predicts):
    path = paths.edm() if predicts == "edm" else paths.vp_linear()
    d = tiny_net(path, "x0", precond="edm") if predicts == "edm" else tiny_net(path, predicts)
    x, label, t = normals(5, 4), torch.tensor([0, 1, 2, 0, 1]), path.time(0.2)
    null = torch.full_like(label, 3)

    def prediction(label):
        return d(x, t, label=label) if predicts == "edm" else d.raw(x, t, label=label)[0]

    with_, guided = prediction(label), -3.0 * prediction(null) + 4.0 * prediction(label)
    factor = phi * with_.std(1, keepdim=True) / guided.std(1, keepdim=True) + 1 - phi
    p, q = (0.0, 1.0) if predicts == "edm" else (d.affine(t)[0], d.affine(t)[1][0])
    wanted = p * x + q * factor * guided
    rescaled = cfg(d, 4.0, rescale=phi)
    torch.testing.assert_close(rescaled(x, t, label=label), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        path.alpha(t) * rescaled(x, t, label=label) + path.sigma(t) * rescaled.eps(x, t, label=label), x
    )
    assert (rescaled.affine(t) is None) == (phi > 0) and len(rescaled.parts()) == 2
    # the loop takes d(x, t) itself where it is not affine
    table, noise = deis(path, grids.logsnr(path, 4), order=2), normals(5, 4, seed=3)
    copy = Denoiser(lambda x, tau, label: rescaled(x, tau, label=label), path, "x0")
    got, same = (sample(one, noise, table, cond={"label": label}) for one in (rescaled, copy))
    torch.testing.assert_close(got, same, rtol=1e-9, atol=1e-9)


def test_rescale_over_a_blend_is_of_its_x0():
    base, tuned = tiny_net(seed=0), tiny_net(seed=1, predicts="flow")
    both, x, label = rlg(base, tuned, 1.5), normals(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with_, without = (both(x, 0.4, label=one) for one in (label, torch.full_like(label, 3)))
    guided = 4 * with_ - 3 * without
    wanted = guided * (0.7 * with_.std(1, keepdim=True) / guided.std(1, keepdim=True) + 0.3)
    rescaled = cfg(both, 4.0, rescale=0.7, interval=(0.1, 1.0))
    torch.testing.assert_close(rescaled(x, 0.4, label=label), wanted, rtol=1e-11, atol=1e-11)
    # some samples inside the interval, some outside: those are the conditional model's
    t = torch.tensor([0.4, 0.4, 0.6, 0.4, 0.6], dtype=torch.float64)  # rho = 2/3 and 3/2
    mixed = torch.where((t == 0.4)[:, None], wanted, both(x, t, label=label))
    torch.testing.assert_close(rescaled(x, t, label=label), mixed, rtol=1e-11, atol=1e-11)


def test_rescale_one_gives_the_prediction_the_conditional_spread_and_constants_stay():
    d, x, label = tiny_net(predicts="eps"), normals(5, 4), torch.tensor([0, 1, 2, 0, 1])
    guided = cfg(d, 7.5, rescale=1.0).eps(x, 0.6, label=label)
    torch.testing.assert_close(guided.std(1), d.eps(x, 0.6, label=label).std(1), rtol=1e-12, atol=0)
    assert (
        cfg(d, 7.5).eps(x, 0.6, label=label).std(1) > 1.2 * guided.std(1)
    ).any()  # without it, it is wider
    flat = Denoiser(lambda x, tau, label: torch.zeros_like(x), paths.edm(), "x0")
    assert cfg(flat, 2.0, null={"label": 0}, rescale=1.0)(x, 1.0, label=label).isfinite().all()


# --- the fused step -----------------------------------------------------------------------------------------


@every_path
def test_the_fused_step_is_the_sum_by_d_of_x_and_t(path):
    """Through the plan's folded weights, and through x0 by ``d(x, t)`` in a denoiser of one output."""
    one, two = MIXTURE.denoiser(path, "flow"), MIXTURE.tilt([1.0, -0.5]).denoiser(path, "v")
    composite = rlg(cfg(one, 2.0, null=NULL, interval=(0.1, 5.0)), cfg(two, 1.5, null=NULL), 1.6)
    single = Denoiser(lambda x, tau, label: composite(x, tau, label=label), path, "x0")
    table = multistep(path, grids.logsnr(path, 6), form="x0", variable="lam", nodes=3)
    noise = normals(5, 2)
    fused, plain = (sample(d, noise, table, cond={"label": LABEL}) for d in (composite, single))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    assert table.on(composite).outputs == 4


def test_nesting_keeps_the_leaves_in_sight():
    base, tuned = tiny_net(seed=0), tiny_net(seed=1, predicts="flow")
    full = rlg(cfg(base, 3.0), cfg(tuned, 3.0), 1.5)
    x, label, t = normals(5, 4), torch.tensor([0, 1, 2, 0, 1]), 0.4
    leaves, outputs = full.parts(), full.raw(x, t, label=label)
    assert [leaf.predicts for leaf in leaves] == ["eps", "eps", "flow", "flow"]
    for leaf, output in zip(leaves, outputs, strict=True):  # each leaf alone makes its own output
        torch.testing.assert_close(leaf.raw(x, t, label=label)[0], output, rtol=1e-13, atol=1e-13)
    weights = full.exponents(t)
    assert weights == pytest.approx((-0.5 * -2, -0.5 * 3, 1.5 * -2, 1.5 * 3)) and sum(
        weights
    ) == pytest.approx(1)
    score = sum(w * leaf.score(x, t, label=label) for w, leaf in zip(weights, leaves))
    torch.testing.assert_close(full.score(x, t, label=label), score, rtol=1e-11, atol=1e-11)
    # guidance of a blend is the blend of the guided: all is linear
    other = cfg(rlg(base, tuned, 1.5), 3.0)
    torch.testing.assert_close(other(x, t, label=label), full(x, t, label=label), rtol=1e-11, atol=1e-11)
    assert len(other.parts()) == 4
    for leaf, output in zip(other.parts(), other.raw(x, t, label=label), strict=True):
        torch.testing.assert_close(leaf.raw(x, t, label=label)[0], output, rtol=1e-13, atol=1e-13)
    # a blend holds both networks, and one network once
    assert isinstance(full.net, nn.ModuleList) and len(full.net) == 2 and cfg(base, 2.0).net is base.net
    # what is not affine makes all above it so, and the estimate is still the sum
    bent = rlg(cfg(base, 3.0, rescale=0.5), tuned, 1.5)
    assert bent.affine(t) is None and len(bent.parts()) == 3
    wanted = -0.5 * cfg(base, 3.0, rescale=0.5)(x, t, label=label) + 1.5 * tuned(x, t, label=label)
    torch.testing.assert_close(bent(x, t, label=label), wanted, rtol=1e-12, atol=1e-12)
    over = cfg(bent, 2.0)
    sum_ = 2 * bent(x, t, label=label) - bent(x, t, label=torch.full_like(label, 3))
    torch.testing.assert_close(over(x, t, label=label), sum_, rtol=1e-12, atol=1e-12)


# --- laws ---------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("predicts", ["eps", "v", "flow", "score"])
def test_with_equal_covariances_the_scale_divides_the_kl_coefficient(path, predicts):
    """p_tuned = p exp(a.x / beta) / Z of N(m, S) is N(m + S a / beta, S); the scale w aims at beta / w and hits it."""
    cov = torch.tensor([[[0.6, 0.2], [0.2, 0.3]]], dtype=torch.float64)
    base, a, beta, w = (
        GaussianMixture([1.0], [[0.3, -0.2]], cov),
        torch.tensor([1.0, -2.0]).double(),
        2.0,
        2.5,
    )
    tuned, aimed = base.tilt(a / beta), base.tilt(a * w / beta)
    guided, exact = (
        rlg(base.denoiser(path, predicts), tuned.denoiser(path, predicts), w),
        aimed.denoiser(path),
    )
    x = normals(50, 2)
    for t in middle_times(path):
        torch.testing.assert_close(guided(x, t), exact(x, t), rtol=1e-10, atol=1e-10)
    times = grids.vp(path, 21)[1:]  # not from alpha = 0, where an eps says nothing of x0
    table, noise = multistep(path, times, form="x0", variable="vp", nodes=3), normals(50, 2, seed=1)
    got, wanted = sample(guided, noise, table), sample(exact, noise, table)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    # and that solver is close to the ODE's end, so the law is the tilted one; the tuned law is elsewhere
    t0 = float(table.times[0])
    ends = [m.gaussian_trajectory(path, path.sigma(t0) * noise, t0, path.t_clean) for m in (aimed, tuned)]
    assert (got - ends[0]).abs().max() < 0.03 < 0.1 * (ends[1] - ends[0]).norm(dim=1).min()


def ode_law(means, variances, weights):
    """Mean and variance at s = 0 of dy/ds = sum_i w_i s (y - m_i) / (c_i + s^2), from N(0, s^2) at s = inf.

    With g = prod (c_i + s^2)^(w_i / 2), y / g has slope  -(1/g) sum w_i m_i s / (c_i + s^2): the variance is g(0)^2.
    """
    nodes, areas = np.polynomial.legendre.leggauss(200)
    angle = (nodes + 1) * math.pi / 4
    s, areas = np.tan(angle), areas * math.pi / 4 / np.cos(angle) ** 2

    def g(s):
        return math.prod((c + s * s) ** (w / 2) for c, w in zip(variances, weights))

    slope = sum(w * m * s / (c + s * s) for w, m, c in zip(weights, means, variances)) / g(s)
    return g(0.0) * float((areas * slope).sum()), g(0.0) ** 2


def test_with_unequal_covariances_the_bias_is_the_one_that_is_documented():
    """N(0, 1), N(1, 1/2), scale 2: aimed at N(4/3, 1/3), the ODE ends at (1.623, 1/4), ancestral at (3/2, 7/24)."""
    base, tuned = (GaussianMixture([1.0], [[m]], c) for m, c in ((0.0, 1.0), (1.0, 0.5)))
    mean, variance = ode_law((0.0, 1.0), (1.0, 0.5), (-1.0, 2.0))
    assert (mean, variance) == pytest.approx((1.6232, 0.25), abs=1e-4)
    path = paths.edm(sigma_max=2000.0)
    guided = rlg(base.denoiser(path), tuned.denoiser(path), 2.0)
    x = torch.tensor(
        [[-1.0], [0.0], [1.0]], dtype=torch.float64
    )  # all is linear: two points tell the whole law
    table = multistep(path, grids.karras(path, 80), form="x0", variable="lam", nodes=3)
    low, middle, high = sample(guided, x, table).flatten().tolist()
    assert middle == pytest.approx(mean, abs=3e-3) and ((high - low) / 2) ** 2 == pytest.approx(
        variance, abs=3e-3
    )
    # ancestral rows, their moments by recursion; first-order, so what halving the step changes is what is left
    found = []
    for steps in (400, 800):
        table = ddpm(path, grids.karras(path, steps))
        m, v, times = 0.0, float(table.a[0, 0, 0].sum()) ** 2, torch.as_tensor(table.t[:, 0].copy())
        at_0, at_1 = (
            guided(torch.full((steps, 1), at).double(), times).flatten().tolist() for at in (0.0, 1.0)
        )
        for row in range(table.calls):
            weight = table.b[row + 1, 0, 0, table.slot[row]]
            gain = table.a[row + 1, 0, 0].sum() + weight * (at_1[row] - at_0[row])
            m, v = gain * m + weight * at_0[row], gain**2 * v + table.c[row + 1, 0, 0] ** 2
        found.append((m, v))
    extrapolated = [2 * fine - coarse for coarse, fine in zip(*found)]
    assert extrapolated == pytest.approx([1.5, 7 / 24], abs=2e-3)
    aimed = (4 / 3, 1 / 3)  # precision -1 + 2 * 2, mean 2 * 2 / 3
    assert mean > extrapolated[0] > aimed[0] + 0.1 and variance < extrapolated[1] < aimed[1] - 0.03


def test_on_a_mixture_the_reward_of_samples_rises_with_the_scale():
    path, a = paths.vp_linear(), torch.tensor([0.8, 0.4], dtype=torch.float64)
    base = GaussianMixture([0.4, 0.35, 0.25], [[-2.0, 0.0], [0.0, 1.0], [2.0, -1.0]], [0.2, 0.4, 0.1])
    tuned = base.tilt(a)
    table, noise = multistep(path, grids.vp(path, 12), form="x0", variable="vp", nodes=3), normals(2000, 2)
    rewards = [
        float((sample(rlg(base.denoiser(path), tuned.denoiser(path), w), noise, table) @ a).mean())
        for w in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    ]
    assert all(later > earlier + 0.05 for earlier, later in zip(rewards, rewards[1:]))
    for w, law in (
        (0, base),
        (2, tuned),
    ):  # scales 0 and 1: the laws themselves, to 4 standard errors and a solver's error
        error = math.sqrt(float(a @ law.cov @ a) / 2000)
        assert abs(rewards[w] - float(law.mean @ a)) < 4 * error + 0.01


# --- one network, with an adapter and without ---------------------------------------------------------------


class LowRank(nn.Module):
    """A layer with the two switches that peft's layers have."""

    adapter_layer_names = ("ups",)

    def __init__(self, base, names=("rl", "style")):
        super().__init__()
        self.base, self._disable_adapters, self._active_adapter = base, False, ["style"]
        self.ups = nn.ModuleDict({n: nn.Linear(4, 4, bias=False, dtype=torch.float64) for n in names})

    def forward(self, x):
        out = self.base(x)
        active = [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter
        return out if self._disable_adapters else out + sum(self.ups[name](x) for name in active)


def test_an_adapter_is_switched_inside_the_call_and_back():
    torch.manual_seed(0)
    layer = LowRank(nn.Linear(4, 4, dtype=torch.float64))
    layer.ups["rl"].requires_grad_(False)
    net = nn.Sequential(layer, nn.Tanh())
    grads = [p.requires_grad for p in net.parameters()]
    d = Denoiser(lambda x, tau: net(x), paths.flow(), "flow", net=net)
    x = normals(3, 4)
    plain = torch.tanh(layer.base(x))
    tuned = torch.tanh(layer.base(x) + layer.ups["rl"](x))
    guided = rlg(d, "rl", 1.6)
    torch.testing.assert_close(guided.velocity(x, 0.5), -0.6 * plain + 1.6 * tuned)
    both = adapted(d, ["rl", "style"])
    torch.testing.assert_close(
        both.velocity(x, 0.5), torch.tanh(layer.base(x) + layer.ups["rl"](x) + layer.ups["style"](x))
    )
    assert layer._active_adapter == ["style"] and layer._disable_adapters is False
    assert [p.requires_grad for p in net.parameters()] == grads
    assert guided.net is net  # held once
    # an error inside the network leaves the switches where they were
    broken = adapted(Denoiser(lambda x, tau: net(x[:, :2]), paths.flow(), "flow", net=net), "rl")
    with pytest.raises(RuntimeError):
        broken(x, 0.5)
    assert layer._active_adapter == ["style"] and layer._disable_adapters is False


def test_lora_of_peft_on_and_off_is_two_networks():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def network():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4))

    def denoiser(net):
        return Denoiser(lambda x, tau: net(x), paths.flow(), "flow", net=net)

    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    net = peft.get_peft_model(network(), config, adapter_name="rl")
    net.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    torch.manual_seed(2)
    merged = peft.get_peft_model(network(), config, adapter_name="rl")
    merged.load_state_dict({k: v for k, v in net.state_dict().items() if "other" not in k})
    merged = merged.merge_and_unload()
    x, noise = torch.randn(6, 4), torch.randn(6, 4)
    grads = {name: p.requires_grad for name, p in net.named_parameters()}
    for active in ("rl", "other"):  # whatever a trainer has active at the time
        for layer in net.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer._active_adapter = [active]
        one, two = rlg(denoiser(net), "rl", 1.6), rlg(denoiser(network()), denoiser(merged), 1.6)
        torch.testing.assert_close(
            one(x, 0.4), two(x, 0.4), rtol=1e-5, atol=1e-6
        )  # merging rounds in float32
        table = deis(paths.flow(), grids.uniform(paths.flow(), 3), order=2)
        torch.testing.assert_close(sample(one, noise, table), sample(two, noise, table), rtol=1e-4, atol=1e-5)
        assert torch.equal(rlg(denoiser(net), "rl", 0.0)(x, 0.4), denoiser(network())(x, 0.4))
        assert (one(x, 0.4) - denoiser(network())(x, 0.4)).abs().max() > 0.01
        assert (
            net.active_adapters in (["rl"], [active])
            and {n: p.requires_grad for n, p in net.named_parameters()} == grads
        )
    net.merge_adapter(["rl"])
    with pytest.raises(ValueError, match="merged"):
        rlg(denoiser(net), "rl", 1.6)


# --- digits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-edm", "digits-vp", "digits-flow"])
def test_guided_digits_are_surer_of_their_class(name):
    """Paired by noise: log p(label) rises in more samples than 4 standard errors of a fair coin's count allow."""
    from fewstep.models import load, load_classifier
    from fewstep.samplers import starting_noise

    d, judge, number = load(name), load_classifier(), 100
    label, noise = torch.arange(number) % 10, starting_noise(0, number, d.shape)
    table = abm(
        d.path, grids.vp(d.path, 10)
    )  # close to the ODE: what is asked is what guidance does, not a solver
    x = [sample(cfg(d, scale), noise, table, cond={"label": label}) for scale in (1.0, 2.0)]
    plain, guided = (judge(one)[1].log_softmax(-1) for one in x)
    gain = (guided - plain)[torch.arange(number), label]
    assert (gain > 0).sum() > number / 2 + 4 * math.sqrt(number) / 2 and gain.mean() > 0
    assert (guided.argmax(-1) == label).sum() >= (plain.argmax(-1) == label).sum()


# --- bad input ----------------------------------------------------------------------------------------------


def test_wrong_parts_are_named():
    vp, flow = tiny_net(paths.vp_linear()), tiny_net(paths.flow())
    with pytest.raises(ValueError, match="base is on vp_linear and tuned on flow"):
        rlg(vp, flow, 1.5)
    shaped = Denoiser(lambda x, tau: x, paths.flow(), "flow", shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"\(4,\) for base and \(3, 8, 8\) for tuned"):
        rlg(flow, shaped, 1.5)
    with pytest.raises(ValueError, match="bad is on .* and good on"):
        autoguidance(vp, flow, 1.5)
    with pytest.raises(ValueError, match="one path"):  # the same name, another curve
        rlg(tiny_net(paths.vp_linear(beta_1=20.0)), tiny_net(paths.vp_linear(beta_1=12.0)), 1.5)
    rlg(
        tiny_net(paths.flow(shift=1.0)), tiny_net(paths.flow(shift=3.0)), 1.5
    )  # one curve, whatever the times
    with pytest.raises(TypeError, match="tuned must be a Denoiser"):
        rlg(flow, lambda x, t: x, 1.5)
    with pytest.raises(TypeError, match="base must be a Denoiser"):
        rlg(nn.Linear(2, 2), flow, 1.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: cfg(d, float("nan")), "scale must be a finite number"),
        (lambda d: cfg(d, "2"), "scale must be a finite number"),
        (lambda d: cfg(d, 2.0, null=3), "null must be a mapping"),
        (lambda d: cfg(d, 2.0, null={}), "null must be a mapping"),
        (lambda d: cfg(d, 2.0, interval=(2.0, 1.0)), "interval must be"),
        (lambda d: cfg(d, 2.0, interval=3.0), "interval must be"),
        (lambda d: cfg(d, 2.0, interval=(-1.0, 1.0)), "interval must be"),
        (lambda d: cfg(d, 2.0, rescale=1.5), "rescale must lie in"),
        (lambda d: cfg(d, 2.0, forwards="three"), "forwards must be"),
        (lambda d: cfg(Denoiser(d.call, d.path), 2.0), "null must say"),
        (lambda d: cfg(d, 2.0)(torch.zeros(2, 4).double(), 0.5), "cond must hold label"),
        (lambda d: cfg(d, 2.0, null={"label": torch.zeros(3, dtype=torch.long)})(
            torch.zeros(2, 4).double(), 0.5, label=torch.zeros(2, dtype=torch.long)), "must be 1 or the batch"),
        (lambda d: Blend((d, d), (0.5, 0.6)), "sum to 1"),
        (lambda d: Blend((d, d), (1.0,)), "2 finite numbers"),
        (lambda d: Blend((), ()), "at least one"),
        (lambda d: Blend((d, d), lambda t: (0.5, 0.6)).affine(0.5), "sum to 1"),
        (lambda d: Blend((d, d), lambda t: (1.0,)).affine(0.5), "one a child"),
        (lambda d: rlg(d, "rl", 1.5), "must have adapter layers"),
        (lambda d: rlg(Denoiser(d.call, d.path), "rl", 1.5), "net=..."),
        (lambda d: rlg(cfg(d, 2.0), "rl", 1.5), "switched in a leaf"),
        (lambda d: cfg(cfg(d, 2.0, rescale=0.5), 2.0, rescale=0.5)(
            torch.zeros(2, 4).double(), 0.5, label=torch.zeros(2, dtype=torch.long)), "not affine"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make(tiny_net())


def test_an_unknown_adapter_is_named_with_those_that_there_are():
    net = nn.Sequential(LowRank(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="adapter must be one of rl, style"):
        rlg(Denoiser(lambda x, tau: net(x), paths.flow(), net=net), "lr", 1.5)


def test_an_eps_network_cannot_start_a_flow_guided_either():
    d = tiny_net(paths.flow(), "eps")
    with pytest.raises(ValueError, match="alpha = 0"):
        cfg(d, 2.0)(torch.zeros(2, 4).double(), 1.0, label=torch.zeros(2, dtype=torch.long))
