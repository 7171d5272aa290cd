"""GS-Jacobi (2505.12849): the inverse of a TarFlow's blocks in sweeps over many tokens, not token by token.

A block's inverse x_t = exp(a_t(x_<t)) z_t + m_t(x_<t) is a fixed point, X = F(X), and F is strictly triangular. Jacobi:

    X <- F(X),        a sweep, one call for all tokens;    after k sweeps the first k + 1 tokens are exact

GS-Jacobi: the tokens in modules, one after the other (Gauss-Seidel); in each at most J sweeps, then it is frozen and
its keys and values stay in the cache. One token a module is the sequential inverse, one module is Jacobi.

How far off a sweep is, it says itself: |F(X) - X|. Here tokens freeze from the left as they settle (``stop="prefix"``):
a sweep computes only those after the first that the last one moved by more than ``tolerance``; and a module that has
not settled after J sweeps is ended token by token, so that the answer is that of ``flow.inverse`` whatever the flow,
and in no more calls. The released code stops by a norm over the batch, goes on with what J sweeps gave, and clamps
every iterate to [-3, 3], also the last: ``stop="norm", unfinished="keep"`` is that, without cutting off what lies
outside.

    >>> from fewstep.models.tarflow import TarFlow, TarFlowConfig
    >>> flow = TarFlow(TarFlowConfig(hidden_size=16, blocks=2, depth=1, num_heads=2))
    >>> z = torch.randn(4, 1, 8, 8)
    >>> x, info = gs_jacobi(flow, z)                    # a fresh flow is the identity, and one sweep says so
    >>> torch.equal(x, z), info.sweeps, info.sequential_calls
    (True, (1, 1), 30)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..models.tarflow import Conditioned, FlowBlock, TarFlow

GUESSES = ("z", "zero")
STOPS = ("prefix", "norm")
UNFINISHED = ("finish", "keep", "raise")
BOUND = 100.0  # no noise and no image in units of their own spread lies beyond it


class Plan(NamedTuple):
    """What each block is given: one value for all, or one a block in the order of ``flow.blocks``.

    Block 0 stands next to the image and is inverted last. (The released code's lists run the other way.)

    ``modules``: G, 1 .. T. ``sweeps``: J, at most so many in a module; None is the module's length, which is exact.
    ``guess``: what a block starts from: ``z``, its input, or ``zero`` beyond the first token.
    """

    modules: int | Sequence[int] = 1
    sweeps: int | None | Sequence[int | None] = None
    guess: str | Sequence[str] = "z"


class Info(NamedTuple):
    """What an inversion took, a number a block in the order of ``flow.blocks``, and in all.

    ``sweeps``: calls of the block's network, over all modules, with those that ended an unfinished one token by token.
    ``calls``: their sum; the sequential inverse makes ``sequential_calls``. ``work``: tokens computed, over those that
    the sequential inverse computes (a call of many tokens takes less time than as many calls, but more than one).
    ``residuals``: the largest change by the last sweep of a token that was frozen before it was exact; 0 if all are
    exact. ``settled``: whether every token was exact or within the tolerance when it was frozen.
    """

    sweeps: tuple[int, ...]
    calls: int
    sequential_calls: int
    work: float
    residuals: tuple[float, ...]
    settled: tuple[bool, ...]


class _Rules(NamedTuple):
    tolerance: float | None
    stop: str
    unfinished: str
    look: int


@torch.no_grad()
def gs_jacobi(
    flow: TarFlow,
    z: torch.Tensor,
    label: torch.Tensor | None = None,
    plan: Plan | None = None,
    *,
    tolerance: float | None = 1e-6,
    stop: str = "prefix",
    unfinished: str = "finish",
    look: int = 1,
    guidance: float = 0.0,
    anneal: str = "none",
) -> tuple[torch.Tensor, Info]:
    """The image of noise z (B, C, H, W), and what it took.

    Args:
        plan: modules, sweeps and first guess of every block; ``choose`` and ``stack`` make one. Default: one module.
        tolerance: a change below it is none; in units of x. None: never look, make all J sweeps.
        stop: ``prefix``: per token, the largest change over batch and channels; ``norm``: ||F(X) - X||_F / (B C) of the
            module, all or nothing, as released.
        unfinished: of a module that has not settled after J sweeps: ``finish`` ends it token by token, ``keep`` takes
            it as it is (with a warning, if ``tolerance`` says what for), ``raise`` is an error.
        look: sweeps between looks at the change. A look waits for the device (a number a token is read), so that on a
            GPU with small calls 2 or 3 may be faster; without a tolerance there is none until the end.
        guidance, anneal: as in ``flow.inverse``.

    A sweep may overflow where the answer does not: one that moves a token by more than 100, or to no number, is brought
    back to +-100, but only in tokens that are computed again; one that is frozen is as F gave it.
    """
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be above 0, or None, got {tolerance}")
    for name, value, known in (("stop", stop, STOPS), ("unfinished", unfinished, UNFINISHED)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if isinstance(look, bool) or not isinstance(look, int) or look < 1:
        raise ValueError(f"look must be 1 or more, got {look!r}")
    modules, sweeps, guesses = checked(flow, Plan() if plan is None else plan)
    step = Conditioned(flow, z, label, guidance, anneal)
    if not len(z):
        raise ValueError("z must hold at least one sample, got none")
    rules, x, rows = _Rules(tolerance, stop, unfinished, look), flow.patches(z), []
    for i in reversed(range(len(flow.blocks))):
        block = flow.blocks[i]
        solver = _Solver(step, block, block.ordered(x), guesses[i])
        edges = [flow.tokens * g // modules[i] for g in range(modules[i] + 1)]
        for first, end in zip(edges[:-1], edges[1:]):
            solver.module(first, min(end, flow.tokens - 1), sweeps[i], rules)
        x = block.ordered(solver.x)
        rows.insert(0, solver)
    # the only wait for the device, if nobody looked
    *residuals, size = torch.stack([*(row.residual for row in rows), x.abs().amax()]).tolist()
    residuals = [max(r, row.frozen) for r, row in zip(residuals, rows)]
    bad = [i for i, r in enumerate(residuals) if not math.isfinite(r)]
    if bad or not math.isfinite(size):
        where = f"block {bad[-1]} of {len(rows)}" if bad else "the image"
        raise FloatingPointError(
            f"{where} is not finite: the flow's scales overflow there, or sweeps were too few to come back"
        )
    settled = tuple(row.settled for row in rows)
    if not all(settled) and (tolerance is not None or unfinished == "raise"):
        left = ", ".join(f"{i} ({r:.2g})" for i, r in enumerate(residuals) if not settled[i])
        said = f"blocks left unsettled, with the last sweep's change: {left}; tolerance is {tolerance}"
        if unfinished == "raise":
            raise ArithmeticError(said)
        warnings.warn(said, RuntimeWarning, stacklevel=3)
    counts = tuple(row.calls for row in rows)
    alone = flow.tokens - 1
    work = sum(row.positions for row in rows) / (alone * len(rows))
    return flow.image(x), Info(counts, sum(counts), alone * len(rows), work, tuple(residuals), settled)


class _Solver:
    """One block on its way back: z and x (B, T, C) in the block's order."""

    def __init__(self, step: Conditioned, block: FlowBlock, z: torch.Tensor, guess: str):
        self.step, self.block, self.z, self.cache = step, block, z, step.cache(block)
        self.x = z.clone() if guess == "z" else torch.cat([z[:, :1], torch.zeros_like(z[:, 1:])], dim=1)
        self.calls, self.positions, self.settled = 0, 0, True
        self.residual = z.new_zeros(())  # of what is left
        self.frozen = 0.0  # of what was frozen before it was exact

    def update(self, first: int, end: int) -> torch.Tensor:
        """F(X) at tokens first + 1 .. end; tokens first .. end - 1 leave their keys and values."""
        a, m = self.step(self.block, self.x[:, first:end], first, self.cache)
        self.calls, self.positions = self.calls + 1, self.positions + end - first
        return a.exp_().mul_(self.z[:, first + 1 : end + 1]).add_(m)

    def module(self, first: int, end: int, sweeps: int | None, rules: _Rules) -> None:
        """Tokens first + 1 .. end, where all up to ``first`` are known."""
        sweep, most = 0, end - first if sweeps is None else sweeps
        change = self.residual.reshape(1, 1, 1)
        while first < end and sweep < most:
            new, old = self.update(first, end), self.x[:, first + 1 : end + 1]
            sweep, still, far = sweep + 1, 0, True
            if end - first > 1:
                change = (new - old).abs_()
                if rules.tolerance is not None and sweep % rules.look == 0:
                    moved, still = looked(change, rules.tolerance, rules.stop)
                    self.frozen = max(self.frozen, *moved[:still], 0.0)
                    far = not all(by <= BOUND for by in moved)
                if far:
                    # the next token depends on such alone as are known now: it is exact, and stays as F gave it
                    new[:, still + 1 :].nan_to_num_(0.0, BOUND, -BOUND).clamp_(-BOUND, BOUND)
            self.x[:, first + 1 : end + 1] = new
            first, change = first + 1 + still, change[:, 1 + still :]
        if first >= end:
            return
        if rules.unfinished != "finish":
            self.settled, self.residual = False, torch.maximum(self.residual, change.amax())
            return
        for t in range(first, end):
            self.x[:, t + 1 : t + 2] = self.update(t, t + 1)


def looked(change: torch.Tensor, tolerance: float, stop: str) -> tuple[list[float], int]:
    """The largest of |F(X) - X| (B, n, C) of each token, and how many from the left have settled. Waits."""
    moved = change.amax((0, 2)).tolist()
    if stop == "norm":
        batch, count, size = change.shape
        return moved, count if float(torch.linalg.vector_norm(change)) <= tolerance * batch * size else 0
    # what is no number compares false, and so has not settled
    return moved, next((t for t, by in enumerate(moved) if not by <= tolerance), len(moved))


def checked(flow: TarFlow, plan: Plan) -> tuple[list[int], list[int | None], list[str]]:
    """Modules, sweeps and guess of every block; ValueError where a plan does not fit the flow."""
    blocks, columns = len(flow.blocks), []
    for name, given in zip(Plan._fields, plan):
        several = isinstance(given, Sequence) and not isinstance(given, str)
        column = list(given) if several else [given] * blocks  # type: ignore[arg-type]
        if len(column) != blocks:
            raise ValueError(
                f"plan.{name} must be one for all or one for each of {blocks} blocks, got {given!r}"
            )
        columns.append(column)
    modules, sweeps, guesses = columns
    for name, column, most in (("modules", modules, flow.tokens), ("sweeps", sweeps, math.inf)):
        for value in column:
            if name == "sweeps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                span = f"1 .. {most}, the number of tokens" if name == "modules" else "1 or more, or None"
                raise ValueError(f"plan.{name} must be {span}, got {value!r}")
    for value in guesses:
        if value not in GUESSES:
            raise ValueError(f"plan.guess must be {' or '.join(GUESSES)}, got {value!r}")
    return modules, sweeps, guesses
