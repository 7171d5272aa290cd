"""The first-hitting sampler against an exact joint: its law, its times, prompts, splits, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.models.masked import MaskedModel, from_joint
from fewstep.samplers import masked_cfg
from fewstep.samplers.first_hitting import first_hitting
from fewstep.samplers.masked_ancestral import masked_ancestral
from fewstep.samplers.unmasking import hits, request

SIZE, LENGTH, DRAWS = 3, 4, 100_000
JOINT = torch.rand((SIZE,) * LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
JOINT /= JOINT.sum()
MODEL = from_joint(JOINT)


def shares(tokens: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """How often each sequence came."""
    length = tokens.shape[1]
    place = (tokens * size ** torch.arange(length - 1, -1, -1)).sum(1)
    return torch.bincount(place, minlength=size**length) / len(tokens)


def distance(tokens: torch.Tensor, joint: torch.Tensor, size: int = SIZE) -> float:
    """Total variation between what came and a law."""
    return float(0.5 * (shares(tokens, size) - joint.flatten()).abs().sum())


def floor(joint: torch.Tensor, draws: int, risk: float = 1e-6) -> float:
    """What exact draws stay below, but for a risk: the mean is at most 1/2 sum sqrt(p (1 - p) / N) (Jensen), and each
    draw moves the distance by 1 / N at most (McDiarmid)."""
    p = joint.flatten()
    return float(0.5 * (p * (1 - p) / draws).sqrt().sum()) + math.sqrt(math.log(1 / risk) / (2 * draws))


def test_the_law_is_the_joint_in_as_many_calls_as_tokens():
    bound = floor(JOINT, DRAWS)
    assert bound < 0.02
    x, info = first_hitting(MODEL, DRAWS, seed=1)
    assert distance(x, JOINT) < bound
    assert info.calls == LENGTH and (info.needed == LENGTH).all()
    # the control: two at a call are not independent
    pairs, info = first_hitting(MODEL, DRAWS, seed=1, parallel=2)
    assert distance(pairs, JOINT) > 5 * bound and info.calls == 2


def test_log_probabilities_are_the_chain_rule_s():
    x, info = first_hitting(MODEL, 2000)
    wanted = JOINT[tuple(x.unbind(1))].log()
    torch.testing.assert_close(info.log_probs.sum(1).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_times_follow_the_paper_s_recursion(schedule):
    """u = ((1 - alpha(t')) / (1 - alpha(t)))^n is uniform and independent of what was before; positions are alike."""
    model = from_joint(torch.ones((2,) * 5), schedule)
    n = 20_000
    order, share, _ = hits(model, request(model, n, 3, None, None, 1.0, 1.0))
    before = torch.cat([torch.ones(n, 1), share[:, :-1]], 1)
    u = (share / before) ** torch.arange(5, 0, -1)
    for column in u.T:
        sorted_u, grid = column.sort().values, torch.arange(n) / n
        # Dvoretzky-Kiefer-Wolfowitz, at a risk of 1e-6
        assert max((sorted_u - grid).max(), (grid + 1 / n - sorted_u).max()) < math.sqrt(
            math.log(2e6) / (2 * n)
        )
    assert (torch.corrcoef(u.T) - torch.eye(5)).abs().max() < 5 / math.sqrt(n)
    wrong = (share / before) ** torch.arange(6, 1, -1)[:5]  # the control: n + 1 in the place of n
    assert (wrong.mean(0) - 0.5).abs().max() > 0.02
    first = torch.bincount(order[:, 0], minlength=5)
    assert ((first - n / 5) ** 2 / (n / 5)).sum() < 4 + 5 * math.sqrt(8)  # chi-square, 4 degrees of freedom
    _, info = first_hitting(model, n, seed=3)
    told = info.times.sort(1, descending=True).values
    torch.testing.assert_close(told, model.schedule.time(1 - share), rtol=0, atol=1e-12)
    if schedule == "linear":
        wanted = torch.arange(5, 0, -1) / 6
        assert (told.mean(0) - wanted).abs().max() < 5 * 0.5 / math.sqrt(n)


def test_the_schedule_does_not_matter_to_what_is_drawn():
    x, info = first_hitting(MODEL, 100)
    y, other = first_hitting(from_joint(JOINT, "cosine"), 100)
    assert torch.equal(x, y) and not torch.equal(info.times, other.times)


def test_prompts_are_kept_and_the_rest_is_drawn_given_them():
    mask = MODEL.mask
    rows = torch.tensor([[mask, 1, mask, 2], [0, mask, mask, mask], [2, 0, 1, 1]])
    x, info = first_hitting(MODEL, rows.repeat(30_000, 1), seed=2)
    assert info.calls == 3 and info.needed[:3].tolist() == [2, 3, 0]
    for k, prompt in enumerate(rows):
        mine, given = x[k::3], prompt != mask
        assert (mine[:, given] == prompt[given]).all()
        assert (info.times[k::3][:, given] == 1).all() and (info.log_probs[k::3][:, given] == 0).all()
        wanted = JOINT[tuple(int(v) if v < mask else slice(None) for v in prompt)]
        if wanted.ndim:
            wanted = wanted / wanted.sum()
            assert distance(mine[:, ~given], wanted) < floor(wanted, len(mine))


def test_nothing_hidden_or_nobody_there():
    whole = torch.zeros(5, LENGTH, dtype=torch.int64)
    for sampler in (first_hitting, lambda m, p: masked_ancestral(m, p, 3)):
        x, info = sampler(MODEL, whole)
        assert torch.equal(x, whole) and info.calls == 0 and x is not whole
        x, info = sampler(MODEL, 0)
        assert x.shape == (0, LENGTH) and info.calls == 0


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_the_batch_may_be_split(parallel, order):
    rows = torch.randint(SIZE + 1, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(8) * 2**28
    whole, info = first_hitting(MODEL, rows, seed=2**63 + 1, ids=ids, parallel=parallel, order=order)
    for k in range(8):
        one = first_hitting(
            MODEL, rows[k : k + 1], seed=2**63 + 1, ids=ids[k : k + 1], parallel=parallel, order=order
        )
        assert torch.equal(one[0], whole[k : k + 1]) and torch.equal(one[1].times, info.times[k : k + 1])
    assert not torch.equal(whole, first_hitting(MODEL, rows, seed=1, ids=ids)[0])


def test_all_at_a_call_are_drawn_from_their_marginals():
    x, info = first_hitting(MODEL, DRAWS, parallel=100)
    product = torch.ones(())
    for axis in range(LENGTH):
        product = product[..., None] * JOINT.sum([a for a in range(LENGTH) if a != axis])
    assert info.calls == 1 and distance(x, product) < floor(product, DRAWS)


def test_extrapolation_is_a_line_in_time_cut_at_zero():
    """A timed model whose probabilities are linear in time: order 2 draws as one token a call would."""

    def call(tokens, t):
        p = (0.1 + 0.8 * t)[:, None, None]
        return torch.cat([p, 1 - p], -1).expand(-1, 2 * LENGTH, -1).log()

    model = MaskedModel(call, 2, 2 * LENGTH, timed=True)
    exact, one = first_hitting(model, 4000)
    chances = lambda info: torch.where(exact == 0, info.log_probs.exp(), -info.log_probs.expm1())  # noqa: E731
    torch.testing.assert_close(chances(one), (0.1 + 0.8 * one.times).float(), rtol=1e-5, atol=1e-6)
    straight, two = first_hitting(model, 4000, parallel=4, order=2)
    bent, three = first_hitting(model, 4000, parallel=4, order=1)
    # the first call has nothing to extrapolate from
    last = torch.zeros_like(exact, dtype=torch.bool).scatter(1, one.times.argsort(1)[:, :LENGTH], True)
    torch.testing.assert_close(two.log_probs[last], one.log_probs[last], rtol=1e-3, atol=1e-4)
    assert torch.equal(straight[last], exact[last]) and not torch.equal(bent[last], exact[last])
    assert two.calls == three.calls == 2


def test_extrapolation_comes_nearer_to_the_joint():
    first, second = (
        distance(first_hitting(MODEL, DRAWS, parallel=2, order=order)[0], JOINT) for order in (1, 2)
    )
    assert second < first - floor(JOINT, DRAWS)


def test_a_timed_model_is_asked_at_the_time_of_the_token():
    asked = []

    def call(tokens, t):
        asked.append(t)
        return torch.zeros(*tokens.shape, 2)

    _, info = first_hitting(MaskedModel(call, 2, 3, timed=True), 10)
    torch.testing.assert_close(torch.stack(asked, 1), info.times.sort(1, descending=True).values)


def test_temperature_and_top_p():
    law = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    model = from_joint(law)
    cool, info = first_hitting(model, DRAWS, temperature=0.5)
    squared = law**2 / (law**2).sum()
    assert distance(cool, squared, 4) < floor(squared, DRAWS)
    torch.testing.assert_close(info.log_probs[:, 0].double(), squared.log()[cool[:, 0]], rtol=1e-5, atol=1e-5)
    top = torch.tensor([4 / 7, 3 / 7, 0, 0], dtype=torch.float64)
    assert distance(first_hitting(model, DRAWS, top_p=0.6)[0], top, 4) < floor(top, DRAWS)
    # tempered first: 0.533, 0.3, 0.133, 0.033
    both = torch.tensor([0.64, 0.36, 0, 0], dtype=torch.float64)
    x = first_hitting(model, DRAWS, temperature=0.5, top_p=0.8)[0]
    assert distance(x, both, 4) < floor(both, DRAWS)


def test_guidance_sharpens_by_the_condition():
    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.4, 0.25, 0.35]], dtype=torch.float64)

    def call(tokens, label):
        return table[label].log()[:, None].expand(-1, tokens.shape[1], -1)

    model = MaskedModel(call, 3, 1, null={"label": 2})
    label = torch.zeros(DRAWS, dtype=torch.int64)
    for scale in (0.0, 0.5, 1.0, 2.5):
        wanted = table[2] ** (1 - scale) * table[0] ** scale
        wanted = wanted / wanted.sum()
        x, _ = first_hitting(masked_cfg(model, scale), DRAWS, cond={"label": label})
        assert distance(x, wanted) < floor(wanted, DRAWS), scale
    assert masked_cfg(model, 1.0) is model
    with pytest.raises(ValueError, match="no null of its own"):
        masked_cfg(MODEL, 2.0)
    with pytest.raises(ValueError, match="scale must be finite"):
        masked_cfg(model, math.nan)


class Looks(TorchDispatchMode):
    """Counts the reads from the device."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", [first_hitting, lambda m, n: masked_ancestral(m, n, 50)])
def test_no_step_looks_at_the_device(sampler):
    seen = []
    for length in (2, 9):
        with Looks() as looks:
            _, info = sampler(from_joint(torch.ones((2,) * length)), 64)
        assert info.calls == length
        seen.append(looks.seen)
    assert seen[0] == seen[1]
    with Looks() as looks:  # the control
        masked_ancestral(from_joint(torch.ones(2, 2)), 64, 50, draws="float32")
    assert looks.seen > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": -1}, "or how many samples, got -1"),
        ({"prompt": torch.zeros(2, 3, dtype=torch.int64)}, "prompt must be int64 of shape (B, 4)"),
        ({"prompt": torch.full((2, 4), 4)}, "prompt must lie in 0 .. 2, or be 3, the mask"),
        ({"parallel": 0}, "parallel must be an int of 1 or more"),
        ({"parallel": True}, "parallel must be an int of 1 or more"),
        ({"order": 3}, "order must be 1 or 2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1]"),
        ({"ids": torch.arange(3)}, "ids must be integers, a tensor of shape (2,)"),
        ({"seed": -1}, "seed must be an int"),
        ({"cond": {"label": torch.zeros(3)}}, "cond['label'] must have a row for each of 2 samples"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        first_hitting(**{"model": MODEL, "prompt": 2, **options})


def test_models_that_are_none_or_broken():
    with pytest.raises(TypeError, match="model must be a MaskedModel"):
        first_hitting(torch.nn.Identity(), 2)  # type: ignore[arg-type]
    impossible = from_joint(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="at call 0 of 1: its output is not finite, or the prompt has"):
        first_hitting(impossible, torch.tensor([[1, 2]]))
    for value in (math.nan, -math.inf):
        broken = MaskedModel(lambda tokens, v=value: torch.full((*tokens.shape, 2), v), 2, 3)
        with pytest.raises(ValueError, match="logits are NaN or leave no token at call 0 of 3"):
            first_hitting(broken, 2)
        for draws in ("float32", "exact"):
            with pytest.raises(ValueError, match="logits are NaN or leave no token"):
                masked_ancestral(broken, 2, 4, draws=draws)
