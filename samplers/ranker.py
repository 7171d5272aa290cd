"""A predictor of which of two schedules is the better one: a small network, trained on pairs (S^3, 2312.07243).

>>> rng = np.random.default_rng(0)
>>> x = rng.standard_normal((200, 3)); score = x[:, 0] + 0.5 * x[:, 1] ** 2
>>> predict = ranker(x, score)
>>> bool(np.corrcoef(predict(x), score)[0, 1] > 0.8)
True
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def ranker(x: np.ndarray, scores: np.ndarray, seed: int = 0, updates: int = 60, hidden: int = 32, rate: float = 0.02,
           newest: int = 600, warm: tuple[np.ndarray, np.ndarray] | None = None,
           ) -> Callable[[np.ndarray], np.ndarray]:  # fmt: skip
    """Train on rows ``x`` (n, features) with ``scores`` (n,), of which small is good and infinite the worst.

    f(x) = w . silu(x V + v), and the loss of a pair is softplus(f(better) - f(worse)). Only the ``newest`` rows count.
    ``warm``: rows and scores of another kind, whose order is of some help: half of the pairs are two of those.
    Returns f: small is good. In numpy and by hand, since autograd's overhead is ten times what so small a net costs.
    """
    sets = [(x[-newest:], scores[-newest:])]
    if warm is not None:
        sets.append((warm[0][-newest:], warm[1][-newest:]))
    rng = np.random.default_rng(seed)
    features = x.shape[1]
    weights = [
        rng.standard_normal((features, hidden)) * features**-0.5,
        np.zeros(hidden),
        rng.standard_normal(hidden) * hidden**-0.5,
    ]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    for update in range(1, updates + 1):
        pairs = [_pairs(*one, 128 // len(sets), rng) for one in sets]
        good, bad = (np.concatenate(side) for side in zip(*pairs, strict=True))
        if not len(good):
            continue
        slopes = _slopes(weights, np.concatenate([good, bad]))
        for weight, slope, (mean, square) in zip(weights, slopes, moments, strict=True):  # Adam
            mean += 0.1 * (slope - mean)
            square += 0.01 * (slope * slope - square)
            unbiased = np.sqrt(square / (1 - 0.99**update)) + 1e-8
            weight -= rate * mean / (1 - 0.9**update) / unbiased
    return lambda rows: _forward(weights, rows)[0]


def _forward(weights: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f (n,), and of the hidden layer what comes in (n, hidden) and the logistic function of that."""
    matrix, offset, out = weights
    into = x @ matrix + offset
    gate = 0.5 * (1 + np.tanh(0.5 * into))
    return (into * gate) @ out, into, gate


def _slopes(weights: list[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """The gradient of the mean loss; the first half of the rows x are the better ones of their pairs."""
    f, into, gate = _forward(weights, x)
    half = len(x) // 2
    pull = 0.5 * (1 + np.tanh(0.5 * (f[:half] - f[half:]))) / half
    pull = np.concatenate([pull, -pull])
    back = np.outer(pull, weights[2]) * gate * (1 + into * (1 - gate))
    return [x.T @ back, back.sum(axis=0), (into * gate).T @ pull]


def _pairs(
    x: np.ndarray, scores: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The better rows and the worse ones of ``count`` random pairs, less those that are equally good."""
    first, second = rng.integers(len(x), size=(2, count))
    swap = scores[first] > scores[second]
    good, bad = np.where(swap, second, first), np.where(swap, first, second)
    decided = scores[good] < scores[bad]
    return x[good[decided]], x[bad[decided]]
