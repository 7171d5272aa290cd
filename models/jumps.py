"""Average velocities: a network of two times, and the Denoiser that jumps from each time to the next of a grid by it.

Where v is the velocity of the flow, the average velocity from t down to r (MeanFlow, 2505.13447) is

    u(x_t, r, t) = 1/(t - r) int_r^t v(x_s, s) ds            x_r = x_t - (t - r) u(x_t, r, t)

so a step of Euler with u in the place of v is exact, however long. A network with ``second_time`` is told t and the
``gap`` t - r; where no gap is given it is 0, u is v, and everything that runs a flow runs it.

    >>> from fewstep.models import paths
    >>> d = Denoiser(lambda x, tau, gap: x * 0 + gap.reshape(-1, 1), paths.flow(), predicts="flow")
    >>> jumping(d, [1.0, 0.5, 0.0]).velocity(torch.zeros(1, 1), 0.75)          # from 0.75 it jumps to 0.5
    tensor([[0.2500]])
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from .denoiser import Denoiser
from .paths import Times


class Jumps(Denoiser):
    """Made by ``jumping``: asked at t, its network is told the gap to the next lower of ``ends``."""

    ends: tuple[float, ...]

    def raw(self, x: torch.Tensor, t: Times, gap: torch.Tensor | None = None, **cond: Any):
        """The average velocity from t to the next end, or over the ``gap`` (B,) asked for."""
        return super().raw(x, t, gap=self.gap(x, t) if gap is None else gap, **cond)

    def gap(self, x: torch.Tensor, t: Times) -> torch.Tensor:
        """t less the highest end below it, (B,); what lies below all of them goes to the lowest."""
        # a time that float32 has rounded up from an end stands at that end
        if not isinstance(t, torch.Tensor):
            below = (end for end in self.ends if end < float(t) - 1e-6)
            return x.new_full((len(x),), float(t) - max(below, default=self.ends[0]))
        t = t.to(x.device, torch.float64).expand(len(x))
        reached = torch.full_like(t, self.ends[0])
        for end in self.ends[1:]:
            reached = torch.where(t > end + 1e-6, end, reached)
        return (t - reached).to(x.dtype)


def jumping(d: Denoiser, times: Sequence[float]) -> Jumps:
    """d over the same network, whose steps end at ``times``, the clean end among them."""
    if d.predicts != "flow" or d.path.name != "flow":
        raise ValueError(
            f"an average velocity is of a flow: d must predict flow on a flow path, and it predicts {d.predicts} on "
            f"{d.path.name}"
        )
    if min(times) != d.path.t_clean:
        raise ValueError(f"times must end at {d.path.t_clean}, got {list(times)}")
    twin = Jumps.__new__(Jumps)
    twin.__dict__.update(copy.copy(d).__dict__)
    twin.ends = tuple(sorted({float(t) for t in times}))
    twin.config = None if d.config is None else {**d.config, "jumps": list(twin.ends)}
    return twin


def with_second_time(d: Denoiser) -> Denoiser:
    """A copy of d whose network has a second time; it answers as d does, whatever the gap, until it is trained."""
    from .load import build

    if d.config is None or d.net is None:
        raise ValueError(
            "d must be one that load.build can make again (one of fewstep's networks): it has no config"
        )
    twin = build({**d.config, "net": {**d.config["net"], "second_time": True}})
    weights = {**twin.net.state_dict(), **d.net.state_dict()}
    twin.net.load_state_dict(weights)
    return twin


def has_second_time(d: Denoiser) -> bool:
    """Whether d's network can be told a gap."""
    return getattr(d.net, "gap_embedding", None) is not None
