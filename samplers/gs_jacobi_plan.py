"""Which blocks of a flow are tough, and what to start from: CRM and IGM (2505.12849), measured once on a few images.

CRM, the convergence ranking metric, gauges how much a sweep X <- F(X) = exp(a(X)) Z + m(X) hands on of an error in X:
dF = (X - m) da + dm, and a and m come from the last layer's halves W_a and W_m (what lies before it is left out):

    derived     |rms_b (x - m)|_2 |W_a|_2 + |W_m|_2           rms over the batch, spectral norms, a matrix (T, C)
    released    |mean_b exp(-a) x|_2 |W_a|_2 + |W_m|_2        as the authors' code has it: in its mean signs cancel

A block is tough if its share of the sum stands out. IGM, the initial guessing metric, is |mean_b (F(X0) - x)|_2 for
X0 = z and for X0 = 0 (but for the first token), x being the truth; the smaller one names the better guess.

    >>> from fewstep.models.tarflow import TarFlow, TarFlowConfig
    >>> flow = TarFlow(TarFlowConfig(hidden_size=16, blocks=2, depth=1, num_heads=2))
    >>> metrics(flow, torch.randn(4, 1, 8, 8)).crm                # a fresh flow is the identity: no error is handed on
    (0.0, 0.0)
    >>> stack(flow, tough=[1], modules=8, sweeps=32, others=10)
    Plan(modules=(1, 8), sweeps=(10, 32), guess=('z', 'z'))
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from ..models.tarflow import TarFlow
from .gs_jacobi import Plan, checked

KINDS = ("derived", "released")


class Metrics(NamedTuple):
    """A number a block, in the order of ``flow.blocks``."""

    crm: tuple[float, ...]
    igm_z: tuple[float, ...]
    igm_zero: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """CRM over its sum; even where it is 0 everywhere."""
        total = sum(self.crm)
        return tuple(c / total if total else 1 / len(self.crm) for c in self.crm)


@torch.no_grad()
def metrics(
    flow: TarFlow, x: torch.Tensor, label: torch.Tensor | None = None, kind: str = "derived"
) -> Metrics:
    """CRM and IGM on images x (B, C, H, W), noisy as in training; some tens are enough.

    >>> from fewstep.models.tarflow import TarFlow
    >>> metrics(TarFlow({"hidden_size": 16, "blocks": 1}), torch.zeros(2, 1, 8, 8), kind="exact")
    Traceback (most recent call last):
    ValueError: kind must be one of derived, released, got 'exact'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    label = flow.check(x, label, "x")
    h, rows = flow.patches(x), []
    for block in flow.blocks:
        x, condition = block.ordered(h), block.condition(label)
        a, m = block.after(x[:, :-1], condition)
        tail = (x[:, 1:] - m) * (-a).exp()
        z = torch.cat([x[:, :1], tail], dim=1)
        off = []
        for guess in (z, torch.cat([x[:, :1], torch.zeros_like(tail)], dim=1)):
            a0, m0 = block.after(guess[:, :-1], condition)
            off.append(spectral((a0.exp() * tail + m0 - x[:, 1:]).mean(0)))
        if kind == "released":
            size = spectral(torch.cat([x[:, :1], (-a).exp() * x[:, 1:]], dim=1).mean(0))
        else:
            size = spectral((x[:, 1:] - m).square().mean(0).sqrt())
        of_a, of_m = (spectral(w) for w in block.out.weight.chunk(2))
        rows.append(torch.stack([size * of_a + of_m, *off]))
        h = block.ordered(z)
    return Metrics(*(tuple(column) for column in torch.stack(rows, dim=1).tolist()))


def spectral(matrix: torch.Tensor) -> torch.Tensor:
    """The largest singular value, in the precision of singular values at least."""
    return torch.linalg.matrix_norm(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), 2)


def stack(
    flow: TarFlow,
    tough: Collection[int],
    modules: int,
    sweeps: int | None,
    others: int | None,
    guess: str | Collection[str] = "z",
) -> Plan:
    """The paper's [Stack-G-J-Else]: ``tough`` blocks in G modules of J sweeps, the others in one of ``others``.

    Blocks are counted from the image (the released code counts the other way in its lists).
    """
    blocks = range(len(flow.blocks))
    if not set(tough) <= set(blocks):
        raise ValueError(f"tough must be of blocks 0 .. {len(blocks) - 1}, got {sorted(tough)}")
    each = (guess,) * len(blocks) if isinstance(guess, str) else tuple(guess)
    plan = Plan(
        tuple(modules if i in tough else 1 for i in blocks),
        tuple(sweeps if i in tough else others for i in blocks),
        each,
    )
    checked(flow, plan)
    return plan


def choose(
    flow: TarFlow,
    x: torch.Tensor,
    label: torch.Tensor | None = None,
    modules: int = 8,
    kind: str = "derived",
    dominant: float = 1.5,
) -> Plan:
    """A plan from CRM and IGM on images x: blocks whose share is ``dominant`` times the even one get ``modules``.

    The paper reads its strategies off CRM's table by eye. Sweeps are not bounded: the tolerance ends them.
    """
    found = metrics(flow, x, label, kind)
    tough = [i for i, share in enumerate(found.shares) if share > dominant / len(found.shares)]
    guess = ["z" if a <= b else "zero" for a, b in zip(found.igm_z, found.igm_zero)]
    return stack(flow, tough, modules, None, None, guess)
