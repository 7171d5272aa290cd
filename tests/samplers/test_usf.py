"""A schedule that spells out a known solver is that solver; schedules that mix forms are what they say."""

import numpy as np
import pytest

from fewstep.models import paths
from fewstep.samplers import Table, ddim, deis, dpm, dpm_single, dpmpp, grids, multistep, unipc, usf
from fewstep.samplers.usf import Step, read_steps

PATHS = {
    "vp_linear": paths.vp_linear(),
    "vp_cosine": paths.vp_cosine(),
    "vp_discrete": paths.vp_discrete(paths.ddpm_alphas_cumprod()),
    "edm": paths.edm(),
    "flow": paths.flow(shift=3.0),
}
STEPS = 7
TOLERANCE = 1e-12  # of the largest weight: eps steps from alpha = 1e-4 have weights of 1e4 that cancel


def gap(one: Table, other: Table) -> float:
    a, b = one.unrolled(form="x0"), other.unrolled(form="x0")
    size = max(1.0, np.abs(b.d).max(), np.abs(b.noise).max(), *(np.abs(t.b).max() for t in (one, other)))
    return max(np.abs(a.noise - b.noise).max(), np.abs(a.d - b.d).max()) / size


def eps_steps(path, variable, order, rule=""):
    """From alpha = 0 the hand-made solvers take a DDIM step, and forget its output."""
    if path.alpha(path.t_max) > 0:
        return f"eps {variable} {order} {rule}"
    return ["x0 vp 1", *(f"eps {variable} {min(order, i)} {rule}" for i in range(1, STEPS))]


def unipc_steps(order, rule):
    return [f"x0 lam {n} {rule} corrector={n}" for n in (min(order, i + 1, STEPS - i) for i in range(STEPS))]


@pytest.mark.parametrize("grid", [grids.logsnr, grids.vp, grids.karras], ids=lambda g: g.__name__)
@pytest.mark.parametrize("name", PATHS)
def test_a_spelled_out_solver_is_that_solver(name, grid):
    path = PATHS[name]
    times = grid(path, STEPS)
    pairs = [
        ("x0 vp 1", ddim(path, times)),
        ("x0 lam 2 shipped", dpmpp(path, times)),
        ("x0 lam 3 shipped", dpmpp(path, times, order=3)),
        ("x0 lam 3", dpmpp(path, times, order=3, weight="exact")),
        (eps_steps(path, "lam", 2, "shipped"), dpm(path, times)),
    ]
    for nodes in (2, 3, 4):
        pairs.append((f"x0 vp {nodes}", multistep(path, times, variable="vp", nodes=nodes, corrector=False)))
        corrected = multistep(path, times, variable="vp", nodes=nodes, corrector=True)
        pairs.append((f"x0 vp {nodes} corrector={nodes - 1}", corrected))
        pairs += [
            (eps_steps(path, v, nodes), deis(path, times, order=nodes, variable=v))
            for v in ("t", "rho", "lam")
        ]
    pairs += [
        (unipc_steps(o, r), unipc(path, times, order=o, rule=r)) for o in (1, 2, 3) for r in ("bh1", "bh2")
    ]
    if name in ("edm", "flow"):
        pairs.append(("v t 3", multistep(path, times, form="v", variable="t", nodes=3, corrector=False)))
    for steps, table in pairs:
        made = usf(path, times, steps=steps)
        assert gap(made, table) < TOLERANCE, (steps, table.solver, table.options)
        assert (made.calls, made.times.tolist()) == (table.calls, table.times.tolist())


@pytest.mark.parametrize("form", ["x0", "eps"])
def test_steps_from_an_earlier_point_are_single_step_solvers(form):
    path = PATHS["vp_linear"]
    coarse = path.time(np.linspace(path.lam(1.0), path.lam(0.01), 4))
    middles = path.time((path.lam(coarse[1:]) + path.lam(coarse[:-1])) / 2)
    times = np.append(np.stack([coarse[:-1], middles], axis=1).ravel(), coarse[-1])
    made = usf(path, times, steps=[f"{form} lam 1", f"{form} lam 1 back=1"] * 3)
    assert gap(made, dpm_single(path, coarse, order=2, form=form)) < TOLERANCE


def test_another_schedule_is_another_table():
    path, times = PATHS["vp_linear"], grids.vp(PATHS["vp_linear"], STEPS)
    texts = ["x0 vp 3", "x0 lam 3", "eps lam 3", "x0 vp 3 taylor", "x0 vp 2"]
    texts += ["x0 vp 3 back=1", "x0 vp 3 corrector=1", "x0 vp 3 scale=0.9"]
    tables = [usf(path, times, steps=text) for text in texts]
    for i, one in enumerate(tables):
        assert all(gap(one, other) > 1e-4 for other in tables[:i])


@pytest.mark.parametrize("name", PATHS)
def test_mixed_forms_are_integrated_exactly(name, run_table):
    """Where x0 is a straight line in the variable and the form is x0, two nodes are exact, whatever came before; the
    table is run with a network that answers so, against the same steps made one after the other by hand."""
    path = PATHS[name]
    times = grids.vp(path, 5)
    steps = ["x0 vp 1", "eps lam 2", "x0 t 2", "eps rho 3", "x0 vp 3"]
    rng = np.random.default_rng(0)
    start, turn = rng.standard_normal(6), rng.standard_normal((6, 6)) / 3

    def x0_of(y, t):  # not linear in t, and depends on y
        return np.tanh(turn @ y / (path.alpha(t) + path.sigma(t))) + t / path.t_max

    made = run_table(usf(path, times, steps=steps), path, start * path.sigma(float(times[0])), x0_of)
    assert np.abs(made - by_hand(path, times, [Step.read(s) for s in steps], start, x0_of)).max() < 1e-11


def by_hand(path, times, steps, start, x0_of):
    """The same schedule with both forms of every output kept as numbers."""
    from fewstep.samplers.quadrature import decay, weights

    at = lambda i: np.array([times[i]])  # noqa: E731
    x, outputs = path.sigma(float(times[0])) * start, []
    for i, step in enumerate(steps):
        t = float(times[i])
        x0 = x0_of(x, t)
        outputs.insert(0, ({"x0": x0, "eps": (x - path.alpha(t) * x0) / path.sigma(t)}, at(i)))
        used = outputs[: step.nodes]
        b = weights(path, at(i), at(i + 1), [t for _, t in used], step.form, step.variable, limit=False)
        x = decay(path, at(i), at(i + 1), step.form) * x + sum(w * d[step.form] for w, (d, _) in zip(b, used))
    return x


def test_scale_and_taylor():
    path = PATHS["vp_linear"]
    times = grids.vp(path, STEPS)
    assert gap(usf(path, times, steps="x0 vp 3 scale=0"), ddim(path, times)) < TOLERANCE
    # with two nodes the first derivative is the first derivative, and B(h) is a scale
    assert gap(usf(path, times, steps="eps t 2 taylor"), usf(path, times, steps="eps t 2")) < TOLERANCE
    begin, end = path.lam(times[1]), path.lam(times[2])
    h = end - begin
    moment = 1 - (1 - np.exp(-h)) / h  # of lam - lam_s over h, exactly; bh2 takes (1 - e^-h) / 2 instead
    scale = float(0.5 * (1 - np.exp(-h)) / moment)
    one = ["x0 vp 1", f"x0 lam 2 scale={scale!r}", *["x0 vp 1"] * (STEPS - 2)]
    two = ["x0 vp 1", "x0 lam 2 bh2", *["x0 vp 1"] * (STEPS - 2)]
    assert gap(usf(path, times, steps=one), usf(path, times, steps=two)) < TOLERANCE


def test_taylor_takes_its_derivatives_from_the_newest(run_table):
    """Where x0 is quadratic in t: the weights on (1, t - t_s, (t - t_s)^2) are the moments, but the slope that the two
    newest see is off by the curvature times their distance."""
    path, times = PATHS["flow"], np.array([0.9, 0.6, 0.4, 0.1])
    exact, low = (usf(path, times, steps=["x0 t 1", "x0 t 2", f"x0 t 3{r}"]) for r in ("", " taylor"))
    x0_of = lambda y, t: np.array([(t - 0.4) ** 2])  # noqa: E731
    difference = run_table(low, path, np.array([0.0]), x0_of) - run_table(exact, path, np.array([0.0]), x0_of)
    s, n = 0.4, 0.1  # sigma_n int (t - s) d(alpha / sigma) of what the slope is off by: 0.2
    first = n * ((-s) * (1 / n - 1 / s) - np.log(n / s))
    # d(1/t - 1) = -dt/t^2:  int (t - s) (-dt/t^2) = -log(n/s) - s (1/n - 1/s)
    assert difference == pytest.approx(0.2 * first, rel=1e-9)


def test_lanes_are_tables_of_their_own():
    path = PATHS["flow"]
    times = np.stack([grids.vp(path, 4), grids.uniform(path, 4)])
    steps = ["x0 vp 1", "eps t 2", "x0 lam 3 corrector=2", "x0 vp 3"]
    both = usf(path, times, steps=steps)
    for lane in (0, 1):
        assert gap(both.lane(lane), usf(path, times[lane], steps=steps)) < 1e-15


def test_text_there_and_back():
    for text in ("x0 vp 3", "eps lam 2 bh1 back=1 corrector=2", "v t 4 taylor scale=0.1234567890123456"):
        assert str(Step.read(text)) == text and Step.read(Step.read(text)) == Step.read(text)
    table = usf(PATHS["edm"], [80, 10, 1, 0], steps=["x0 vp 1", "eps rho 2", "x0 vp 2"])
    again = Table.from_json(table.to_json())
    assert gap(usf(PATHS["edm"], again.times, **again.options), table) == 0


REFUSED = {
    "x0 vp": "like 'x0 vp 3'", "x0 vp three": "like", "y vp 2": "form", "x0 log 2": "variable", "x0 vp 5": "nodes",
    "x0 vp 2 bh3": "rule", "x0 vp 2 back=9": "back", "x0 vp 2 order=2": "order=2", "x0 vp 2 scale=4": "scale",
    "x0 vp 2 scale=nan": "scale", "x0 vp 2 corrector=x": "with a number", "v t 2": "straight", 7: "steps",
    ("x0 vp 1",): "one for each of the 3", ("x0 vp 1", "x0 vp 1", 3): "like",
}  # fmt: skip


@pytest.mark.parametrize("steps", REFUSED)
def test_what_is_refused(steps):
    with pytest.raises(ValueError, match=REFUSED[steps]):
        usf(PATHS["vp_linear"], grids.vp(PATHS["vp_linear"], 3), steps=steps)


def test_one_step_for_all():
    assert read_steps("x0 vp 2", 3) == [Step("x0", "vp", 2)] * 3
