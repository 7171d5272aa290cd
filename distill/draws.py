"""The random numbers of a training step, from its number alone: nothing to save, nothing to restore.

They are counter-based (see ``samplers.noise``), keyed by the run's seed and a sample's place in the global batch, and
counted by iteration and purpose. So a resumed run draws what the unbroken one would have, and two ranks with half a
batch each draw what one with the whole would.

>>> whole = Draws(seed=0, turn=3, first=0, count=4, total=4)
>>> half = Draws(seed=0, turn=3, first=2, count=2, total=4)
>>> torch.equal(whole.normal("start", (5,))[2:], half.normal("start", (5,)))
True
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..samplers import noise

STREAMS = (
    "data",
    "start",
    "step",
    "forward",
    "level",
    "gan_forward",
    "gan_level",
    "real_forward",
    "null",
    "user",
    "flip",
    "crop",
    "prompt",
    "other_level",
)
FIRST_STREAM = 16  # the samplers' own streams lie below


class Draws(NamedTuple):
    """Samples ``first .. first + count`` of a global batch of ``total`` at ``turn``, a number no other batch has."""

    seed: int
    turn: int
    first: int
    count: int
    total: int
    device: torch.device | str = "cpu"

    @property
    def ids(self) -> torch.Tensor:
        """Places in the global batch."""
        return torch.arange(self.first, self.first + self.count, device=self.device)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normals (count, *shape)."""
        return noise.normal(self.seed, self.ids, shape, self.turn, stream(purpose))

    def uniform(self, purpose: str) -> torch.Tensor:
        """Uniforms (count,) in (0, 1), float64."""
        return self.uniforms(purpose, 1)[:, 0]

    def uniforms(self, purpose: str, n: int) -> torch.Tensor:
        """Uniforms (count, n) in (0, 1), float64; the first is ``uniform``'s."""
        return noise.uniform(self.seed, self.ids, n, self.turn, stream(purpose))

    def stratified(self, purpose: str) -> torch.Tensor:
        """Uniforms of which each n-th part of (0, 1) has one, over the global batch of n, in no order."""
        drawn = noise.uniform(self.seed, torch.arange(self.total), 2, self.turn, stream(purpose))
        places = drawn[:, 1].argsort().argsort()
        mine = slice(self.first, self.first + self.count)
        return ((places[mine] + drawn[mine, 0]) / self.total).to(self.device)

    def choice(self, purpose: str, n: int) -> int:
        """One of 0 .. n - 1, the same on every rank."""
        if n == 1:
            return 0
        everyone = noise.uniform(self.seed, torch.tensor([2**32 - 1]), 1, self.turn, stream(purpose))
        return min(n - 1, int(float(everyone) * n))


def stream(purpose: str) -> int:
    """The noise stream of a purpose."""
    if purpose not in STREAMS:
        raise ValueError(f"purpose must be one of {', '.join(STREAMS)}, got {purpose!r}")
    return FIRST_STREAM + STREAMS.index(purpose)
