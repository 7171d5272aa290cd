"""One process or many: ranks, averaged gradients, sharded networks. A single process has no process group at all.

``replicate`` keeps a whole copy on each rank and averages gradients; ``fsdp`` shards parameters, gradients and
optimizer state (FSDP2). Both are started by torchrun, which sets RANK and WORLD_SIZE.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ..eval.ranks import ALONE, Ranks, finish, start

__all__ = ["ALONE", "Ranks", "average_gradients", "finish", "shard", "start", "units", "whole"]
SHARDS = ("replicate", "fsdp")


def shard(net: nn.Module, kind: str, ranks: Ranks) -> None:
    """``net``, in place: as it is (replicate), or sharded over the ranks, each block of its lists on its own (fsdp)."""
    if kind not in SHARDS:
        raise ValueError(f"shard must be one of {', '.join(SHARDS)}, got {kind!r}")
    if kind == "replicate" or ranks.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for unit in units(net):
        fully_shard(unit, mesh=mesh)
    # By default the root keeps what it gathered, with the requires_grad of that time: a network frozen in the other's
    # turn would stay so in its own, in part and without a word.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)


def units(net: nn.Module) -> list[nn.Module]:
    """What is gathered at once: blocks that a network of diffusers says not to split, inner ones first, or else the
    blocks of its lists.

    >>> net = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2))
    >>> len(units(net))
    2
    """
    kinds = set(getattr(net, "_no_split_modules", None) or ())
    if kinds:
        return [m for m in reversed(list(net.modules())) if type(m).__name__ in kinds]
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def whole(value: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, any other as it is; every rank must ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """The mean of each gradient over the ranks, in one message; sharded parameters have had theirs already."""
    gradients = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "full_tensor")]
    if ranks.world == 1 or not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks.world
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.reshape(gradient.shape))
