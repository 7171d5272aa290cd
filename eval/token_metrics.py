"""Sequences of tokens: how varied they are, and how far their law is from a known one.

>>> tokens = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])
>>> sequence_entropy(tokens, 3).round(decimals=4).tolist(), round(unigram_entropy(tokens, 3), 4)
([0.6931, 0.0], 1.0397)
>>> total_variation(tokens[:, :1], torch.tensor([0.5, 0.25, 0.25]))
0.25
"""

from __future__ import annotations

import math

import torch


def counts(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """How often each token occurs in each sequence: (B, L) -> (B, V)."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64 (B, L), got {tokens.dtype} of shape {tuple(tokens.shape)}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(
            f"tokens must lie in 0 .. {vocabulary - 1}, got {int(tokens.min())} .. {int(tokens.max())}"
        )
    found = torch.zeros(len(tokens), vocabulary, dtype=torch.float64)
    return found.scatter_add(1, tokens, torch.ones(tokens.shape, dtype=torch.float64))


def sequence_entropy(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The entropy in nats of the frequencies within each sequence, (B,): what stands beside generative perplexity as
    the measure of diversity in 2409.02908."""
    p = counts(tokens, vocabulary) / tokens.shape[1]
    return torch.xlogy(p, 1 / p.clamp_min(1e-300)).sum(1)


def unigram_entropy(tokens: torch.Tensor, vocabulary: int) -> float:
    """The entropy in nats of the frequencies over all sequences."""
    p = counts(tokens, vocabulary).sum(0) / tokens.numel()
    return float(-torch.xlogy(p, p).sum())


def total_variation(tokens: torch.Tensor, joint: torch.Tensor) -> float:
    """Half the L1 distance between how often sequences came and their joint law (V, .., V), an axis a token."""
    size, length = joint.shape[0], joint.ndim
    place = (tokens * size ** torch.arange(length - 1, -1, -1)).sum(1)
    return float(
        0.5 * (torch.bincount(place, minlength=size**length) / len(tokens) - joint.flatten()).abs().sum()
    )


def expected_total_variation(joint: torch.Tensor, draws: int) -> float:
    """About what so many exact draws have on average: each count is nearly normal, E|N(0, v)| = sqrt(2 v / pi)."""
    p = joint.flatten()
    return float(0.5 * (2 / math.pi * p * (1 - p) / draws).sqrt().sum())
