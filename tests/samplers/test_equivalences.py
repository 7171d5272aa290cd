"""Solvers that are the same: equal tables after substituting the rows into one another, in one form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.models import GaussianMixture, paths
from fewstep.samplers import (
    Program,
    ddim,
    ddpm,
    deis,
    dpm,
    dpmpp,
    ersde,
    grids,
    ipndm,
    ipndm_v,
    multistep,
    sa,
    sample,
    sde_dpmpp,
    starting_noise,
    unipc,
)  # fmt: skip

PATHS = {
    "vp_linear": paths.vp_linear(),
    "vp_cosine": paths.vp_cosine(),
    "vp_discrete": paths.vp_discrete(paths.ddpm_alphas_cumprod()),
    "edm": paths.edm(),
    "flow": paths.flow(),
}
CLEAN = [(name, grid) for name in PATHS for grid in ("uniform", "logsnr", "karras")]


def in_x0(table, path) -> np.ndarray:
    """Every point over (noise, x0_1 .. x0_R, z_0 .. z_R): eps and v outputs written as x0 and the point."""
    rows = table.calls
    unit = np.eye(1 + rows + rows + 1)
    x = y = unit[0]
    history = np.zeros((table.slots, len(unit)))
    points = []
    for row in range(rows + 1):
        if row:
            t, alpha, sigma = (getattr(table, name)[row - 1, 0] for name in ("t", "alpha", "sigma"))
            d, form = unit[row], table.form[row - 1]
            if form != "x0":
                eps = (y - alpha * d) / sigma
                d = eps if form == "eps" else path.alpha_prime(t) * d + path.sigma_prime(t) * eps
            history[table.slot[row - 1]] = d
        a, b, c = table.a[row, 0], table.b[row, 0], table.c[row, 0]
        x, y = (a[k, 0] * x + a[k, 1] * y + b[k] @ history + c[k] * unit[1 + rows + row] for k in (0, 1))
        points.append(x if row == rows else y)
    return np.array(points)


def difference(one, other, path) -> float:
    """The largest difference of two tables' canonical coefficients, relative to the path's noise scale."""
    np.testing.assert_array_equal(one.t, other.t)
    return float(np.abs(in_x0(one, path) - in_x0(other, path)).max() / max(1.0, one.sigma.max()))


@pytest.mark.parametrize("name, grid", CLEAN)
def test_all_first_order_solvers_are_ddim(name, grid):
    path = PATHS[name]
    times = getattr(grids, grid)(path, 6)
    table = ddim(path, times)
    others = [
        unipc(path, times, order=1, corrector=False), unipc(path, times, order=1, corrector=False, form="eps"),
        deis(path, times, order=1), dpmpp(path, times, order=1), dpm(path, times, order=1), ipndm(path, times, order=1),
        sa(path, times, predictor=1, corrector=0, tau=0.0), sde_dpmpp(path, times, order=1, eta=0.0),
        ersde(path, times, order=1, scale="ode"), multistep(path, times, nodes=1),
    ]  # fmt: skip
    for other in others:
        assert difference(table, other, path) < 1e-12, other.solver


@pytest.mark.parametrize("n", [1, 2, 7])
def test_on_a_flow_ddim_is_euler(n):
    path = paths.flow()
    times = grids.uniform(path, n)
    euler = multistep(path, times, form="v", variable="t", nodes=1)
    np.testing.assert_array_equal(euler.b[1:, 0, 0, 0], np.diff(times))
    assert difference(euler, ddim(path, times), path) < 1e-12


@pytest.mark.parametrize("name, grid", CLEAN)
def test_unip_2_bh2_is_dpm_solver_pp_2m(name, grid):
    path = PATHS[name]
    times = getattr(grids, grid)(path, 7)
    one = unipc(path, times, order=2, corrector=False, final="auto")
    assert difference(one, dpmpp(path, times, order=2), path) < 1e-12
    if name != "flow":
        other = unipc(path, times, order=2, corrector=False, final="auto", form="eps")
        assert difference(other, dpm(path, times, order=2), path) < 1e-12


@pytest.mark.parametrize("name, grid", CLEAN)
@pytest.mark.parametrize("form", ["x0", "eps"])
def test_from_three_nodes_on_the_multistep_weights_are_unique(name, grid, form):
    path = PATHS[name]
    times = getattr(grids, grid)(path, 7)

    def settled(table):  # rows of two nodes differ between bh1 and bh2, so compare the rows after them
        return table.a[4:], table.b[4:]

    rows = [
        settled(unipc(path, times, order=3, rule=rule, form=form, corrector=False, final="auto"))
        for rule in ("bh1", "bh2")
    ]
    rows.append(settled(multistep(path, times, form=form, variable="lam", nodes=3)))
    rows.append(settled((dpmpp if form == "x0" else dpm)(path, times, order=3, weight="exact")))
    for a, b in rows[1:]:
        np.testing.assert_allclose(a, rows[0][0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(b, rows[0][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, grid", CLEAN)
def test_named_members_are_points_of_the_multistep_family(name, grid):
    path = PATHS[name]
    times = getattr(grids, grid)(path, 6)
    pairs = [
        (dpmpp(path, times, order=2, weight="exact"), dict(form="x0", variable="lam", nodes=2)),
        (dpmpp(path, times, order=3, weight="exact"), dict(form="x0", variable="lam", nodes=3)),
        (deis(path, times, order=3), dict(form="eps", variable="t", nodes=3)),
        (ipndm_v(path, times, order=4), dict(form="eps", variable="rho", nodes=4)),
        (deis(path, times, order=4, variable="rho"), dict(form="eps", variable="rho", nodes=4)),
        (ersde(path, times, order=2, scale="ode"), dict(form="x0", variable="rho", nodes=2)),
        (ersde(path, times, order=2, scale="ode", weight="exact"), dict(form="x0", variable="rho", nodes=2)),
        (sde_dpmpp(path, times, order=2, eta=0.0, weight="exact"), dict(form="x0", variable="lam", nodes=2)),
        (sa(path, times, predictor=3, corrector=0, tau=0.0, final="auto"), None),
    ]  # fmt: skip
    for table, point in pairs[:-1]:
        assert difference(table, multistep(path, times, **point), path) < 1e-12, (table.solver, table.options)
    # SA's two-node rows are bh1's
    bh1 = unipc(path, times, order=3, rule="bh1", corrector=False, final="auto")
    assert difference(pairs[-1][0], bh1, path) < 1e-12


def test_er_sde_of_order_3_with_the_exact_weight_is_the_parabola_in_rho():
    path = PATHS["vp_linear"]
    times = grids.uniform(path, 7, end="t_min")
    parabola = multistep(path, times, form="x0", variable="rho", nodes=3)
    assert difference(ersde(path, times, order=3, scale="ode", weight="exact"), parabola, path) < 1e-12
    assert difference(ersde(path, times, order=3, scale="ode"), parabola, path) > 1e-4


@pytest.mark.parametrize("name, grid", CLEAN)
def test_unipc_in_eps_form_over_lam_is_deis_of_diffusers(name, grid):
    path = PATHS[name]
    times = getattr(grids, grid)(path, 7, end="t_min")
    one = unipc(path, times, order=3, form="eps", corrector=False, final="auto")
    other = deis(path, times, order=3, variable="lam")
    np.testing.assert_allclose(one.b[4:], other.b[4:], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name, grid", CLEAN)
def test_the_stochastic_first_order_solvers_are_one(name, grid):
    path = PATHS[name]
    times = getattr(grids, grid)(path, 6)
    ancestral = ddim(path, times, eta=1.0)
    for other in (
        ddpm(path, times),
        sde_dpmpp(path, times, order=1, eta=1.0),
        sa(path, times, predictor=1, corrector=0, tau=1.0),
        ersde(path, times, order=1, scale="sde"),
    ):
        assert difference(ancestral, other, path) < 1e-12, other.solver


@pytest.mark.parametrize(
    "form, variable", [("eps", "rho"), ("eps", "lam"), ("x0", "rho"), ("x0", "lam"), ("x0", "snr")]
)
def test_paths_with_equal_noise_levels_give_equal_tables(form, variable):
    """x / alpha walks the same way on every path, if the variable does not know the path's clock."""
    vp, edm = PATHS["vp_linear"], PATHS["edm"]
    rho = np.geomspace(50.0, 0.01, 8)
    one = multistep(vp, vp.time_of_rho(rho), form=form, variable=variable, nodes=3)
    other = multistep(edm, rho, form=form, variable=variable, nodes=3)
    alpha = np.append(one.alpha[:, 0], vp.alpha(one.times[-1]))
    assert np.abs(in_x0(one, vp) / alpha[:, None] - in_x0(other, edm)).max() / rho[0] < 1e-12


def test_the_clock_matters_where_the_variable_is_t():
    vp, edm = PATHS["vp_linear"], PATHS["edm"]
    rho = np.geomspace(50.0, 0.01, 8)
    one = multistep(vp, vp.time_of_rho(rho), form="x0", variable="t", nodes=3)
    other = multistep(edm, rho, form="x0", variable="t", nodes=3)
    assert np.abs(in_x0(one, vp)[-1, 1:] / vp.alpha(one.times[-1]) - in_x0(other, edm)[-1, 1:]).max() > 1e-3


def in_x0_form(table, path):
    """The same solver, as a table that stores x0: every point written out over the noise and all outputs before it."""
    points = in_x0(table, path)
    p = Program(path, table.times)
    noise = p.start(1.0)
    outputs = []
    for row in range(table.calls):
        point = noise * points[row, 0]
        for weight, d in zip(points[row, 1:], outputs, strict=False):
            point = point + weight * d
        outputs.append(p.call(point, t=table.t[row], form="x0", base=noise))
    x = noise * points[-1, 0]
    for weight, d in zip(points[-1, 1:], outputs, strict=False):
        x = x + weight * d
    return p.table(x)


@pytest.mark.parametrize("build, options", [
    (deis, dict(order=4)), (ipndm, {}), (dpm, dict(order=3)), (unipc, dict(order=3, form="eps")),
    (multistep, dict(form="v", variable="t", nodes=3)),
])  # fmt: skip
def test_a_table_rewritten_in_x0_form_samples_the_same(build, options):
    path = PATHS["flow"]
    table = build(path, grids.uniform(path, 8), **options)
    rewritten = in_x0_form(table, path)
    assert set(rewritten.form) == {"x0"} != set(table.form)
    d = GaussianMixture([0.3, 0.7], [[1.0, 2.0], [-1.0, 0.5]], [0.2, 0.05]).denoiser(path)
    noise = starting_noise(0, 16, (2,), dtype=torch.float64)
    torch.testing.assert_close(sample(d, noise, rewritten), sample(d, noise, table), rtol=0, atol=1e-11)
