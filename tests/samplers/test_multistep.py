"""The multistep family: lanes, the two ends, the ways to start and to stop, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.samplers import (
    catalogue,
    ddim,
    deis,
    dpm,
    dpmpp,
    ersde,
    grids,
    ipndm,
    ipndm_v,
    multistep,
    pndm,
    sa,
    sample,
    sde_dpmpp,
    starting_noise,
    unipc,
)  # fmt: skip

ALL = {
    f.__name__: f
    for f in (ddim, deis, dpm, dpmpp, ersde, ipndm, ipndm_v, multistep, pndm, sa, sde_dpmpp, unipc)
}
PATHS = {
    "vp_linear": paths.vp_linear(),
    "vp_cosine": paths.vp_cosine(),
    "vp_discrete": paths.vp_discrete(paths.ddpm_alphas_cumprod()),
    "edm": paths.edm(),
    "flow": paths.flow(),
}


# --- lanes -------------------------------------------------------------------------------------------------------


def assert_lanes_are_tables(build, path, times, **options):
    together = build(path, times, **options)
    assert together.lanes == len(times)
    for lane, row in enumerate(times):
        alone = build(path, row, **options)
        one, other = together.lane(lane).unrolled(), alone.unrolled()
        assert together.form == alone.form
        np.testing.assert_array_equal(together.t[:, lane], alone.t[:, 0])
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("path_name", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_a_table_of_lanes_is_its_lanes_tables(name, path_name):
    """Lanes that begin midway, and that end at sigma = 0 or before it, side by side."""
    path = PATHS[path_name]
    end = grids.logsnr(path, 6, t_max=path.t_clean + 0.9 * (path.t_max - path.t_clean), end="t_min")
    whole = grids.uniform(path, 8)[2:]
    times = np.stack([whole, grids.karras(path, 8)[2:], end])
    assert (path.sigma(times[:, -1]) == 0).tolist() == [True, True, False]
    assert_lanes_are_tables(ALL[name], path, times)


@pytest.mark.parametrize("name, options", [
    ("ddim", {"eta": 0.5}), ("multistep", {"variable": "t"}), ("multistep", {"form": "v"}), ("multistep", {}),
    ("dpmpp", {}),
    ("dpmpp", {"order": 3}), ("unipc", {"order": 3, "rule": "bh1"}), ("sa", {"predictor": 3, "corrector": 4}),
    ("sde_dpmpp", {}), ("ersde", {}),
])  # fmt: skip
def test_lanes_that_begin_at_alpha_zero_beside_others(name, options):
    path = PATHS["flow"]
    times = np.stack([np.linspace(1.0, 0.0, 7), np.linspace(0.7, 0.0, 7), np.linspace(1.0, 0.1, 7)])
    assert_lanes_are_tables(ALL[name], path, times, **options)


@pytest.mark.parametrize("name", ["deis", "dpm", "ipndm", "ipndm_v", "pndm"])
def test_eps_solvers_take_one_first_step_for_all_lanes(name):
    """From alpha = 0 the first row is DDIM in x0 form, in every lane of the table: forms belong to rows."""
    path = PATHS["flow"]
    times = np.stack([np.linspace(1.0, 0.0, 7), np.linspace(0.7, 0.0, 7)])
    table = ALL[name](path, times)
    assert table.form[0] == "x0" and set(table.form[1:]) == {"eps"}
    s, n = times[:, :2].T
    np.testing.assert_allclose(table.a[1].sum(-1)[:, 0], n / s)
    np.testing.assert_allclose(table.b[1, :, 0, table.slot[0]], (1 - n) - n / s * (1 - s))
    assert_lanes_are_tables(ALL[name], path, times[:1])


# --- the ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_point_data_from_pure_noise_to_clean(name):
    """From t = 1 of a flow down to 0 exactly, where data are one point."""
    path = PATHS["flow"]
    d = GaussianMixture([1.0], [[2.0, -1.0]], [1e-14]).denoiser(path)
    noise = starting_noise(0, 5, (2,), dtype=torch.float64)
    for n in (1, 2, 8):
        x = sample(d, noise, ALL[name](path, grids.uniform(path, n)))
        assert (x - torch.tensor([2.0, -1.0], dtype=torch.float64)).abs().max() < 1e-6


def test_x0_over_t_ends_at_full_order():
    """The last row is the interpolant at sigma = 0: alpha_n l_j(t_n), and nothing of x."""
    path = PATHS["flow"]
    t = np.array([0.9, 0.6, 0.3, 0.1, 0.0])
    table = multistep(path, t, form="x0", variable="t", nodes=3)
    nodes = t[1:4]
    expected = [np.prod([node / (node - own) for node in nodes if node != own]) for own in nodes]
    np.testing.assert_allclose(table.b[-1, 0, 0, table.slot[1:4]], expected, rtol=1e-12)
    assert (table.a[-1] == 0).all()


def test_which_tables_end_at_first_order():
    path = PATHS["vp_linear"]
    times = grids.uniform(path, 6)
    last = {
        (form, variable): int((multistep(path, times, form=form, variable=variable).b[-1, 0, 0] != 0).sum())
        for form in ("x0", "eps") for variable in ("t", "rho", "lam", "snr")
    }  # fmt: skip
    first_order = {key for key, terms in last.items() if terms == 1}
    assert first_order == {(form, variable) for form in ("x0", "eps") for variable in ("lam", "snr")}
    assert set(last.values()) == {1, 3}
    full = {
        (form, variable): int((multistep(path, times, form=form, variable=variable, final="full").b[-1] != 0).sum() / 2)
        for form in ("x0", "eps") for variable in ("lam", "snr")
    }  # fmt: skip
    assert full == {("x0", "lam"): 1, ("x0", "snr"): 1, ("eps", "lam"): 3, ("eps", "snr"): 1}


def nodes_used(table) -> list[int]:
    return [int((table.b[row, 0, 0] != 0).sum()) for row in range(1, table.calls + 1)]


def test_orders_rise_and_fall():
    path = PATHS["vp_linear"]
    times = grids.uniform(path, 6, end="t_min")
    assert nodes_used(multistep(path, times, nodes=4)) == [1, 2, 3, 4, 4, 4]
    assert nodes_used(multistep(path, times, nodes=4, final="lower")) == [1, 2, 3, 3, 2, 1]
    assert nodes_used(ipndm(path, times)) == [1, 2, 3, 4, 4, 4]
    # UniPC's row corrects one step and predicts the next: order p_i of the one, p_{i+1} of the other
    assert nodes_used(unipc(path, times, order=3, corrector=False)) == [1, 2, 3, 3, 2, 1]
    assert nodes_used(unipc(path, times, order=3)) == [1, 2, 3, 4, 4, 3]


def test_from_alpha_zero_a_multistep_solver_finds_its_order():
    path = PATHS["flow"]
    times = np.linspace(1.0, 0.2, 6)
    assert nodes_used(multistep(path, times, variable="t")) == [1, 2, 3, 3, 3]
    assert nodes_used(multistep(path, times, variable="lam")) == [1, 1, 2, 3, 3]
    assert nodes_used(deis(path, times)) == [1, 1, 2, 3, 3]
    assert nodes_used(multistep(path, times, form="v", variable="t")) == [1, 2, 3, 3, 3]


def test_adams_bashforth_on_a_flow():
    path = PATHS["flow"]
    table = multistep(path, grids.uniform(path, 8), form="v", variable="t", nodes=4)
    newest_first = table.b[-1, 0, 0, table.slot[-1:-5:-1]]
    np.testing.assert_allclose(newest_first * -8, np.array([55, -59, 37, -9]) / 24, rtol=1e-12)


# --- starting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes, more", [(1, 0), (2, 0), (3, 2), (4, 6)])
@pytest.mark.parametrize("form, variable", [("x0", "lam"), ("eps", "rho"), ("x0", "t")])
def test_a_runge_kutta_start_costs_what_it_says(nodes, more, form, variable):
    path = PATHS["vp_linear"]
    times = grids.logsnr(path, 9)
    assert multistep(path, times, form=form, variable=variable, nodes=nodes, start="rk").calls == 9 + more


def error_on_a_gaussian(build, n: int, **options) -> float:
    """Of the result's standard deviation, where data are one Gaussian and the sampler is linear; t from 0.7 to 0.05."""
    path, variance = PATHS["vp_linear"], 0.3
    table = build(path, path.time(np.linspace(path.lam(0.7), path.lam(0.05), n + 1)), **options)
    noise_in = (
        1.0
        / path.sigma(table.times[0])
        * np.sqrt(path.alpha(table.times[0]) ** 2 * variance + path.sigma(table.times[0]) ** 2)
    )
    unit = np.eye(1 + table.calls + 1)
    history = np.zeros((table.slots, len(unit)))
    x = y = unit[0] * table.a[0, 0, 0].sum() * noise_in
    for row in range(1, table.calls + 1):
        alpha, sigma = table.alpha[row - 1, 0], table.sigma[row - 1, 0]
        x0 = y * alpha * variance / (alpha**2 * variance + sigma**2)
        history[table.slot[row - 1]] = x0 if table.form[row - 1] == "x0" else (y - alpha * x0) / sigma
        a, b, c = table.a[row, 0], table.b[row, 0], table.c[row, 0]
        x, y = (a[k, 0] * x + a[k, 1] * y + b[k] @ history + c[k] * unit[1 + row] for k in (0, 1))
    end = table.times[-1]
    return float(abs(np.sqrt((x**2).sum()) - np.sqrt(path.alpha(end) ** 2 * variance + path.sigma(end) ** 2)))


@pytest.mark.parametrize("build, options", [
    (multistep, dict(nodes=2)), (multistep, dict(nodes=3)), (multistep, dict(nodes=3, start="rk")),
    (multistep, dict(nodes=4, start="rk")), (multistep, dict(nodes=4, form="eps", variable="rho", start="rk")),
    (deis, dict(order=3, start="rk")), (dpmpp, dict(order=3)), (dpmpp, dict(order=3, weight="exact", start="rk")),
    (ipndm, dict(order=1)), (ipndm, {}), (pndm, {}), (pndm, dict(variant="simple")),
    (unipc, dict(order=1)), (unipc, dict(order=2)), (unipc, dict(order=2, final="auto")),
    (unipc, dict(order=3, final="auto")), (unipc, dict(order=3, final="auto", form="eps")),
    (sde_dpmpp, dict(order=1)), (sde_dpmpp, {}), (sde_dpmpp, dict(weight="exact", eta=0.5)), (sde_dpmpp, dict(order=3)),
    (sa, dict(predictor=1, corrector=0)), (sa, dict(predictor=1, corrector=1)), (sa, dict(predictor=1, corrector=2)),
    (sa, dict(predictor=2, corrector=0)), (sa, {}), (sa, dict(predictor=3, corrector=3, tau=0.5)),
    (ersde, dict(order=1)), (ersde, dict(order=2)), (ersde, {}), (ersde, dict(order=2, scale="sde")),
])  # fmt: skip
def test_the_variance_of_gaussian_data_converges_at_the_entry_s_order(build, options):
    """The samplers are linear here, so the law of the result is exact, noise included: no Monte Carlo."""
    coarse, fine = (error_on_a_gaussian(build, n, **options) for n in (100, 200))
    order = build.entry.order_of(**options)
    assert np.log2(coarse / fine) > order - 0.2
    if order == 1:
        assert np.log2(coarse / fine) < 1.2


# --- noise -------------------------------------------------------------------------------------------------------


def test_sa_draws_one_noise_a_row_and_none_where_tau_is_zero():
    path = PATHS["edm"]
    times = grids.karras(path, 10)
    table = sa(path, times, predictor=3, corrector=3, between=(0.1, 5.0))
    inside = (0.1 <= times[:-1]) & (times[:-1] <= 5.0)
    np.testing.assert_array_equal(table.c[1:, 0, 0] > 0, inside)
    as_function = sa(
        path, times, predictor=3, corrector=3, tau=lambda t: ((t >= 0.1) & (t <= 5.0)).astype(float)
    )
    np.testing.assert_array_equal(as_function.b, table.b)
    assert not sa(path, times, tau=0.0).stochastic and not sde_dpmpp(path, times, eta=0.0).stochastic
    assert not ersde(path, times, scale="ode").stochastic


def test_er_sde_scales():
    path = PATHS["vp_linear"]
    times = grids.uniform(path, 6)
    for name, function in (
        ("ode", lambda q: q),
        ("sde", lambda q: q**2),
        ("ersde", lambda q: q * (np.exp(q**0.3) + 10)),
    ):
        one, other = ersde(path, times, scale=name), ersde(path, times, scale=function)
        for (
            key
        ) in "abc":  # the noise is the root of a difference, so it keeps half the digits where that vanishes
            np.testing.assert_allclose(
                getattr(one, key), getattr(other, key), atol=1e-7 if key == "c" else 1e-12
            )
    with pytest.raises(ValueError, match="grow at least as fast"):
        ersde(path, times, scale=np.sqrt)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options, message", [
    ("multistep", {"nodes": 0}, "nodes must be an integer in 1 .. 4, got 0"),
    ("multistep", {"nodes": 9}, "nodes must be an integer in 1 .. 4, got 9"),
    ("multistep", {"nodes": 2.0}, "nodes must be an integer"),
    ("multistep", {"nodes": True}, "nodes must be an integer"),
    ("multistep", {"variable": "logrho"}, "variable must be one of t, rho, lam, snr"),
    ("multistep", {"form": "score"}, "form must be one of eps, x0, v"),
    ("multistep", {"form": "v"}, "straight path"),
    ("multistep", {"final": "zero"}, "final must be one of auto, lower, full"),
    ("multistep", {"start": "warm"}, "start must be one of lower, rk"),
    ("multistep", {"order": 3}, "its options are: form, variable, nodes"),
    ("deis", {"order": 5}, "order must be an integer in 1 .. 4"),
    ("deis", {"variable": "snr"}, "variable must be one of t, rho, lam"),
    ("dpmpp", {"order": 4}, "order must be an integer in 1 .. 3"),
    ("dpmpp", {"weight": "heun"}, "weight must be one of midpoint, exact"),
    ("dpm", {"order": 0}, "order"),
    ("unipc", {"order": 5}, "order must be an integer in 1 .. 4"),
    ("unipc", {"rule": "bh3"}, "rule must be one of bh1, bh2"),
    ("unipc", {"form": "v"}, "form must be one of x0, eps"),
    ("unipc", {"corrector": "off"}, "corrector must be True or False"),
    ("ipndm", {"order": 9}, "order"),
    ("ipndm_v", {"order": 0}, "order"),
    ("pndm", {"variant": "F"}, "variant must be one of fast, simple"),
    ("sde_dpmpp", {"eta": -1.0}, "eta must lie in"),
    ("sde_dpmpp", {"eta": float("nan")}, "eta must lie in"),
    ("sa", {"tau": -0.1}, "tau must be"),
    ("sa", {"tau": "1"}, "tau must be"),
    ("sa", {"predictor": 0}, "predictor must be an integer in 1 .. 4"),
    ("sa", {"corrector": 5}, "corrector must be an integer in 0 .. 4"),
    ("sa", {"between": (1.0, 0.1)}, "between must be"),
    ("ersde", {"scale": "square"}, "scale must be one of"),
    ("ersde", {"order": 4}, "order must be an integer in 1 .. 3"),
])  # fmt: skip
def test_bad_options(name, options, message):
    path = PATHS["vp_linear"]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        catalogue.find(name)(path, grids.uniform(path, 5), **options)


@pytest.mark.parametrize("times, message", [
    ([0.5], "at least one step"), ([], "at least one step"), ([0.1, 0.5], "fall strictly"),
    ([0.5, 0.5, 0.1], "fall strictly"),
    ([2.0, 0.5], "must lie in"), ([0.5, float("nan")], "finite"), ([[[0.5, 0.1]]], "shape"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["deis", "unipc", "sa"])
def test_bad_times(name, times, message):
    with pytest.raises(ValueError, match=message):
        ALL[name](PATHS["vp_linear"], times)


def test_a_path_is_asked_for():
    with pytest.raises(TypeError, match="path must be a fewstep path"):
        multistep("vp_linear", [1.0, 0.0])
