"""A draw from softmax(logits) over a vocabulary in one read, with the log-probability of what was drawn.

Exponentials race: with E_k ~ Exp(1) independent, argmin_k E_k exp(-l_k) is k with probability softmax(l)_k, which is
the Gumbel-max trick without its double logarithm. Rare tokens win by tiny E_k, so E = -log(1 - v) needs v with its full
relative precision near 0. A 24-bit uniform has nothing below 6e-8, which is why masked diffusion draws in float64
(2409.02908). Here v has 32 random bits, or 64 where the leading 16 of them are 0, and the arithmetic is float32: rare
tokens come as often as they should, without float64 and without a tensor of noise. The maximum and the normaliser are
kept on the way, so log softmax(l)_k of the pick costs no second read.

Randomness is counted by (seed, id of the row, element): the same in any batch split. Rows that are not masked are not
read.

    >>> import torch
    >>> token, log_prob = gumbel_draw(torch.tensor([[0.0, 5.0, -torch.inf]]), torch.tensor([3]), torch.tensor([0]))
    >>> token.item(), round(log_prob.exp().item(), 4)
    (1, 0.9933)
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import philox
from .cases import Case, randn
from .dispatch import choose, direct, runs_on
from .lang import jit, next_power_of_2, tl
from .philox import philox_words

STREAM = 8  # of the noise; the words behind the point of rare draws come from the one after it
BLOCK = 2048  # elements that a program looks at together
RARE = 2**16  # leading words below this get another one
LARGEST = 1 - 2.0**-24  # of v: E stays finite


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    logits: torch.Tensor,
    seed: torch.Tensor,
    ids: torch.Tensor,
    row: torch.Tensor,
    stream: int = STREAM,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64."""
    values = logits.double()
    if scale is not None:
        values = values * scale.double().reshape(-1, 1)
    count = logits.shape[1]
    first, behind = (
        torch.stack(philox.words(seed, ids, -(-count // 4), row, s), dim=-1).flatten(1)[:, :count].double()
        for s in (stream, stream + 1)
    )
    v = torch.where(first < RARE, first + (behind + 0.5) * 2.0**-32, first + 0.5) * 2.0**-32
    race = values - (-torch.log1p(-v.clamp(max=LARGEST))).log()
    best, token = race.max(-1) if count else (values.sum(-1), ids)
    log_prob = values.gather(1, token[:, None])[:, 0] - values.logsumexp(-1)
    none = best == -math.inf  # no token has any weight
    token, log_prob = token.where(~none, -1), log_prob.where(~none, math.nan)
    if mask is not None:
        token, log_prob = token.where(mask, -1), log_prob.where(mask, 0.0)
    return token, log_prob.to(torch.promote_types(logits.dtype, torch.float32))


# --- the kernel ------------------------------------------------------------------------------------------------------


@jit
def _interleaved(w0, w1, w2, w3, BLOCK: tl.constexpr):
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))


@jit
def _words(element, row, stream, seed, id, BLOCK: tl.constexpr):
    zero = element * 0
    c1, c2, c3 = zero + row.to(tl.uint32), zero + stream, zero + (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(element, c1, c2, c3, zero + seed.to(tl.uint32), zero + id.to(tl.uint32))
    return _interleaved(w0, w1, w2, w3, BLOCK)


@jit
def exponential(v):
    """-log(1 - v): a series below 1/8, where the logarithm has no relative precision."""
    near = v * (0.2 + v * (0.16666667 + v * (0.14285715 + v * (0.125 + v * 0.11111111))))
    near = v + v * (v * (0.5 + v * (0.33333334 + v * (0.25 + near))))
    return tl.where(v < 0.125, near, -tl.log(1.0 - v))


@jit
def draw_kernel(
    logits, seeds, ids, rows, scales, mask, tokens, log_probs, count, stride,
    SEED_EACH: tl.constexpr, ROW_EACH: tl.constexpr, SCALE_EACH: tl.constexpr,
    STREAM: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    wanted = True
    if MASKED:
        wanted = tl.load(mask + line) != 0
    if wanted:
        seed, id, row = (
            tl.load(seeds + line * SEED_EACH),
            tl.load(ids + line),
            tl.load(rows + line * ROW_EACH),
        )
        scale = 1.0
        if SCALED:
            scale = tl.load(scales + line * SCALE_EACH)
        begin = logits + line * stride
        highest = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        best = tl.full((), float("inf"), tl.float32)  # least E exp(highest - l) so far
        picked = tl.zeros((), tl.float32)
        token = tl.full((), -1, tl.int32)
        start = 0
        while start < count:
            i = start + tl.arange(0, BLOCK)
            value = tl.load(begin + i, mask=i < count, other=float("-inf")).to(tl.float32)
            if SCALED:
                value = value * scale
            now = tl.maximum(highest, tl.max(value, 0))
            anchor = tl.where(now == float("-inf"), 0.0, now)
            weight = tl.exp(value - anchor)
            shrink = tl.exp(highest - anchor)
            total = total * shrink + tl.sum(weight, 0)
            draw = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
            word = _words(draw, row, STREAM, seed, id, BLOCK)
            v = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
            rare = word < 65536
            if tl.max(rare.to(tl.int32), 0) > 0:
                behind = _words(draw, row, STREAM + 1, seed, id, BLOCK).to(tl.float32) + 0.5
                finer = (word.to(tl.float32) + behind * 2.3283064365386963e-10) * 2.3283064365386963e-10
                v = tl.where(rare, finer, v)
            race = exponential(tl.minimum(v, 0.99999994)) / weight
            least, where = tl.min(race, 0, return_indices=True)
            # the best so far, by the new maximum
            best = tl.where(token < 0, best, best * tl.exp(anchor - highest))
            if least < best:
                best = least
                token = start + where
                picked = tl.sum(tl.where(i == token, value, 0.0), 0)
            highest = now
            start += BLOCK
        tl.store(tokens + line, token.to(tl.int64))
        answer = tl.where(token < 0, float("nan"), picked - highest - tl.log(total))
        tl.store(log_probs + line, answer)
    else:
        tl.store(tokens + line, tl.full((), -1, tl.int64))
        tl.store(log_probs + line, tl.zeros((), tl.float32))


def launch(
    logits: torch.Tensor,
    seed: torch.Tensor,
    ids: torch.Tensor,
    row: torch.Tensor,
    stream: int = STREAM,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference`` by the kernel, in float32."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    seed, ids, row = seed.contiguous(), ids.contiguous(), row.contiguous()
    scale, mask = (t if t is None else t.contiguous() for t in (scale, mask))
    lines, count = logits.shape
    tokens, log_probs = ids.new_empty(lines), logits.new_empty(lines, dtype=torch.float32)
    if lines:
        block = min(BLOCK, max(16, next_power_of_2(count)))
        draw_kernel[(lines,)](
            logits, seed, ids, row, scale, mask, tokens, log_probs, count, logits.stride(0),
            SEED_EACH=int(seed.numel() > 1), ROW_EACH=int(row.numel() > 1),
            SCALE_EACH=int(scale is not None and scale.numel() > 1),
            STREAM=stream, MASKED=mask is not None, SCALED=scale is not None, BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return tokens, log_probs


# --- the op ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fewstep::gumbel_draw", mutates_args=())
def op(
    logits: torch.Tensor,
    seed: torch.Tensor,
    ids: torch.Tensor,
    row: torch.Tensor,
    stream: int,
    mask: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    run = launch if runs_on(logits) and logits.dtype != torch.float64 else reference
    return run(logits, seed, ids, row, stream, mask, scale)


@op.register_fake
def _(logits, seed, ids, row, stream, mask=None, scale=None):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return ids.new_empty(len(logits)), logits.new_empty(len(logits), dtype=dtype)


def gumbel_draw(
    logits: torch.Tensor,
    seed: torch.Tensor,
    ids: torch.Tensor,
    row: torch.Tensor | int = 0,
    *,
    mask: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    stream: int = STREAM,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, log_probs), (N,) each, of draws from softmax(logits / temperature), (N, V).

    Args:
        logits: floating point; -inf is never drawn. A row without anything else gives token -1 and log-probability NaN.
        seed: int64, (1,) or (N,). ids: (N,) int64 below 2^32, one a row of logits: positions of all sequences, say.
        row: which draw this is, an int or int64 of the shape of seed: the step of the sampler.
        mask: (N,) bools; where it is False nothing is read, the token is -1 and its log-probability 0.
        temperature: float32, (1,) or (N,), positive.
    """
    if logits.ndim != 2 or ids.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(ids.shape)}"
        raise ValueError(f"logits must have shape (N, V) with V >= 1 and ids (N,), got {shapes}")
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (N, V) with V >= 1, got {tuple(logits.shape)}")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if mask is not None and (mask.shape != ids.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must hold {len(ids)} bools, got {tuple(mask.shape)} of {mask.dtype}")
    for name, t in (("seed", seed), ("row", row), ("temperature", temperature)):
        if isinstance(t, torch.Tensor) and t.shape not in ((1,), ids.shape):
            raise ValueError(f"{name} must have shape (1,) or ({len(ids)},), got {tuple(t.shape)}")
    row = row if isinstance(row, torch.Tensor) else torch.full_like(seed, row)
    logits, scale = logits.detach(), None if temperature is None else 1 / temperature
    arguments = (logits, seed, ids, row, stream, mask, scale)
    unsupported = f"logits must not be {logits.dtype}" if logits.dtype == torch.float64 else None
    if choose("gumbel_draw", impl, [logits], unsupported) == "triton":
        return (launch if direct(logits) else op)(*arguments)
    return reference(*arguments)


# --- cases -----------------------------------------------------------------------------------------------------------


def _case(
    lines: int, count: int, dtype: torch.dtype = torch.float32, masked: bool = False, scaled: bool = False
) -> Any:
    def make(device: torch.device | str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "logits": (3 * randn(lines, count, device=device)).to(dtype),
            "seed": torch.full((1,), 2**40 + 5, device=device),
            "ids": torch.arange(lines, device=device) * 7,
            "row": torch.full((1,), 2, device=device),
        }
        if masked:
            found["mask"] = torch.arange(lines, device=device) % 3 > 0
        if scaled:
            found["scale"] = 0.5 + torch.arange(lines, device=device) / max(lines, 1)
        return found

    return make


CASES = [
    Case("one", _case(1, 1)),
    Case("ragged", _case(5, 1003, masked=True, scaled=True)),
    Case("two blocks", _case(3, BLOCK + 1, torch.float16)),
    Case("empty", _case(0, 8)),
    Case("LLaDA, 1024 of 126464", _case(1024, 126_464, torch.bfloat16), real=True),
    Case(
        "LLaDA, masked, tempered", _case(1024, 126_464, torch.bfloat16, masked=True, scaled=True), real=True
    ),
    Case(
        "GPT-2, 1024 of 50257", _case(1024, 50_257), real=True, waived={"wide": "rows begin at odd addresses"}
    ),
    Case("pixels, 3072 of 256", _case(3072, 256), real=True),
]


def _float64_gumbel(
    logits: torch.Tensor, scale: torch.Tensor | None = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What masked diffusion models do elsewhere: all rows, noise in float64, and a second look for the probability."""
    values = logits.double() if scale is None else logits.double() * scale[:, None].double()
    noise = -torch.log(-torch.log(torch.rand_like(values)))
    token = (values + noise).argmax(-1)
    return token, values.log_softmax(-1).gather(1, token[:, None])[:, 0].float()


RIVALS = {"float64 Gumbel": _float64_gumbel}
