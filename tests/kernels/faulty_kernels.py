"""Kernels that are wrong in one way each, so that the ahead-of-time checks can be seen to find it."""

from __future__ import annotations

import torch

from fewstep.kernels.cases import Case
from fewstep.kernels.lang import jit, tl


@jit
def spills(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    v = tl.load(x + i)
    tl.store(out + i, v / tl.sum(v * v))


@jit
def fp64(x, out, scale):
    i = tl.arange(0, 512)
    v = tl.load(x + i).to(tl.float64)
    tl.store(out + i, (v * v + scale).to(tl.float32))


@jit
def shared(x, out, SIZE: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, SIZE)
    a = tl.load(x + i[:, None] * SIZE + k[None, :])
    b = tl.load(x + k[:, None] + i[None, :] * SIZE)
    tl.store(out + i[:, None] * 16 + i[None, :], tl.dot(a, b, input_precision="tf32"))


@jit
def wide(x, out):
    i = tl.arange(0, 512)
    tl.store(out + i, tl.load(x + i * 3))


@jit
def endless(x, ROUNDS: tl.constexpr):
    v = tl.load(x)
    for _ in tl.static_range(ROUNDS):
        v = tl.sin(v) + tl.cos(v)
    tl.store(x, v)


@jit
def broken(x):
    tl.store(x, tl.arange(0, 3))


def launch(which: str, x: torch.Tensor) -> None:
    out = torch.empty_like(x)
    if which == "spills":
        spills[(1,)](x, out, SIZE=4096, num_warps=1, maxnreg=32)
    elif which == "fp64":
        fp64[(1,)](x, out, 0.1)
    elif which == "shared":
        shared[(1,)](x, out, SIZE=2048, num_warps=16)
    elif which == "wide":
        wide[(1,)](x, out)
    elif which == "endless":
        endless[(1,)](x, ROUNDS=10**6)
    else:
        broken[(1,)](x)


def _case(which: str) -> Case:
    return Case(which, lambda device: {"which": which, "x": torch.empty(65536, device=device)}, real=True)


CASES = [_case(which) for which in ("spills", "fp64", "shared", "wide", "endless", "broken")]
