"""GS-Jacobi: the sequential inverse in fewer calls, and never anything else in silence."""

from __future__ import annotations

import warnings

import pytest
import torch

from fewstep.models.tarflow import TarFlow, TarFlowConfig, load_flow
from fewstep.samplers import gs_jacobi, starting_noise
from fewstep.samplers.gs_jacobi import Plan
from fewstep.samplers.gs_jacobi_plan import choose, metrics, stack

TOKENS = 16


def opened(seed: int = 0, std: float = 0.12, dtype=torch.float64, **config) -> TarFlow:
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "blocks": 3, "depth": 2, "num_heads": 2, "num_class_embeds": 11}
    flow = TarFlow(TarFlowConfig(**{**small, **config}))
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=std)
    return flow.to(dtype).eval().requires_grad_(False)


def noise(flow: TarFlow, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return starting_noise(3, n, flow.shape, flow.blocks[0].inp.weight.dtype), torch.arange(n) % 10


PLANS = [
    Plan(),
    Plan(4),
    Plan(3, None, "zero"),  # 16 is not divisible by 3
    Plan([1, 16, 2], [None, 1, 3], ["zero", "z", "z"]),
    Plan(1, 3),  # ended token by token
    Plan(16, 5),
]


@pytest.mark.parametrize("guidance", [0.0, 0.7])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_gives_the_sequential_inverse(plan, guidance):
    flow = opened()
    z, label = noise(flow)
    exact = flow.inverse(z, label, guidance, "linear")
    x, info = gs_jacobi(flow, z, label, plan, tolerance=1e-12, guidance=guidance, anneal="linear")
    assert (x - exact).abs().max() < 1e-11
    assert all(info.settled) and max(info.residuals) <= 1e-12
    assert info.calls == sum(info.sweeps) and info.sequential_calls == 3 * (TOKENS - 1)
    if not guidance:
        assert (flow(x, label)[0] - z).abs().max() < 1e-10


def test_one_token_a_module_is_the_sequential_inverse_bit_for_bit():
    flow = opened(dtype=torch.float32)
    z, label = noise(flow)
    x, info = gs_jacobi(flow, z, label, Plan(TOKENS, 1))
    assert torch.equal(x, flow.inverse(z, label))
    assert info.sweeps == (TOKENS - 1,) * 3 and info.work == 1.0 and info.residuals == (0.0,) * 3


@pytest.mark.parametrize("sweeps", [None, TOKENS])
def test_as_many_sweeps_as_tokens_are_exact_without_a_look(sweeps):
    """T - 1 are enough: so many are made, whatever is allowed."""
    flow = opened(std=0.18)
    z, label = noise(flow)
    x, info = gs_jacobi(flow, z, label, Plan(1, sweeps), tolerance=None)
    exact = flow.inverse(z, label)
    assert info.sweeps == (TOKENS - 1,) * 3 and info.residuals == (0.0,) * 3
    assert (x - exact).abs().max() < 1e-10 * exact.abs().max()


def test_after_k_sweeps_the_first_k_plus_one_tokens_are_exact():
    flow = opened(blocks=1)
    z, label = noise(flow)
    exact, off = flow.patches(flow.inverse(z, label)), []
    for k in range(1, TOKENS):
        x, info = gs_jacobi(flow, z, label, Plan(1, k), tolerance=None, unfinished="keep")
        change = (flow.patches(x) - exact).abs().amax((0, 2))
        assert change[: k + 1].max() < 1e-14 and info.sweeps == (k,)
        off.append(float(change.max()))
        # and no further: a token more would be exact only by chance
        assert k >= 12 or change[k + 1] > 1e-12
    assert off[0] > 0.1 and off[6] < 1e-2 * off[0] and off[-1] < 1e-14


@pytest.mark.parametrize("patch", [2, 4])
def test_channels_and_few_tokens(patch):
    flow = opened(std=0.08, in_channels=3, patch_size=patch)
    z, label = noise(flow)
    for plan in (Plan(), Plan(2), Plan((8 // patch) ** 2, 1)):
        x, _ = gs_jacobi(flow, z, label, plan, tolerance=1e-12)
        assert (x - flow.inverse(z, label)).abs().max() < 1e-11


def test_the_papers_norm_looks_at_the_batch():
    """||F(X) - X||_F / (B C) <= tolerance grows laxer with the batch: fewer sweeps, a larger error."""
    flow = opened()
    z, label = noise(flow, 64)
    exact = flow.inverse(z, label)
    paper, info = gs_jacobi(flow, z, label, tolerance=1e-6, stop="norm")
    ours, strict = gs_jacobi(flow, z, label, tolerance=1e-6)
    assert info.calls < strict.calls
    assert 1e-6 < max(info.residuals) and max(strict.residuals) <= 1e-6
    assert (ours - exact).abs().max() < (paper - exact).abs().max() < 1e-3


def test_looking_less_often_changes_the_count_and_not_the_answer():
    flow = opened()
    z, label = noise(flow)
    often, few = (gs_jacobi(flow, z, label, tolerance=1e-9, look=look) for look in (1, 4))
    assert (often[0] - few[0]).abs().max() < 1e-7
    assert often[1].calls <= few[1].calls < 3 * (TOKENS - 1)


# -- what must not pass in silence -------------------------------------------------------------------------------------


def wild() -> TarFlow:
    """A flow with large a, whose Jacobi sweeps overflow on the way."""
    flow = opened(std=0.1)
    for block in flow.blocks:
        block.out.weight[: block.out.weight.shape[0] // 2] *= 4
    return flow


def test_a_wild_flow_is_ended_token_by_token():
    flow = wild()
    z, label = noise(flow)
    exact = flow.inverse(z, label)
    x, info = gs_jacobi(flow, z, label, Plan(1, 4))
    # rounding is magnified by exp(a); the naive iterate is off by more than the image is large (below)
    assert (x - exact).abs().max() < 1e-8 * exact.abs().max()
    assert all(n > 4 for n in info.sweeps) and all(info.settled)


def test_a_wild_flow_left_unfinished_is_said():
    flow = wild()
    z, label = noise(flow)
    exact = flow.inverse(z, label)
    with pytest.warns(RuntimeWarning, match="blocks left unsettled, with the last sweep's change: 0"):
        x, info = gs_jacobi(flow, z, label, Plan(1, 4), unfinished="keep")
    assert (x - exact).abs().max() > 0.1 and max(info.residuals) > 0.1 and not all(info.settled)
    with pytest.raises(ArithmeticError, match="unsettled"):
        gs_jacobi(flow, z, label, Plan(1, 4), unfinished="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gs_jacobi(opened(), *noise(opened()), Plan(1, 15), unfinished="keep")


def test_an_answer_beyond_the_iterates_bound_is_not_cut_off():
    """A flow that multiplies by exp(4): iterates are brought back to 100, the answer is not."""
    flow = opened(std=0.02)
    for block in flow.blocks[:2]:
        block.out.bias[: block.out.bias.shape[0] // 2] += 2.0
    z, label = noise(flow)
    exact = flow.inverse(z, label)
    assert exact.abs().max() > 150
    for plan in (Plan(), Plan(4), Plan(1, 2)):
        x, info = gs_jacobi(flow, z, label, plan, tolerance=1e-9)
        assert (x - exact).abs().max() < 1e-9 * exact.abs().max() and all(info.settled)


def test_what_is_not_finite_is_an_error():
    flow = opened()
    flow.blocks[1].out.bias[0] = float("nan")
    z, label = noise(flow)
    for tolerance in (1e-6, None):
        with pytest.raises(FloatingPointError, match="not finite"):
            gs_jacobi(flow, z, label, tolerance=tolerance)
    with pytest.raises(FloatingPointError, match="not finite"):
        gs_jacobi(flow, z, label, Plan(1, 2), unfinished="keep")


def test_bad_input_is_named():
    flow = opened()
    z, label = noise(flow)
    for wrong, call in [
        (
            "plan.modules must be 1 .. 16, the number of tokens, got 0",
            lambda: gs_jacobi(flow, z, label, Plan(0)),
        ),
        ("plan.modules must be 1 .. 16, .* got 17", lambda: gs_jacobi(flow, z, label, Plan(17))),
        ("plan.modules must be 1 .. 16, .* got 2.0", lambda: gs_jacobi(flow, z, label, Plan(2.0))),
        (
            "plan.modules must be one for all or one for each of 3",
            lambda: gs_jacobi(flow, z, label, Plan([1, 2])),
        ),
        ("plan.sweeps must be 1 or more, or None, got 0", lambda: gs_jacobi(flow, z, label, Plan(1, 0))),
        ("plan.guess must be z or zero, got 'x'", lambda: gs_jacobi(flow, z, label, Plan(1, 1, "x"))),
        ("tolerance must be above 0, or None, got 0", lambda: gs_jacobi(flow, z, label, tolerance=0)),
        ("tolerance must be above 0, or None, got -1", lambda: gs_jacobi(flow, z, label, tolerance=-1)),
        ("tolerance must be above 0, or None, got nan", lambda: gs_jacobi(flow, z, tolerance=float("nan"))),
        ("look must be 1 or more, got 0", lambda: gs_jacobi(flow, z, label, look=0)),
        ("stop must be one of prefix, norm, got 'max'", lambda: gs_jacobi(flow, z, label, stop="max")),
        (
            "unfinished must be one of finish, keep, raise",
            lambda: gs_jacobi(flow, z, label, unfinished="warn"),
        ),
        (
            "z must be floats \\(B, 1, 8, 8\\), got .* \\(5, 1, 8\\)",
            lambda: gs_jacobi(flow, z[..., 0], label),
        ),
        ("z must hold at least one sample", lambda: gs_jacobi(flow, z[:0], label[:0])),
        ("label must be 5 integers", lambda: gs_jacobi(flow, z, label[:2])),
        ("tough must be of blocks 0 .. 2, got \\[3\\]", lambda: stack(flow, [3], 8, 32, 10)),
        ("plan.modules must be 1 .. 16", lambda: stack(flow, [2], 64, 32, 10)),
        ("kind must be one of derived, released, got 'x'", lambda: metrics(flow, z, label, "x")),
    ]:
        with pytest.raises(ValueError, match=wrong):
            call()


# -- metrics and the flow that ships -----------------------------------------------------------------------------------


def test_crm_names_the_block_that_takes_most_sweeps():
    flow = opened(std=0.05)
    flow.blocks[1].out.weight *= 12
    z, label = noise(flow, 32)
    x = flow.inverse(z, label)
    for kind in ("derived", "released"):
        found = metrics(flow, x, label, kind)
        assert found.shares[1] == max(found.shares) > 1.5 / 3 and sum(found.shares) == pytest.approx(1)
    info = gs_jacobi(flow, z, label, tolerance=1e-9)[1]
    assert info.sweeps[1] == max(info.sweeps) > info.sweeps[0]
    assert choose(flow, x, label, modules=4).modules == (1, 4, 1)


def test_igm_is_the_error_of_one_sweep_from_either_guess():
    flow = opened(blocks=1)
    z, label = noise(flow, 32)
    x = flow.inverse(z, label)
    found = metrics(flow, x, label)
    for guess, value in (("z", found.igm_z), ("zero", found.igm_zero)):
        swept, _ = gs_jacobi(flow, z, label, Plan(1, 1, guess), tolerance=None, unfinished="keep")
        off = flow.patches(swept - x).mean(0)
        assert value[0] == pytest.approx(float(torch.linalg.matrix_norm(off, 2)), rel=1e-9)


def test_the_guess_is_zero_where_a_block_shrinks():
    """x = exp(-3) z + ...: zero lies nearer to x than z does, and fewer sweeps are the proof."""
    flow = opened(blocks=1)
    flow.blocks[0].out.bias[: flow.blocks[0].out.bias.shape[0] // 2] -= 3.0
    z, label = noise(flow, 32)
    plan = choose(flow, flow.inverse(z, label), label)
    assert plan.guess == ("zero",)
    calls = [gs_jacobi(flow, z, label, Plan(guess=g), tolerance=1e-9)[1].calls for g in ("zero", "z")]
    assert calls[0] < calls[1] <= TOKENS - 1
    grown = opened(blocks=1)
    assert choose(grown, grown.inverse(z, label), label).guess == ("z",)


@pytest.mark.parametrize("n", [1, 16])
def test_the_digits_flow_in_less_than_half_the_calls(n):
    flow = load_flow()
    z, label = starting_noise(0, n, flow.shape), torch.arange(n) % 10
    exact = flow.inverse(z, label)
    x, info = gs_jacobi(flow, z, label)
    assert (x - exact).abs().max() < 1e-5
    assert info.calls <= info.sequential_calls / 2
    assert (flow(x, label)[0] - z).abs().max() < 1e-4
    if n == 1:
        flow = flow.double()
        z = z.double()
        x, info = gs_jacobi(flow, z, label, tolerance=1e-12)
        assert (x - flow.inverse(z, label)).abs().max() < 1e-11
