"""Where a tree's latents lie: on the device while a budget of bytes lasts, on the host beyond it.

>>> store = Store(memory=0)                                    # everything goes to the host
>>> store.add(0, (torch.arange(3.0)[:, None],)), store.add(0, (torch.arange(3.0, 5.0)[:, None],))
(0, 3)
>>> store.get(0, [4, 0], torch.device("cpu"))[0].flatten()
tensor([4., 0.])
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

import torch

Node = tuple[torch.Tensor, ...]


class Store:
    """Blocks of nodes a depth, each block whole on the device or whole on the host.

    ``memory``: bytes on the device; None for no limit.
    """

    def __init__(self, memory: int | None = None):
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 0):
            raise ValueError(f"memory must be a number of bytes, or None for no limit, got {memory!r}")
        self.memory, self.on_device, self.on_host = memory, 0, 0
        self._blocks: dict[int, list[Node]] = defaultdict(list)
        self._begins: dict[int, list[int]] = defaultdict(list)
        self._count: dict[int, int] = defaultdict(int)

    def add(self, depth: int, node: Node, keep_here: bool = True) -> int:
        """Put nodes of a depth by; the number of the first. ``keep_here=False`` sends them to the host in any case."""
        size = sum(t.numel() * t.element_size() for t in node)
        keep_here = keep_here and (self.memory is None or self.on_device + size <= self.memory)
        if keep_here:
            self.on_device += size
        else:
            self.on_host += size
            node = tuple(t.cpu() for t in node)
        first = self._count[depth]
        self._blocks[depth].append(tuple(t.detach() for t in node))
        self._begins[depth].append(first)
        self._count[depth] += len(node[0])
        return first

    def get(self, depth: int, index: Sequence[int], device: torch.device) -> Node:
        """Nodes of a depth by their numbers, in that order."""
        begins, pieces = self._begins[depth], []
        where = [(bisect_right(begins, i) - 1, i) for i in index]
        for block, i in where:
            at = i - begins[block]
            pieces.append(tuple(t[at : at + 1].to(device) for t in self._blocks[depth][block]))
        return tuple(torch.cat(parts) for parts in zip(*pieces))

    def all(self, depth: int) -> Node:
        """Everything of a depth, on the host."""
        return tuple(torch.cat([t.cpu() for t in parts]) for parts in zip(*self._blocks[depth]))

    def depths(self) -> list[int]:
        """The depths that hold nodes."""
        return sorted(self._blocks)
