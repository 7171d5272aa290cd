"""The autoregressive model: causal, cached like uncached, drawn alike in any batch; and what it is as a Denoiser."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels.gumbel_draw import gumbel_draw
from fewstep.models import paths
from fewstep.models.autoregressive import ARConfig, Autoregressive, conditional
from fewstep.models.codebook import codeword_mean
from fewstep.models.token_flow import TokenFlow


def tiny(seed: int = 0, **changes) -> Autoregressive:
    torch.manual_seed(seed)
    config = ARConfig(**{"shape": (1, 6, 4), "codes": 5, "width": 16, "depth": 2, "heads": 2, **changes})
    codes = torch.randn(config.codes, 4)
    net = Autoregressive(config, codes)
    torch.nn.init.normal_(net.head.weight, std=0.5)  # so that what stands before matters
    return net.eval()


def test_a_place_sees_what_is_before_it_and_nothing_else():
    net, tokens, label = tiny(), torch.randint(5, (1, 6)), torch.tensor([3])
    before = net(tokens, label)
    for changed in range(6):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 5
        differs = (net(other, label) - before).abs().amax(-1)[0] > 1e-6
        assert differs.tolist() == [place > changed for place in range(6)]
    assert not torch.allclose(net(tokens, torch.tensor([4])), before)
    assert torch.equal(net(tokens), net(tokens, torch.tensor([net.null_label])))


def test_a_sample_from_the_cache_is_that_of_whole_passes():
    net, label = tiny(), torch.tensor([1, 2, 3, 10])
    made = net.sample(label, seed=5, row=2)
    tokens = torch.zeros(4, 6, dtype=torch.int64)
    for place in range(6):
        logits = net(tokens, label)[:, place]
        tokens[:, place], _ = gumbel_draw(logits, torch.tensor([5]), torch.arange(4), 2 * 6 + place)
    assert torch.equal(made, net.book.join(net.book.vectors(tokens)))
    assert len(torch.unique(tokens)) > 2


def test_a_sample_is_the_same_in_any_batch_and_another_of_another_seed_or_row():
    net, label = tiny(), torch.arange(8) % 10
    whole = net.sample(label, seed=1)
    for part in torch.arange(8).split(3):
        assert torch.equal(net.sample(label[part], 1, part), whole[part])
    assert not torch.equal(net.sample(label, seed=2), whole)
    assert not torch.equal(net.sample(label, seed=1, row=1), whole)
    assert net.sample(ids=torch.arange(3)).shape == (3, 1, 6, 4)


def test_samples_have_the_law_of_the_logits():
    """Two places, the joint counted: total variation at the Monte-Carlo floor, and a shuffled joint is far from it."""
    net, n = tiny(shape=(2, 4), codes=5), 20_000
    with torch.no_grad():
        pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
        logs = net(pairs).log_softmax(-1)
        joint = (logs[:, 0].gather(1, pairs[:, :1]) + logs[:, 1].gather(1, pairs[:, 1:]))[:, 0].exp()
    assert abs(float(joint.sum()) - 1) < 1e-5
    tokens = net.book.tokens(net.sample(seed=3, ids=torch.arange(n)))
    found = torch.bincount(tokens[:, 0] * 5 + tokens[:, 1], minlength=25) / n
    distance = 0.5 * float((found - joint).abs().sum())
    # E|found - p| <= sqrt(p (1 - p) / n) a cell; changing one draw moves the distance by 1 / n, so by McDiarmid it
    # exceeds its mean by 3 / sqrt(2 n) in less than exp(-9) of all cases
    floor = 0.5 * float((joint * (1 - joint) / n).sqrt().sum())
    assert distance < floor + 3 / (2 * n) ** 0.5
    shuffled = joint.reshape(5, 5).roll(1, 1).flatten()
    assert 0.5 * float((found - shuffled).abs().sum()) > 5 * (floor + 3 / (2 * n) ** 0.5)


def test_as_a_denoiser_it_is_the_closed_form_of_its_logits():
    net = tiny()
    d = conditional(net, paths.vp_linear())
    label = torch.tensor([0, 9])
    prefix = net.sample(label, seed=0)
    x, t = torch.randn(2, 6, 4), 0.1 + 0.5 * torch.rand(2, 6)
    found = d(x, t, prefix=prefix, label=label)
    wanted = codeword_mean(x, net.logits(prefix, label), net.book.codes, d.path.alpha(t), d.path.sigma(t))
    assert torch.equal(found, wanted)
    pictures = net.book.join(x)
    alone = d(pictures[1:], 0.3, prefix=prefix[1:], label=label[1:])
    assert torch.allclose(d(pictures, 0.3, prefix=prefix, label=label)[1:], alone, atol=1e-6)
    with pytest.raises(ValueError, match="prefix must be given"):
        d(x, t)


def test_a_token_flow_takes_over_a_backbone_and_sees_its_own_place_noised_but_none_after_it():
    net = tiny()
    flow = TokenFlow(net.config).eval()
    flow.take_over(net)
    prefix = net.sample(torch.tensor([4]), seed=0)
    places = net.book.split(prefix)
    assert torch.equal(flow.body(places), net.body(places))
    x, t = torch.randn(1, 6, 4), torch.full((1, 6), 0.5)
    base = flow(x, t, prefix=prefix)
    moved, later = x.clone(), places.clone()
    moved[0, 2] += 1
    later[0, 2] += 1
    own = (flow(moved, t, prefix=prefix) - base).abs().amax(-1)[0] > 1e-6
    after = (flow(x, t, prefix=later) - base).abs().amax(-1)[0] > 1e-6
    assert own.tolist() == [place == 2 for place in range(6)]
    assert after.tolist() == [place > 2 for place in range(6)]
    noise = (flow(moved, torch.ones(1)) - flow(x, torch.ones(1))).abs().amax(-1)[0] > 1e-6
    assert noise.tolist() == [place >= 2 for place in range(6)]  # the student: noise in place of the prefix
    assert torch.allclose(flow(x, torch.full((1,), 0.5), prefix=prefix), base, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ARConfig(codes=1), "codes must be at least 2, got 1: of one codeword"),
        (lambda: ARConfig(width=10, heads=4), "divisible by heads"),
        (lambda: ARConfig(depth=0), "depth must be at least 1"),
        (lambda: ARConfig.from_dict({"widht": 3}), "unknown key widht"),
        (lambda: Autoregressive(ARConfig(codes=4), torch.zeros(5, 4)), "codes must be 4 codewords, got 5"),
        (lambda: tiny()(torch.full((1, 6), 5)), r"tokens must lie in 0 \.\. 4, got 5"),
        (
            lambda: tiny()(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(2).long()),
            "label must have shape",
        ),
        (lambda: tiny().logits(torch.zeros(1, 5, 4)), "x must be"),
        (lambda: tiny().sample(), "label or ids must be given"),
        (
            lambda: TokenFlow(tiny().config)(
                torch.zeros(2, 6, 4), torch.ones(2), prefix=torch.zeros(1, 6, 4)
            ),
            "prefix must be as many",
        ),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
