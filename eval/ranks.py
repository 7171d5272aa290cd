"""One process or many: who this rank is, its share of the work, sums and rows over all ranks.

A single process has no process group at all; torchrun's RANK and WORLD_SIZE make one. Shares are runs of neighbours,
uneven where they must be, so that rows gathered rank by rank stand in the order that one process has them in.

>>> [list(share(7, Ranks(rank, 3))) for rank in range(3)]
[[0, 1, 2], [3, 4], [5, 6]]
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.distributed as dist


class Ranks(NamedTuple):
    """This process among the others."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; a tensor of its own."""
        if self.world == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value

    def each(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, of one shape, in the order of ranks."""
        if self.world == 1:
            return [value]
        value = value.detach().contiguous()
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value)
        return parts

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def start(device: str = "auto") -> Ranks:
    """Join the group that torchrun made, if it made one."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:  # without a number it is the current one
        torch.cuda.set_device(where)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return Ranks(rank, world, where)


def finish() -> None:
    """Leave the group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def share(count: int, ranks: Ranks) -> range:
    """The items of `count` that are this rank's; the first ranks have one more where it does not come out even."""
    each, over = divmod(count, ranks.world)
    first = ranks.rank * each + min(ranks.rank, over)
    return range(first, first + each + (ranks.rank < over))


def gather_rows(rows: torch.Tensor | None, ranks: Ranks) -> torch.Tensor | None:
    """The rows (n_r, ...) of all ranks below one another, in the order of ranks, on every rank.

    A rank without rows may pass None, since it need not know their shape. None comes back where nobody has any.
    """
    if ranks.world == 1:
        return rows
    rows = None if rows is None or len(rows) == 0 else rows.to(ranks.device).contiguous()
    ours = (0, ()) if rows is None else (len(rows), (rows.dtype, tuple(rows.shape[1:])))
    theirs: list = [None] * ranks.world
    dist.all_gather_object(theirs, ours)
    kinds = {kind for count, kind in theirs if count}
    if not kinds:
        return None
    if len(kinds) > 1:
        raise ValueError(f"ranks have rows of different kinds: {', '.join(sorted(map(str, kinds)))}")
    dtype, shape = kinds.pop()
    most = max(count for count, _ in theirs)
    padded = torch.zeros((most, *shape), dtype=dtype, device=ranks.device)
    if rows is not None:
        padded[: len(rows)] = rows
    return torch.cat([part[:count] for part, (count, _) in zip(ranks.each(padded), theirs)])
