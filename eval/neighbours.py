"""Nearest neighbours, exact and in bounded memory, and the check for memorising that rests on them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import sample_pair, whole_number

SPARE = 4  # candidates beyond k that are measured directly; duplicates and close ties fit in here


class Neighbours(NamedTuple):
    """distance (N, k), rising along k, and the rows of the reference they belong to, index (N, k)."""

    distance: torch.Tensor
    index: torch.Tensor


class Memorisation(NamedTuple):
    """Median distance to the nearest training point, of samples and of held-out data, and
    `closer`, the share of samples nearer to the training set than the median held-out point."""

    samples: float
    held_out: float
    closer: float


def nearest(x, reference, k: int = 1, chunk: int = 1024) -> Neighbours:
    """The k nearest rows of `reference` (M, D) to each row of x (N, D), Euclidean, in float64.

    A matrix product proposes k + 4 candidates (|x|^2 - 2 x.y + |y|^2 is fast, but off by rounding, and
    1e-8 where two rows are equal); those are then measured directly. A row whose candidates the rounding
    bound cannot certify is searched directly, so the distances are those of brute force.

    >>> nearest(torch.tensor([[0.9]]), torch.tensor([[0.0], [1.0], [5.0]])).index
    tensor([[1]])
    """
    x, reference = sample_pair(x, reference, ("x", "reference"))
    k, chunk = whole_number(k, "k"), whole_number(chunk, "chunk")
    if k > len(reference):
        raise ValueError(f"k is {k} but reference has {len(reference)} rows; expected at most that many")
    origin = reference.mean(dim=0)
    return nearest_centred(x - origin, reference - origin, k, chunk)


def nearest_centred(x: torch.Tensor, reference: torch.Tensor, k: int, chunk: int) -> Neighbours:
    """`nearest` of float64 rows that lie about the origin; elsewhere the products' rounding would leave much to search.

    >>> nearest_centred(torch.tensor([[1.0]]), torch.tensor([[-1.0], [1.5]]), 1, 8).distance
    tensor([[0.5000]])
    """
    parts = [_nearest_of_chunk(part, reference, k, chunk) for part in x.split(chunk)]
    return Neighbours(torch.cat([p.distance for p in parts]), torch.cat([p.index for p in parts]))


def memorisation(samples, train, held_out, chunk: int = 1024) -> Memorisation:
    """How near samples lie to the training set, beside held-out data that cannot have been memorised.

    Each is (N, D), D shared. A model that generalises gives equal medians and closer = 1/2; one that
    repeats its training set gives a median of 0 and closer = 1; one that is merely bad lies further away.

    >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> copies = memorisation(samples=x[:100], train=x[:200], held_out=x[200:])
    >>> copies.samples, copies.held_out > 0, copies.closer
    (0.0, True, 1.0)
    """
    samples, train = sample_pair(samples, train, ("samples", "train"))
    held_out, _ = sample_pair(held_out, train, ("held_out", "train"))
    ours = nearest(samples, train, 1, chunk).distance[:, 0]
    theirs = nearest(held_out, train, 1, chunk).distance[:, 0].to(ours.device).quantile(0.5)
    closer = (ours < theirs).double().mean() + 0.5 * (ours == theirs).double().mean()
    return Memorisation(float(ours.quantile(0.5)), float(theirs), float(closer))


def _nearest_of_chunk(x: torch.Tensor, reference: torch.Tensor, k: int, chunk: int) -> Neighbours:
    wanted = min(k + SPARE, len(reference))
    square_x = x.square().sum(dim=1, keepdim=True)
    best = x.new_empty(len(x), 0)
    rows = torch.empty(len(x), 0, dtype=torch.long, device=x.device)
    largest = x.new_zeros(())
    for start in range(0, len(reference), chunk):
        part = reference[start : start + chunk]
        square = part.square().sum(dim=1)
        largest = torch.maximum(largest, square.max())
        far = square_x + square - 2 * x @ part.T
        here = torch.arange(start, start + len(part), device=x.device).expand(len(x), -1)
        far = torch.cat([best, far], dim=1)
        best, order = far.topk(min(wanted, far.shape[1]), largest=False)
        rows = torch.cat([rows, here], dim=1).gather(1, order)
    exact, order = (x[:, None] - reference[rows]).square().sum(dim=2).sort(dim=1)
    rows = rows.gather(1, order)[:, :k]
    if wanted < len(reference):
        # Every sum of D products is within D eps of its terms' sizes; 4 covers the three and their sum.
        error = 4 * (x.shape[1] + 4) * torch.finfo(x.dtype).eps * (square_x[:, 0] + largest)
        doubtful = (exact[:, k - 1] > best[:, -1] - error).nonzero()[:, 0]
        for few in doubtful.split(64):
            distance = torch.cdist(x[few], reference, compute_mode="donot_use_mm_for_euclid_dist")
            rows[few] = distance.topk(k, largest=False).indices
        exact = (x[:, None] - reference[rows]).square().sum(dim=2)
    return Neighbours(exact[:, :k].sqrt(), rows)
