"""Entropies and distances of token sequences on cases with closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.eval.token_metrics import (
    expected_total_variation,
    sequence_entropy,
    total_variation,
    unigram_entropy,
)


def test_entropies():
    """Sequences that each repeat one token have none of their own; together they are as varied as can be."""
    tokens = torch.arange(5)[:, None].expand(-1, 7)
    assert sequence_entropy(tokens, 9).tolist() == [0.0] * 5
    assert unigram_entropy(tokens, 9) == pytest.approx(math.log(5))
    rows = torch.stack([torch.randperm(8) for _ in range(3)])
    assert sequence_entropy(rows, 8).tolist() == pytest.approx([math.log(8)] * 3)


def test_total_variation_and_what_exact_draws_have_of_it():
    joint = torch.rand((2, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint /= joint.sum()
    runs, n = 400, 500
    rows = torch.multinomial(
        joint.flatten(), runs * n, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    tokens = torch.stack(torch.unravel_index(rows, joint.shape), 1)
    found = torch.tensor([total_variation(part, joint) for part in tokens.split(n)])
    assert abs(float(found.mean()) - expected_total_variation(joint, n)) < 5 * float(found.std()) / runs**0.5
    assert total_variation(torch.zeros(4, 3, dtype=torch.int64), joint) == pytest.approx(
        1 - float(joint[0, 0, 0])
    )


def test_what_is_refused():
    with pytest.raises(ValueError, match="tokens must lie in 0 .. 2, got 0 .. 3"):
        sequence_entropy(torch.arange(4)[None], 3)
    with pytest.raises(ValueError, match=r"tokens must be int64 \(B, L\)"):
        unigram_entropy(torch.zeros(2, 2), 3)
