"""Conditional systematic resampling of groups of particles, without a look from the host.

From log-weights (G, K), a uniform u and a limit on the effective sample size: each group's ESS = (sum w)^2 / sum w^2,
the log of its mean weight, and which particles live on. Where the ESS lies below the limit that is systematic
resampling, particle k as often as points (u + j) / K fall into its part of the cumulative weights; elsewhere everybody
stays. What is then moved (states, histories, ids) is ``index_select`` by the index: copies, which torch does well.

The reference is torch without a synchronisation, in float64. The kernel does a group in one program where torch takes a
dozen launches. Its weights are whole multiples of 2^-36 of the largest, so their sums are exact in any order, and the
points' ranks come from whole numbers alone. Log-weights in float64 go in as the sum of two float32.

    >>> import torch
    >>> L = torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.3, 0.2, 0.2, 0.3]]).log()
    >>> found = resample(L, torch.full((2, 1), 0.5), torch.tensor([2.0]))
    >>> found.index.tolist(), found.resampled.tolist(), [round(v, 2) for v in found.ess.tolist()]
    ([[1, 2, 2, 2], [0, 1, 2, 3]], [True, False], [1.85, 3.85])
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .cases import Case, randn
from .dispatch import choose, direct, runs_on
from .lang import jit, next_power_of_2, tl

LARGEST = 4096  # particles a group, for the kernel


class Resampled(NamedTuple):
    """``index`` (G, K) int64, ``ess`` and ``log_mean`` (G,) float64, ``resampled`` (G,) bools."""

    index: torch.Tensor
    ess: torch.Tensor
    log_mean: torch.Tensor
    resampled: torch.Tensor


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(log_weights: torch.Tensor, u: torch.Tensor, limit: torch.Tensor) -> list[torch.Tensor]:
    """In float64."""
    count = log_weights.shape[1]
    logs = log_weights.double()
    size = logs.logsumexp(-1)
    ess = (2 * size - (2 * logs).logsumexp(-1)).exp()
    now = ess < limit
    places = torch.arange(count, device=logs.device)
    upto = logs.softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(upto / upto[:, -1:], (u.double() + places) / count, right=True)
    index = torch.where(now[:, None], chosen.clamp_max(count - 1), places)
    return [index, ess, size - math.log(count), now]


# --- the kernel ------------------------------------------------------------------------------------------------------


@jit
def resample_kernel(
    high, low, us, limits, index, ess, log_mean, resampled, count,
    LIMIT_EACH: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < count
    at = group * count + k
    logs = tl.load(high + at, mask=inside, other=float("-inf"))
    top = tl.max(logs, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    apart = logs - anchor
    if PAIRS:
        apart += tl.load(low + at, mask=inside, other=0.0)
    w = tl.exp(apart)
    total = tl.sum(w, 0)
    size = total * total / tl.sum(w * w, 0)
    now = size < tl.load(limits + group * LIMIT_EACH)
    tl.store(ess + group, size)
    tl.store(log_mean + group * 2, anchor)
    tl.store(log_mean + group * 2 + 1, tl.log(total / count))
    tl.store(resampled + group, now)
    # weights as whole numbers of 2^-36 (a second float32 may bring one a little above 1)
    fixed = (tl.minimum(w, 1.5) * 68719476736.0).to(tl.int64)
    upto = tl.cumsum(fixed, 0)
    whole = tl.maximum(tl.max(upto, 0), 1)
    u = tl.load(us + group)  # a 32-bit word
    shift = ((u * (whole >> 24)) >> 8) + (
        (u * (whole & 16777215)) >> 32
    )  # u / 2^32 * whole, without overflow
    # how many points (u + j) / K lie below the end of each particle's part
    ends = tl.minimum((upto * count - shift + whole - 1) // whole, count).to(tl.int32)
    # point j is for the first particle whose end lies above it, found by bisection
    first = tl.zeros((BLOCK,), tl.int32)
    width = BLOCK // 2
    for _ in tl.static_range(STEPS):
        middle = tl.gather(ends, first + width - 1, 0)
        first = tl.where(middle <= k, first + width, first)
        width = width // 2
    chosen = tl.where(now, tl.minimum(first, count - 1), k)
    tl.store(index + at, chosen.to(tl.int64), mask=inside)


def launch(log_weights: torch.Tensor, u: torch.Tensor, limit: torch.Tensor) -> list[torch.Tensor]:
    """``reference`` by the kernel."""
    groups, count = log_weights.shape
    high, low = log_weights.float().contiguous(), None
    if log_weights.dtype == torch.float64:
        low = torch.where(high.isfinite(), log_weights - high, 0.0).float().contiguous()
    index, word = log_weights.new_empty(groups, count, dtype=torch.int64), _word(u)
    ess, parts = high.new_empty(groups), high.new_empty(groups, 2)
    resampled = high.new_empty(groups, dtype=torch.bool)
    if groups:
        block = next_power_of_2(count)
        resample_kernel[(groups,)](
            high, low, word, limit.float().contiguous(), index, ess, parts, resampled, count,
            LIMIT_EACH=int(limit.numel() > 1), PAIRS=low is not None, STEPS=block.bit_length() - 1, BLOCK=block,
            num_warps=max(1, min(8, block // 128)),
        )  # fmt: skip
    return [index, ess.double(), parts.double().sum(-1), resampled]


def _word(u: torch.Tensor) -> torch.Tensor:
    """A uniform's leading 32 bits."""
    return (u.double() * 2.0**32).long().clamp(0, 2**32 - 1).contiguous()


# --- the op ----------------------------------------------------------------------------------------------------------


# written out: torch 2.6 reads no list[Tensor] off an annotation
@torch.library.custom_op(
    "fewstep::resample", mutates_args=(), schema="(Tensor log_weights, Tensor u, Tensor limit) -> Tensor[]"
)
def op(log_weights: torch.Tensor, u: torch.Tensor, limit: torch.Tensor) -> list[torch.Tensor]:
    fits = log_weights.shape[1] <= LARGEST
    return (launch if runs_on(log_weights) and fits else reference)(log_weights, u, limit)


@op.register_fake
def _(log_weights, u, limit):
    groups = len(log_weights)
    each = [log_weights.new_empty(groups, dtype=d) for d in (torch.float64, torch.float64, torch.bool)]
    return [torch.empty_like(log_weights, dtype=torch.int64, memory_format=torch.contiguous_format), *each]


def resample(
    log_weights: torch.Tensor, u: torch.Tensor, limit: torch.Tensor, impl: str | None = None
) -> Resampled:
    """Which particles of each group live on.

    Args:
        log_weights: (G, K), float32 or float64.
        u: (G, 1) uniforms in [0, 1), of which the kernel takes 32 bits.
        limit: (1,) or (G,): groups whose ESS lies below it are resampled. 0: none; K: all but even ones.
    """
    if log_weights.ndim != 2 or log_weights.shape[1] == 0:
        raise ValueError(f"log_weights must have shape (groups, particles), got {tuple(log_weights.shape)}")
    if u.shape != (len(log_weights), 1):
        raise ValueError(f"u must have shape ({len(log_weights)}, 1), got {tuple(u.shape)}")
    if limit.shape not in ((1,), (len(log_weights),)):
        raise ValueError(f"limit must have shape (1,) or ({len(log_weights)},), got {tuple(limit.shape)}")
    arguments = (log_weights.detach(), u, limit)
    if choose("resample", impl, [log_weights], unsupported(log_weights)) == "triton":
        return Resampled(*(launch if direct(log_weights) else op)(*arguments))
    return Resampled(*reference(*arguments))


def unsupported(log_weights: torch.Tensor) -> str | None:
    """Why the kernel does not take these; None if it does."""
    if log_weights.shape[1] > LARGEST:
        return f"a group must have at most {LARGEST} particles, got {log_weights.shape[1]}"
    if log_weights.dtype not in (torch.float32, torch.float64):
        return f"log_weights must be float32 or float64, got {log_weights.dtype}"
    return None


# --- cases -----------------------------------------------------------------------------------------------------------


def _case(groups: int, count: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Any:
    def make(device: torch.device | str) -> dict[str, Any]:
        scale = spread * (torch.arange(groups, device=device) % 3) / 2
        return {
            "log_weights": (scale[:, None] * randn(groups, count, device=device) - 1000.0).to(dtype),
            "u": ((torch.arange(groups, device=device) * 0.618 + 0.3) % 1)[:, None],
            "limit": torch.full((1,), count / 2, device=device),
        }

    return make


CASES = [
    Case("one", _case(1, 1)),
    Case("ragged", _case(7, 101, spread=3.0)),
    Case("float32", _case(4, 64, torch.float32, 2.0), tolerance=1e-5),
    Case("empty", _case(0, 8)),
    Case("16 particles, 8 prompts", _case(8, 16, spread=3.0), real=True),
    Case("512 particles", _case(1, 512, spread=3.0), real=True),
    Case("4096 particles, 4 groups", _case(4, 4096, spread=3.0), real=True),
]
