"""A second reading of what a table means, in a dozen lines of numpy, and the solvers that there are."""

import itertools

import pytest

from fewstep import samplers
from fewstep.models import paths


def run(table, path, start, x0_of, z=lambda row: 0.0, seen=None):
    """The result from ``start``, in place of sigma_0 noise, with x0_of(y, t) as the network; any array will do."""
    scale = table.a[0, 0].sum(axis=-1) / path.sigma(float(table.times[0]))
    x, y = (scale[k] * start + (table.c[0, 0, k] * z(-1) if table.c[0].any() else 0.0) for k in (0, 1))
    d = [0.0] * table.slots
    for row in range(table.calls):
        t = float(table.t[row, 0])
        if seen is not None:
            seen.append((t, y))
        x0 = x0_of(y, t)
        sigma = path.sigma(t)
        eps = (y - path.alpha(t) * x0) / sigma
        forms = {"x0": x0, "eps": eps, "v": path.alpha_prime(t) * x0 + path.sigma_prime(t) * eps}
        d[table.slot[row]] = forms[table.form[row]]
        a, b, c = (array[row + 1, 0] for array in (table.a, table.b, table.c))
        fresh = z(row) if c.any() else 0.0
        x, y = (
            a[k, 0] * x + a[k, 1] * y + sum(w * v for w, v in zip(b[k], d, strict=True) if w) + c[k] * fresh
            for k in (0, 1)
        )
    return x


CHOICES = {
    "order": (1, 2, 3, 4),
    "nodes": (1, 2, 3, 4),
    "form": ("eps", "x0", "v"),
    "variable": ("t", "rho", "lam", "snr"),
    "method": ("1euler", "2heun", "2mid", "2ralston", "3kutta", "3heun", "3ralston", "3ssp", "4"),
    "rk": ("3kutta",),
    "weight": ("midpoint", "exact", "shipped"),
    "rule": ("bh1", "bh2"),
    "start": ("lower", "rk"),
    "final": ("auto", "lower"),
    "variant": ("fast", "simple", "plms"),
    "variance": ("small", "large"),
    "corrector": (0, 1, 2, 3),
    "predictor": (1, 2, 3),
    "eta": (0.5, 1.0),
    "tau": (0.0, 0.5, 1.0),
    "gamma": (0.5,),
    "s_churn": (5.0,),
    "scheme": ("euler", "preserving"),
}
SOLVERS = {
    name: getattr(samplers, name) for name in samplers.__all__ if hasattr(getattr(samplers, name), "entry")
}


def all_variants():
    """(name, options) of every exported solver: its defaults, each known option alone, order with start and form."""
    for name, solver in SOLVERS.items():
        defaults = solver.entry.options
        known = [key for key in CHOICES if key in defaults]
        found = [{}, *({key: value} for key in known for value in CHOICES[key])]
        for key, other, values in itertools.product(
            ("order", "nodes"), ("start", "form"), (("rk",), ("eps", "x0", "v"))
        ):
            if key in known and other in known and values[0] in CHOICES[other]:
                found += [{key: a, other: b} for a, b in itertools.product(CHOICES[key], values)]
        distinct = {tuple({**defaults, **options}.items()): options for options in reversed(found)}
        yield from ((name, options) for options in reversed(distinct.values()))


def build(name, options, path, times):
    """The table, or None where the solver says, by name, that it has no such option here."""
    try:
        return SOLVERS[name](path, times, **options)
    except ValueError as error:
        assert any(key in str(error) for key in options), f"{name}({options}) on {path.name}: {error}"
        return None


@pytest.fixture
def run_table():
    return run


@pytest.fixture
def variants():
    return list(all_variants())


@pytest.fixture
def build_table():
    return build


@pytest.fixture
def all_paths():
    discrete = paths.vp_discrete(paths.ddpm_alphas_cumprod())
    return [paths.vp_linear(), paths.vp_cosine(), discrete, paths.edm(), paths.flow(shift=3.0)]
