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
import torch
from torch import nn
from torch.nn import functional


def ranker(x: np.ndarray, scores: np.ndarray, seed: int = 0, updates: int = 60, hidden: int = 32, rate: float = 0.02,
           newest: int = 600, warm: tuple[np.ndarray, np.ndarray] | None = None,
           ) -> Callable[[np.ndarray], np.ndarray]:  # fmt: skip
    """Train on rows ``x`` (n, features) with ``scores`` (n,), of which small is good and infinite the worst.

    The loss of a pair is softplus(f(better) - f(worse)). Only the ``newest`` rows count. ``warm``: rows and scores of
    another kind, whose order is of some help: half of the pairs are two of those. Returns f: small is good.
    """
    sets = [(x[-newest:], scores[-newest:])]
    if warm is not None:
        sets.append((warm[0][-newest:], warm[1][-newest:]))
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Linear(x.shape[1], hidden), nn.Linear(hidden, 1)
    for layer in layers:  # not from the global generator: the search must be the same again
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    net = nn.Sequential(
        layers[0], nn.SiLU(), layers[1]
    ).double()  # in double, so that threads do not change the order
    weights = list(net.parameters())
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for update in range(1, updates + 1):
        pairs = [_pairs(*one, 128 // len(sets), rng) for one in sets]
        good, bad = (torch.as_tensor(np.concatenate(side)) for side in zip(*pairs, strict=True))
        if not len(good):
            continue
        with torch.enable_grad():
            loss = functional.softplus(net(good) - net(bad)).mean()
            slopes = torch.autograd.grad(loss, weights)
        with torch.no_grad():  # Adam; importing torch.optim's takes longer than all the training
            for weight, slope, (mean, square) in zip(weights, slopes, moments, strict=True):
                mean.lerp_(slope, 0.1)
                square.lerp_(slope * slope, 0.01)
                unbiased = (square / (1 - 0.99**update)).sqrt() + 1e-8
                weight -= rate * mean / (1 - 0.9**update) / unbiased

    @torch.no_grad()
    def predict(rows: np.ndarray) -> np.ndarray:
        return net(torch.as_tensor(rows, dtype=torch.float64))[:, 0].numpy()

    return predict


def _pairs(
    x: np.ndarray, scores: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The better rows and the worse ones of ``count`` random pairs, less those that are equally good."""
    first, second = rng.integers(len(x), size=(2, count))
    swap = scores[first] > scores[second]
    good, bad = np.where(swap, second, first), np.where(swap, first, second)
    decided = scores[good] < scores[bad]
    return x[good[decided]], x[bad[decided]]
