"""A codebook: what an autoregressive model's tokens stand for, and what noise leaves to be known of them.

A sample is cut into n places of d numbers (``split``), and each place is one of V codewords c_1 .. c_V of R^d. Where
a model gives the next token the probabilities p_j, the place is a mixture of deltas, and on a Gaussian path
x_t = alpha x0 + sigma eps everything about it is in closed form (2510.21003):

    p(x_t) = sum_j p_j N(x_t; alpha c_j, sigma^2 I)
    E[x0 | x_t] = sum_j softmax_j(log p_j - |x_t - alpha c_j|^2 / (2 sigma^2)) c_j

>>> codes = torch.tensor([[-1.0], [1.0]])
>>> x = torch.tensor([0.3])
>>> torch.allclose(codeword_mean(x, torch.zeros(2), codes, 1.0, 1.0), x.tanh())
True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from .paths import Times, coefficient

LEAST_SIGMA = 1e-4  # of the closed form: below it the mean is the nearest codeword's to the last bit anyway


def codeword_mean(
    x: torch.Tensor, logits: torch.Tensor, codes: torch.Tensor, alpha: Times, sigma: Times
) -> torch.Tensor:
    """E[x0 | x_t = x], x's shape (..., d), for logits (..., V) of codes (V, d); alpha, sigma numbers or (...).

    Logits need not be normalised, and -inf is a codeword that cannot be. It takes O(V d) a place, two products and one
    softmax, in float32 or more whatever comes in; a sigma below ``LEAST_SIGMA`` counts as that. The kernel of mixtures
    is of no use here: it has one set of weights for all queries, and each place has its own.
    """
    shares = codeword_shares(x, logits, codes, alpha, sigma)
    return (shares @ codes.to(shares.dtype)).to(x.dtype)


def codeword_shares(
    x: torch.Tensor, logits: torch.Tensor, codes: torch.Tensor, alpha: Times, sigma: Times
) -> torch.Tensor:
    """p(token | x_t = x), (..., V): the softmax of ``codeword_mean``."""
    return _joint(x, logits, codes, alpha, sigma)[0].softmax(-1)


def codeword_log_density(
    x: torch.Tensor, logits: torch.Tensor, codes: torch.Tensor, alpha: Times, sigma: Times
) -> torch.Tensor:
    """log p(x_t = x), (...), logits normalised; its gradient is the score (alpha E[x0 | x_t] - x_t) / sigma^2."""
    joint, x, sigma = _joint(x, logits, codes, alpha, sigma)
    common = 0.5 * x.square().sum(-1) / sigma**2 + x.shape[-1] * (torch.log(sigma) + 0.9189385332046727)
    return joint.logsumexp(-1) - logits.to(joint.dtype).logsumexp(-1) - common


def _joint(x, logits, codes, alpha, sigma) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits of the tokens given x up to what they have in common, x, sigma), in the dtype that is computed in."""
    if codes.ndim != 2 or 0 in codes.shape:
        raise ValueError(f"codes must have shape (V, d), got {tuple(codes.shape)}")
    if x.shape[-1:] != codes.shape[1:] or logits.shape != (*x.shape[:-1], len(codes)):
        raise ValueError(
            f"x must have shape (..., {codes.shape[1]}) and logits (..., {len(codes)}) for codes "
            f"{tuple(codes.shape)}, got {tuple(x.shape)} and {tuple(logits.shape)}"
        )
    sigma = check_sigma(sigma)
    dtype = torch.promote_types(torch.promote_types(x.dtype, logits.dtype), torch.float32)
    x, codes = x.to(dtype), codes.to(dtype)
    one = x.new_ones(())
    alpha, sigma = (coefficient(value, x) * one for value in (alpha, sigma))
    sigma = sigma.clamp_min(LEAST_SIGMA)
    ratio = alpha / sigma**2
    nearness = ratio * (x @ codes.mT) - 0.5 * alpha * ratio * codes.square().sum(-1)
    return logits.to(dtype) + nearness, x, sigma.squeeze(-1) if sigma.ndim else sigma


def check_sigma(sigma: Times) -> Times:
    """``sigma`` if it is positive; a tensor on a GPU is taken at its word, since looking at it means waiting for it."""
    tensor = isinstance(sigma, torch.Tensor)
    if tensor and sigma.device.type != "cpu":
        return sigma
    if not bool((sigma > 0).all() if tensor else sigma > 0):
        got = f"as little as {float(sigma.min()):.3g}" if tensor else repr(sigma)
        raise ValueError(f"sigma must be positive: without noise there is no density; got {got}")
    return sigma


class Codebook(nn.Module):
    """V codewords, and how samples of ``shape`` are cut into the places that they stand for.

    ``shape`` is (C, H, W) with square patches of ``patch`` pixels, row by row, so d = C patch^2; or (n, d), which is
    cut already (``patch`` is then no matter).
    """

    def __init__(self, codes: torch.Tensor | int, shape: Sequence[int], patch: int = 2):
        super().__init__()
        shape = tuple(shape)
        if len(shape) == 3:
            channels, height, width = shape
            if patch < 1 or height % patch or width % patch:
                raise ValueError(f"patch must divide the sides of shape {shape}, got {patch}")
            self.places, self.dim = (height // patch) * (width // patch), channels * patch * patch
        elif len(shape) == 2:
            self.places, self.dim = shape
        else:
            raise ValueError(f"shape must be (C, H, W) or (n, d), got {shape}")
        self.shape, self.patch = shape, patch
        if isinstance(codes, int):
            codes = torch.zeros(codes, self.dim)
        if codes.ndim != 2 or codes.shape[1] != self.dim or len(codes) == 0:
            raise ValueError(f"codes must have shape (V, {self.dim}), got {tuple(codes.shape)}")
        self.register_buffer("codes", codes.detach().clone())

    def __len__(self) -> int:
        """V."""
        return len(self.codes)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *shape) -> (B, n, d); what is cut already stays as it is."""
        if x.shape[1:] == (self.places, self.dim):
            return x
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"x must be (B, {', '.join(map(str, self.shape))}) or (B, {self.places}, {self.dim}), "
                f"got {tuple(x.shape)}"
            )
        return functional.unfold(x, self.patch, stride=self.patch).mT

    def join(self, places: torch.Tensor) -> torch.Tensor:
        """(B, n, d) -> (B, *shape)."""
        if places.shape[1:] != (self.places, self.dim):
            raise ValueError(f"places must be (B, {self.places}, {self.dim}), got {tuple(places.shape)}")
        if len(self.shape) == 2:
            return places
        return functional.fold(places.mT, self.shape[1:], self.patch, stride=self.patch)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest codewords' numbers, (B, n), of samples or places."""
        x = self.split(x)
        far = self.codes.square().sum(-1) - 2 * (x @ self.codes.to(x.dtype).mT)
        return far.argmin(-1)

    def vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """Codewords (B, n, d) of tokens (B, n)."""
        if tokens.ndim != 2 or tokens.shape[1] > self.places or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 (B, n) with n <= {self.places}, got {tuple(tokens.shape)} of {tokens.dtype}"
            )
        if tokens.device.type == "cpu" and tokens.numel():
            least, most = int(tokens.min()), int(tokens.max())
            if least < 0 or most >= len(self):
                raise ValueError(
                    f"tokens must lie in 0 .. {len(self) - 1}, got {least if least < 0 else most}"
                )
        return self.codes[tokens]

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Samples, or places, with every place at its nearest codeword; no gradient passes.

        >>> book = Codebook(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), (3, 2))
        >>> book.rounded(torch.tensor([[[0.1, 0.2], [0.9, 0.7], [2.0, 2.0]]])).tolist()
        [[[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]]
        """
        near = self.vectors(self.tokens(x))
        return near if x.shape[1:] == near.shape[1:] else self.join(near)


def kmeans(points: torch.Tensor, size: int, seed: int = 0, rounds: int = 30) -> torch.Tensor:
    """(size, d) centres of points (N, d): k-means++ and Lloyd's rounds, over the distinct points with their counts.

    >>> kmeans(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), 2).sort(dim=0).values
    tensor([[0.0500],
            [5.0500]])
    """
    distinct, counts = torch.unique(points, dim=0, return_counts=True)
    if not 1 <= size <= len(distinct):
        raise ValueError(
            f"size must lie in 1 .. {len(distinct)}, the distinct points that there are, got {size}"
        )
    random = torch.Generator().manual_seed(seed)
    centres = distinct[torch.randint(len(distinct), (1,), generator=random)]
    nearest = (distinct - centres).square().sum(1)
    while len(centres) < size:
        pick = torch.multinomial((nearest * counts).double(), 1, generator=random)
        centres = torch.cat([centres, distinct[pick]])
        nearest = torch.minimum(nearest, (distinct - distinct[pick]).square().sum(1))
    weight = counts.to(points.dtype)
    for _ in range(rounds):
        mine = torch.cdist(distinct, centres).argmin(1)
        total = torch.zeros_like(centres).index_add_(0, mine, distinct * weight[:, None])
        count = torch.zeros(size, dtype=points.dtype).index_add_(0, mine, weight)
        centres = torch.where(count[:, None] > 0, total / count[:, None].clamp_min(1), centres)
    return centres
