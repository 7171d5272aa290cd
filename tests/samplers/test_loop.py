"""The loop: a sample's bits are its own, steps fold, histories travel, gradients flow, and bad numbers are named."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fewstep.models import Denoiser, GaussianMixture, paths
from fewstep.samplers import (
    Program,
    State,
    ddim,
    deis,
    dpmpp,
    grids,
    init,
    multistep,
    sample,
    starting_noise,
    step,
    take,
)
from fewstep.samplers.loop import Info
from fewstep.samplers.noise import normal

SHAPE = (3, 5, 5)  # 75 elements: neither a multiple of 4 nor of a vector register
FLOW = paths.flow()


def toy(path=FLOW, predicts="x0"):
    """A nonlinear network whose arithmetic knows nothing of its batch: elementwise, exact per element."""

    def call(x, tau):
        return (x * 0.9).clamp(-1.5, 1.5) * 0.7 + 0.1 / (1 + tau.to(x.dtype).reshape(-1, 1, 1, 1))

    return Denoiser(call, path, predicts=predicts)


def churned(path, times):
    """Two registers, several slots, noise in both rows of a step: all that a table can hold."""
    p = Program(path, times)
    x = p.start()
    older = None
    for i in range(p.steps):
        d = p.call(x, at=i, form="x0")
        middle = 0.5 * (p.t[i] + p.t[i + 1])
        ratio = path.sigma(middle) / p.sigma[i]
        point = ratio * x + (path.alpha(middle) - ratio * p.alpha[i]) * d + 0.05 * p.noise()
        e = p.call(point, t=middle, form="x0", base=x)
        ratio = p.sigma[i + 1] / p.sigma[i]
        mix = 0.8 * e + 0.2 * (d if older is None else older)
        older = e
        x = ratio * x + (p.alpha[i + 1] - ratio * p.alpha[i]) * mix
        x = x + 0.1 * p.sigma[i + 1] * p.noise()
    return p.table(x)


TABLES = {
    "ddim": lambda path: ddim(path, grids.uniform(path, 6)),
    "ancestral": lambda path: ddim(path, grids.uniform(path, 6), eta=1.0),
    "deis": lambda path: deis(path, grids.uniform(path, 6), order=4),
    "dpmpp": lambda path: dpmpp(path, grids.logsnr(path, 6), order=3),
    "churned": lambda path: churned(path, grids.uniform(path, 4)),
}


# --- a sample's bits are its own -------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_17_is_the_same_bits_alone_in_a_batch_and_reversed(name, dtype):
    d, table = toy(), TABLES[name](FLOW)
    noise, ids = starting_noise(3, 64, SHAPE, dtype=dtype), torch.arange(64)
    whole = sample(d, noise, table, seed=5)
    assert whole.dtype == dtype
    alone = sample(
        d, starting_noise(3, torch.tensor([17]), SHAPE, dtype=dtype), table, seed=5, ids=torch.tensor([17])
    )
    assert torch.equal(whole[17:18], alone)
    assert torch.equal(whole, sample(d, noise.flip(0), table, seed=5, ids=ids.flip(0)).flip(0))
    assert torch.equal(
        whole,
        torch.cat([sample(d, noise[k : k + 7], table, seed=5, ids=ids[k : k + 7]) for k in range(0, 64, 7)]),
    )
    assert table.stochastic != torch.equal(whole, sample(d, noise, table, seed=6))


EXACT = """
import torch
from fewstep.models import GaussianMixture, paths
from fewstep.samplers import ddim, grids, sample, starting_noise
d = GaussianMixture([0.3, 0.7], [[-1.0, 0.0, 2.0], [1.0, 1.0, 0.0]], [0.1, 0.3]).denoiser(paths.flow())
table = ddim(d.path, grids.uniform(d.path, 5), eta=1.0)
x = sample(d, starting_noise(3, ids, (3,)), table, seed=5, ids=ids)
bits = x[ids == 17].view(torch.int32).tolist()
"""


def test_sample_17_is_the_same_bits_in_two_processes_with_an_exact_denoiser():
    here: dict = {"ids": torch.arange(64)}
    exec(EXACT, here)
    there = f"import torch; ids = torch.tensor([17]); {EXACT}print(bits)"
    out = subprocess.run([sys.executable, "-c", there], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(here["bits"]) and len(here["bits"]) == 1


# --- one step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_steps_by_hand_are_sample(name):
    d, table, noise = toy(), TABLES[name](FLOW), starting_noise(0, 5, SHAPE)
    plan = table.on(d)
    state, seen = init(plan, noise, seed=2), []
    for _ in range(table.calls):
        state, info = step(d, plan, state, seed=2)
        seen.append(info.t)
    assert torch.equal(state.x, sample(d, noise, table, seed=2))
    assert torch.equal(state.x, sample(d, noise, plan, seed=2))
    assert seen == table.t[:, 0].tolist() and state.row == table.calls
    with pytest.raises(ValueError, match="sampling is over"):
        step(d, plan, state)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("predicts", ["x0", "eps", "flow"])
def test_the_folded_row_is_the_table_as_it_is_written(name, predicts):
    """The definition of a table, row by row in float64, against the plan's folded weights."""
    path = paths.vp_linear()
    d, table = toy(path, predicts), TABLES[name](path)
    noise = starting_noise(0, 3, SHAPE, dtype=torch.float64)
    x = y = None
    history = [torch.zeros_like(noise)] * table.slots
    for row in range(table.calls + 1):
        if row:
            t = float(table.t[row - 1, 0])
            history[table.slot[row - 1]] = d(y, t) if table.form[row - 1] == "x0" else d.eps(y, t)
        z = normal(2, torch.arange(3), SHAPE, row, stream=0, dtype=torch.float64)
        old = (x, y) if row else (noise, noise)
        x, y = (
            sum(float(table.a[row, 0, k, j]) * old[j] for j in (0, 1))
            + sum(float(b) * stored for b, stored in zip(table.b[row, 0, k], history, strict=True))
            + float(table.c[row, 0, k]) * z
            for k in (0, 1)
        )
    # a dozen terms a row and a dozen rows, each rounded once: some hundred roundings of numbers of order ten
    torch.testing.assert_close(sample(d, noise, table, seed=2), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_at_rows_of_their_own_are_the_samples_run_alone(name, dtype):
    d, table = toy(), TABLES[name](FLOW)
    plan, noise = table.on(d), starting_noise(0, 3, SHAPE, dtype=dtype)
    whole = sample(d, noise, plan, seed=9)
    # sample k is k calls ahead of sample 0
    states = []
    for k in range(3):
        state = init(plan, noise[k : k + 1], torch.tensor([k]), seed=9)
        for _ in range(k):
            state, _ = step(d, plan, state, seed=9)
        history = tuple(torch.zeros_like(state.x) if s is None else s for s in state.d)
        states.append(state._replace(d=history, row=torch.tensor([state.row])))
    state = _joined(states)
    for _ in range(table.calls - 2):
        state, info = step(d, plan, state, seed=9)
    assert torch.equal(state.x[2], whole[2])
    rest = take(state, torch.tensor([0, 1]))
    rest, _ = step(d, plan, rest, seed=9)
    assert torch.equal(rest.x[1], whole[1])
    assert info.t.tolist() == [float(table.t[int(r), 0]) for r in info.row]
    last, _ = step(d, plan, take(rest, torch.tensor([0])), seed=9)
    assert torch.equal(last.x[0], whole[0])


def _joined(states: list[State]) -> State:
    x, y, row, ids = (torch.cat([getattr(s, name) for s in states]) for name in ("x", "y", "row", "ids"))
    return State(x, y, tuple(torch.cat(slot) for slot in zip(*(s.d for s in states), strict=True)), row, ids)


@pytest.mark.parametrize("name", TABLES)
def test_lanes_are_tables_side_by_side(name):
    def build(times):
        return {
            "ddim": lambda: ddim(FLOW, times), "ancestral": lambda: ddim(FLOW, times, eta=1.0),
            "deis": lambda: deis(FLOW, times, order=4), "dpmpp": lambda: dpmpp(FLOW, times, order=3),
            "churned": lambda: churned(FLOW, times),
        }[name]()  # fmt: skip

    d, noise = toy(), starting_noise(0, 6, SHAPE)
    times = np.stack([grids.uniform(FLOW, 4), grids.quadratic(FLOW, 4), grids.power(FLOW, 4, 3.0)])
    together, lane = build(times), torch.tensor([0, 1, 2, 2, 1, 0])
    assert together.lanes == 3
    out = sample(d, noise, together, lane=lane, seed=4)
    for one in range(3):
        mine = lane == one
        alone = build(times[one])
        expected = sample(d, noise[mine], alone, seed=4, ids=torch.arange(6)[mine])
        assert torch.equal(out[mine], expected)
        assert torch.equal(
            expected, sample(d, noise[mine], together, lane=one, seed=4, ids=torch.arange(6)[mine])
        )
        assert together.lane(one).to_json() != together.to_json()
        assert torch.equal(
            expected, sample(d, noise[mine], together.lane(one), seed=4, ids=torch.arange(6)[mine])
        )


@pytest.mark.parametrize(
    "bad", [3, -1, True, 1.0, torch.tensor([0, 3]), torch.tensor([0]), torch.tensor([0.0, 1.0])]
)
def test_lanes_that_are_not_there(bad):
    times = np.stack([grids.uniform(FLOW, 2)] * 3)
    with pytest.raises(ValueError, match="lane must"):
        sample(toy(), torch.zeros(2, *SHAPE), ddim(FLOW, times), lane=bad)


# --- take ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_take_permutes_the_history_too(name):
    d, table, noise = toy(), TABLES[name](FLOW), starting_noise(0, 6, SHAPE)
    plan, order = table.on(d), torch.tensor([3, 0, 5, 1, 4, 2])
    state = init(plan, noise)
    for row in range(table.calls):
        if row == 2:
            state = take(state, order)
        if row == 4:
            state = take(state, torch.argsort(order))
        state, _ = step(d, plan, state)
    assert torch.equal(state.x, sample(d, noise, table))
    assert state.ids.tolist() == list(range(6))


def test_clones_with_fresh_ids_part_and_clones_without_do_not():
    d, table = toy(), TABLES["ancestral"](FLOW)
    plan = table.on(d)
    state, _ = step(d, plan, init(plan, starting_noise(0, 2, SHAPE)))
    twice = torch.tensor([0, 0])
    same, _ = step(d, plan, take(state, twice))
    apart, _ = step(d, plan, take(state, twice, ids=torch.tensor([0, 9])))
    assert torch.equal(same.x[0], same.x[1]) and not torch.equal(apart.x[0], apart.x[1])
    assert torch.equal(same.x[0], apart.x[0])
    with pytest.raises(ValueError, match="ids must"):
        take(state, twice, ids=torch.tensor([0.0, 9.0]))


# --- gradients and precision -----------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_gradients_through_all_calls_are_those_of_finite_differences(name):
    d = GaussianMixture([0.5, 0.5], [[-1.0, 0.3], [1.0, -0.2]], [0.3, 0.6]).denoiser(FLOW)
    table = TABLES[name](FLOW)
    noise = starting_noise(0, 2, (2,), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda n: sample(d, n, table, grad="all", seed=1), noise, atol=1e-7, rtol=1e-6
    )


def test_gradients_flow_as_asked():
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    d = Denoiser(lambda x, t: gain * x, FLOW, predicts="x0")
    table, noise = TABLES["deis"](FLOW), starting_noise(0, 2, (2,), dtype=torch.float64)
    found = {how: sample(d, noise, table, grad=how) for how in ("none", "last", "all")}
    assert not found["none"].requires_grad
    slopes = {how: float(torch.autograd.grad(found[how].sum(), gain)[0]) for how in ("last", "all")}
    step_size = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            other = Denoiser(lambda x, t, k=0.7 + sign * step_size: k * x, FLOW, predicts="x0")
            values.append(float(sample(other, noise, table).sum()))
    assert slopes["all"] == pytest.approx((values[0] - values[1]) / (2 * step_size), rel=1e-7)
    assert abs(slopes["last"] - slopes["all"]) > 1e-2 * abs(slopes["all"])
    assert torch.equal(found["none"], found["all"].detach())
    with torch.no_grad():
        assert not sample(d, noise, table).requires_grad


def test_a_bf16_network_under_a_float32_state():
    """Every answer is rounded to 8 bits (2^-9 relative at most); the state is not, so the errors do not pile up."""
    path = paths.edm()
    seen = []

    def call(x, tau, dtype=torch.bfloat16):
        seen.append(x.dtype)
        return (x / (1.0 + tau.reshape(-1, 1) ** 2)).to(dtype)  # data N(0, 1): E[x0 | x] = x / (1 + sigma^2)

    half = Denoiser(call, path, predicts="x0")
    full = Denoiser(lambda x, tau: call(x, tau, x.dtype), path, predicts="x0")
    noise = starting_noise(0, 256, (16,))
    for steps in (10, 40):
        table = deis(path, grids.karras(path, steps), order=3)
        out = sample(half, noise, table)
        exact = sample(full, noise.double(), table)
        assert out.dtype == torch.float32
        assert float((out - exact).norm() / exact.norm()) <= 5e-3
    assert torch.float32 in seen
    assert sample(half, noise.bfloat16(), table).dtype == torch.float32


@pytest.mark.parametrize(
    "path", [paths.flow(), paths.vp_linear(), paths.vp_cosine(), paths.edm()], ids=lambda p: p.name
)
def test_a_thousand_steps_stay_finite_and_arrive(path):
    """In float32; a Gaussian's solution is known, and the steps of order n leave an error of 1000^-n."""

    def call(x, tau):  # E[x0 | x] of N(1, 1/4)
        alpha, sigma = (f(tau)[:, None].to(x.dtype) for f in (path.alpha, path.sigma))
        return 1 + 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * (x - alpha)

    noise, gaussian = starting_noise(0, 4, (2,)), GaussianMixture([1.0], [[1.0, 1.0]], [0.25])
    exact = gaussian.gaussian_trajectory(
        path, path.sigma(path.t_max) * noise.double(), path.t_max, path.t_clean
    )
    d = Denoiser(call, path, predicts="x0")
    times = grids.karras(path, 1000) if path.name == "edm" else grids.uniform(path, 1000)
    for table, bound in ((ddim(path, times), 1e-2), (deis(path, times, order=3), 2e-3)):
        out = sample(d, noise, table)
        assert out.dtype == torch.float32 and torch.isfinite(out).all()
        assert float((out - exact).abs().max()) < bound


# --- what a call sees ------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["x0", "eps", "flow", "score"])
def test_the_callback_sees_every_call(predicts):
    path = paths.vp_linear()
    d = GaussianMixture([0.5, 0.5], [[-1.0, 0.3], [1.0, -0.2]], [0.3, 0.6]).denoiser(path, predicts=predicts)
    table, seen = deis(path, grids.logsnr(path, 6)), []
    sample(d, starting_noise(0, 3, (2,), dtype=torch.float64), table, callback=seen.append)
    assert [info.row for info in seen] == list(range(6))
    for info in seen:
        assert isinstance(info, Info) and info.sigma == path.sigma(info.t) and bool(info.finite)
        torch.testing.assert_close(info.x0, d(info.y, info.t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predicts", ["x0", "eps"])
def test_a_transform_changes_what_is_stored_also_one_a_sample(predicts):
    path = paths.vp_linear()
    d = GaussianMixture([0.5, 0.5], [[-3.0, 3.0], [3.0, -3.0]], [0.3, 0.6]).denoiser(path, predicts=predicts)
    table, noise, seen = dpmpp(path, grids.logsnr(path, 10)), starting_noise(0, 8, (2,)), []
    out = sample(d, noise, table, transform=lambda x0, t: x0.clamp(-1, 1), callback=seen.append)
    assert float(out.abs().max()) <= 1 + 1e-6 < float(sample(d, noise, table).abs().max())
    for info in seen:
        torch.testing.assert_close(info.x0, d(info.y, info.t).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    limit = torch.linspace(0.5, 4.0, 8)[:, None]
    own = sample(d, noise, table, transform=lambda x0, t: torch.minimum(torch.maximum(x0, -limit), limit))
    for k in range(8):
        alone = sample(
            d,
            noise[k : k + 1],
            table,
            transform=lambda x0, t, k=k: x0.clamp(-float(limit[k]), float(limit[k])),
        )
        assert torch.equal(own[k : k + 1], alone)
    same = sample(d, noise.double(), table, transform=lambda x0, t: x0)
    torch.testing.assert_close(same, sample(d, noise.double(), table), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="transform answered shape"):
        sample(d, noise, table, transform=lambda x0, t: x0[:, :1])


def test_a_denoiser_that_is_not_affine_is_asked_for_x0():
    class Rescaled(Denoiser):
        def affine(self, t, form="x0"):
            return None

        def __call__(self, x, t, **cond):
            return 0.5 * x

    table, noise = TABLES["deis"](FLOW), starting_noise(0, 3, SHAPE)
    odd = Rescaled(lambda x, tau: x, FLOW)
    plain = Denoiser(lambda x, tau: 0.5 * x, FLOW, predicts="x0")
    seen = []
    assert torch.equal(sample(odd, noise, table, callback=seen.append), sample(plain, noise, table))
    assert torch.equal(seen[0].x0, 0.5 * seen[0].y)


def test_conditions_reach_the_network():
    d = Denoiser(lambda x, tau, label: label.reshape(-1, 1).to(x.dtype).expand_as(x), FLOW, predicts="x0")
    out = sample(
        d,
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
        TABLES["ddim"](FLOW),
        cond={"label": torch.tensor([4, 5, 6])},
    )
    torch.testing.assert_close(out[:, 0], torch.tensor([4.0, 5.0, 6.0]))


# --- no waiting for the device ---------------------------------------------------------------------


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the names of what runs."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


WAITS = (
    "_local_scalar_dense",
    "aten::item",
    "nonzero",
    "is_nonzero",
    "aten::equal",
    "masked_select",
    "unique",
    "_to_copy_cpu",
)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_a_step_never_waits_for_the_device(name, apart):
    d, table = toy(), TABLES[name](FLOW)
    plan = table.on(d)
    state = init(plan, starting_noise(0, 3, SHAPE))
    lane = 0
    if apart:
        state, lane = state._replace(row=torch.zeros(3, dtype=torch.long)), torch.zeros(3, dtype=torch.long)
        plan.gather(state.row, lane, torch.float32)  # uploads
    with Ops() as ops:
        for _ in range(table.calls):
            state, info = step(d, plan, state, lane=lane)
            info.finite  # noqa: B018
    assert ops.names and not [op for op in ops.names if any(wait in op for wait in WAITS)]
    with Ops() as ops:
        bool(info.finite)
    assert any("_local_scalar_dense" in op for op in ops.names)


def test_a_ddim_step_is_two_passes_over_the_state():
    """Nothing is stored that nobody reads: one multiplication and one axpy, whatever the network predicts."""
    for predicts in ("x0", "eps", "flow"):
        answer = torch.zeros(2, *SHAPE)
        d = Denoiser(lambda x, tau, answer=answer: answer, paths.vp_linear(), predicts=predicts)
        plan = ddim(d.path, grids.logsnr(d.path, 4)).on(d)
        state = init(plan, starting_noise(0, 2, SHAPE))
        with Ops() as ops:
            step(d, plan, state)
        passes = [op for op in ops.names if op.startswith(("aten::mul", "aten::add"))]
        assert passes == ["aten::mul.Tensor", "aten::add_.Tensor"]


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("check", ["each", "end"])
def test_a_non_finite_answer_is_named_by_step_time_and_sigma(value, check):
    calls = []

    def call(x, tau):
        calls.append(1)
        out = x.clone()
        if len(calls) == 4:
            out[1, 0, 2, 3] = value
        return out

    d, table = Denoiser(call, paths.vp_linear(), predicts="eps"), TABLES["deis"](paths.vp_linear())
    t, sigma = table.t[3, 0], table.sigma[3, 0]
    with pytest.raises(ValueError, match=f"not finite at step 3 of 6, t = {t:g}, sigma = {sigma:g}"):
        sample(d, starting_noise(0, 2, SHAPE), table, check=check)
    assert len(calls) == (4 if check == "each" else 6)
    calls.clear()
    assert not torch.isfinite(sample(d, starting_noise(0, 2, SHAPE), table, check="off")).all()


def test_large_answers_are_finite():
    d = Denoiser(lambda x, tau: torch.full_like(x, 1e200), FLOW, predicts="x0")
    assert torch.isfinite(sample(d, torch.zeros(1, 2, dtype=torch.float64), TABLES["ddim"](FLOW))).all()
    half = Denoiser(lambda x, tau: torch.full_like(x, 60000.0, dtype=torch.float16), FLOW, predicts="x0")
    assert torch.isfinite(sample(half, torch.zeros(1, 2000), TABLES["ddim"](FLOW))).all()


NOISE = torch.zeros(2, *SHAPE)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(noise=NOISE.long()), ValueError, r"floating-point tensor .* got torch.int64"),
        (dict(noise=NOISE.numpy()), ValueError, "floating-point tensor .* got ndarray"),
        (dict(noise=torch.zeros(3)), ValueError, r"shape \(batch, 3, 5, 5\) .* got \(3,\)"),
        (dict(noise=torch.zeros(2, 1, 8, 8)), ValueError, r"must have shape \(batch, 3, 5, 5\) .* got \(2, 1, 8, 8\)"),
        (dict(ids=torch.arange(3)), ValueError, r"ids must .* shape \(2,\), got torch.int64 of shape \(3,\)"),
        (dict(ids=torch.tensor([0.0, 1.0])), ValueError, "ids must be integers"),
        (dict(ids=[0, 1]), ValueError, r"ids must be integers.* got \[0, 1\]"),
        (dict(ids=torch.tensor([0, 2**32])), ValueError, "ids must lie in 0"),
        (dict(grad="some"), ValueError, "grad must be 'none', 'last' or 'all'"),
        (dict(check="never"), ValueError, "check must be 'end', 'each' or 'off'"),
        (dict(seed=-1), ValueError, "seed must be an int"),
        (dict(seed=0.5), ValueError, "seed must be an int"),
        (dict(d="digits"), TypeError, "d must be a Denoiser"),
        (dict(table="ddim"), TypeError, "table must be a Table or a Plan"),
        (dict(table=TABLES["ddim"](paths.vp_linear())), ValueError, "made for path 'vp_linear'.*'flow'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, words):
    d = toy()
    d.shape = SHAPE
    good = dict(d=d, noise=NOISE, table=TABLES["ancestral"](FLOW), seed=0)
    sample(**good)
    with pytest.raises(error, match=words):
        sample(**(good | change))


def test_a_network_that_answers_another_shape():
    with pytest.raises(
        ValueError, match=r"answered shape \(2, 6, 5, 5\) to an input of shape \(2, 3, 5, 5\)"
    ):
        sample(
            Denoiser(lambda x, tau: torch.cat([x, x], 1), FLOW, predicts="x0"), NOISE, TABLES["ddim"](FLOW)
        )


def test_an_eps_model_cannot_start_at_alpha_zero():
    with pytest.raises(ValueError, match="row 0 of ddim wants x0 at t = 1.*alpha = 0 .*eps-model"):
        sample(toy(predicts="eps"), NOISE, TABLES["ddim"](FLOW))


def test_solver_orders_and_steps_that_are_not_there():
    for order in (0, 9, 1.5, True):
        with pytest.raises(ValueError, match="order must be an integer in 1 .. 4"):
            deis(FLOW, grids.uniform(FLOW, 5), order=order)
    with pytest.raises(ValueError, match="number of steps, must be a positive integer, got 0"):
        grids.uniform(FLOW, 0)
    with pytest.raises(ValueError, match="its options are: order, variable"):
        deis(FLOW, grids.uniform(FLOW, 5), oder=3)
    with pytest.raises(ValueError, match="times must fall strictly"):
        multistep(FLOW, [0.0, 0.5, 1.0])
