"""A guidance that waits for its denoiser: what ``rlg("adapter", scale=1.6)`` and its like are without one.

>>> from fewstep.models import load
>>> from fewstep.samplers import cfg
>>> double = Guide(lambda d: cfg(d, 2.0))
>>> len(double(load("digits")).parts())
2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..models.denoiser import Denoiser

Around = Literal["network", "guidance"]


class Guide:
    """Denoiser -> Denoiser, for ``steer``.

    Args:
        make: makes the guided denoiser of a plain one.
        around: what it goes round in a pipeline: the ``network``, with the pipeline's own classifier-free guidance on
            top, or that ``guidance``. For sums of scores the order is all one, and inside is where adapters switch.
    """

    def __init__(self, make: Callable[[Denoiser], Denoiser], around: Around = "network"):
        if not callable(make):
            raise TypeError(f"make must be a function Denoiser -> Denoiser, got {type(make).__name__}")
        if around not in ("network", "guidance"):
            raise ValueError(f"around must be 'network' or 'guidance', got {around!r}")
        self.make, self.around = make, around

    def __call__(self, d: Denoiser) -> Denoiser:
        made = self.make(d)
        if not isinstance(made, Denoiser):
            raise TypeError(
                f"a guide must make a Denoiser of a Denoiser, this one made a {type(made).__name__}"
            )
        return made
