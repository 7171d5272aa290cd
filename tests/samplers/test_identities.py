"""Point-mass data is sampled exactly by every table: the identities that each row of coefficients must satisfy.

If all data lie at one point x0, the network answers x0, eps and alpha' x0 + sigma' eps exactly, so every point that a
table visits must be alpha x0 + noise, and the noise must have variance sigma^2.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from fewstep.models import paths
from fewstep.samplers import catalogue, grids

PATHS = {
    "vp_linear": paths.vp_linear(),
    "vp_cosine": paths.vp_cosine(),
    "vp_discrete": paths.vp_discrete(paths.ddpm_alphas_cumprod()),
    "edm": paths.edm(),
    "flow": paths.flow(),
}
# every option that is tried beside its default, wherever a solver has it
VARIATIONS = {
    "order": (1, 2, 3, 4), "nodes": (1, 2, 4), "form": ("eps", "x0", "v"), "variable": ("t", "rho", "lam", "snr", "vp"),
    "weight": ("exact",), "rule": ("bh1",), "final": ("auto", "lower", "full"), "start": ("rk",),
    "corrector": (False, 0, 1, 3),
    "predictor": (1, 3), "tau": (0.0, 0.6), "between": ((0.1, 1.0),), "eta": (0.0, 0.5, 1.0), "variant": ("simple",),
    "scale": ("ode", "sde", lambda q: q**1.5),
}  # fmt: skip
# what a solver asks of its grid, beyond falling times
ASKS = {"restart": (("karras",), (12,))}
# what a solver is asked for to be on the marginals; its default is not, by what test_flow_sde.py says
ON_THE_MARGINALS = {"flow_sde": {"scheme": "preserving"}}


def visited(table, path, lane: int = 0) -> np.ndarray:
    """Coefficients over (x0, eps, z_0 .. z_R) of every point where the network is called, and of the result."""
    rows = table.calls
    unit = np.eye(2 + rows + 1)
    start = np.atleast_2d(table.times)[lane, 0]
    # the opening noise is that of a noised x0: sigma_0 noise = alpha_0 x0 + sigma_0 eps
    x = y = unit[1] + unit[0] * path.alpha(start) / path.sigma(start)
    history = np.zeros((table.slots, len(unit)))
    points = []
    for row in range(rows + 1):
        if row:
            t, alpha, sigma = (getattr(table, name)[row - 1, lane] for name in ("t", "alpha", "sigma"))
            eps = (y - alpha * unit[0]) / sigma if table.stochastic else unit[1]
            kinds = {"x0": unit[0], "eps": eps}
            if table.form[row - 1] == "v":
                kinds["v"] = path.alpha_prime(t) * unit[0] + path.sigma_prime(t) * eps
            history[table.slot[row - 1]] = kinds[table.form[row - 1]]
        a, b, c = table.a[row, lane], table.b[row, lane], table.c[row, lane]
        x, y = (a[k, 0] * x + a[k, 1] * y + b[k] @ history + c[k] * unit[2 + row] for k in (0, 1))
        points.append(x if row == rows else y)
    return np.array(points)


def violation(table, path, lane: int = 0) -> float:
    """The largest departure from alpha x0 + noise of variance sigma^2, in units of the path's own scale."""
    points = visited(table, path, lane)
    end = np.atleast_2d(table.times)[lane, -1]
    alpha = np.append(table.alpha[:, lane], path.alpha(end))
    sigma = np.append(table.sigma[:, lane], path.sigma(end))
    mean = np.abs(points[:, 0] - alpha).max()
    spread = np.abs(np.sqrt((points[:, 1:] ** 2).sum(axis=1)) - sigma).max() / max(1.0, sigma.max())
    return float(max(mean, spread))


def tables(name: str, path_name: str):
    """Tables of one solver on one path: its defaults on every grid, and each variation on one."""
    path, fixed = PATHS[path_name], ON_THE_MARGINALS.get(name, {})
    build = functools.partial(catalogue.solvers()[name], **fixed)
    names, sizes = ASKS.get(name, (("uniform", "logsnr", "karras"), (1, 2, 7)))
    for grid in names:
        for n in sizes:
            yield f"{grid}({n})", build(path, getattr(grids, grid)(path, n))
    times = getattr(grids, names[-1])(path, sizes[-1])
    midway = times[1:]
    if name not in ASKS:
        yield "midway", build(path, midway)
    for option in catalogue.solvers()[name].entry.options:
        for value in VARIATIONS.get(option, ()):
            try:
                yield f"{option}={value}", build(path, times, **{option: value})
            except ValueError as error:  # a choice that this solver or path does not have
                assert option in str(error), error


@pytest.mark.parametrize("path_name", PATHS)
@pytest.mark.parametrize("name", catalogue.solvers())
def test_every_point_is_alpha_x0_and_noise_of_variance_sigma_squared(name, path_name):
    checked = 0
    for what, table in tables(name, path_name):
        assert violation(table, PATHS[path_name]) < 1e-12, f"{name} on {path_name}, {what}"
        checked += 1
    assert checked >= 1


@pytest.mark.parametrize("array", ["a", "b", "c"])
@pytest.mark.parametrize("name", ["sa", "ersde", "sde_dpmpp", "ddpm"])
def test_a_perturbed_coefficient_is_caught(name, array):
    path = PATHS["vp_linear"]
    table = catalogue.find(name)(path, grids.uniform(path, 7, end="t_min"))
    changed = getattr(table, array).copy()
    row = table.calls - 2
    changed[row].flat[np.abs(changed[row]).argmax()] += 1e-6
    assert violation(dataclasses.replace(table, **{array: changed}), path) > 1e-9


@pytest.mark.parametrize("array", ["a", "b"])
@pytest.mark.parametrize("name", ["deis", "dpmpp", "unipc", "pndm", "rk"])
def test_a_perturbed_coefficient_of_a_deterministic_table_is_caught(name, array):
    test_a_perturbed_coefficient_is_caught(name, array)
