"""Batches read before they are asked for, on threads, so that decoding pictures does not keep a GPU waiting.

What a turn's batch is follows from its ``Draws`` alone, so reading ahead changes nothing about it: it is a guess at
which turns will be asked for, made once two have been asked for in a row. Decoders let go of Python's lock.

>>> from fewstep.distill.draws import Draws
>>> read = ReadAhead(lambda draws: (draws.normal("data", (2,)), None), 2)
>>> wanted = [Draws(0, turn, 0, 3, 3) for turn in range(6)]
>>> all(torch.equal(read(draws)[0], draws.normal("data", (2,))) for draws in wanted)
True
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..draws import Draws
from .source import Read


class ReadAhead:
    """``read`` with up to ``depth`` batches under way, each on a thread of its own.

    A run asks for turn after turn, in one part or in several (``accumulate``): each part is guessed by itself.
    """

    def __init__(self, read: Read, depth: int):
        if depth < 1:
            raise ValueError(f"depth must be 1 or more, got {depth}")
        self.read, self.depth = read, depth
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="fewstep-data")
        self._under_way: dict[Draws, Future] = {}
        self._last: dict[Draws, int] = {}

    def __call__(self, draws: Draws) -> tuple[torch.Tensor, torch.Tensor | None]:
        draws = draws._replace(device="cpu")
        part = draws._replace(turn=0)
        in_a_row = self._last.get(part) == draws.turn - 1
        self._last[part] = draws.turn
        found = self._under_way.pop(draws, None)
        if in_a_row:
            for turn in range(draws.turn + 1, draws.turn + 1 + self.depth):
                after = draws._replace(turn=turn)
                if after not in self._under_way:
                    self._under_way[after] = self._threads.submit(self._pinned, after)
        else:
            for other in [d for d in self._under_way if d._replace(turn=0) == part]:
                self._under_way.pop(other).cancel()
        return self._pinned(draws) if found is None else found.result()

    def _pinned(self, draws: Draws) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, labels = self.read(draws)
        if torch.cuda.is_available():  # copied to the GPU without waiting
            return x.pin_memory(), None if labels is None else labels.pin_memory()
        return x, labels
