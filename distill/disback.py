"""DisBack (2408.15991): the student follows the teacher's own degradation backwards, so that its target is never far.

    recording     a copy of the teacher is trained to denoise what the *untrained* student makes; S'_0 (the teacher),
                  S'_1 .. S'_N are kept on the way
    backtracking  the critic starts as S'_N, which fits the student; the target is S'_{N-1}, then S'_{N-2}, .. and last
                  the teacher, each for ``interval`` student updates

It is a schedule of teachers, so it goes round any method. (The released pseudo-code divides where it must take a
remainder and moves on a node early or late; the schedule here is the text's.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models import checkpoint
from ..models.denoiser import Denoiser
from .data import Data
from .draws import Draws
from .levels import Times
from .methods.dmd2 import critic_denoising_loss
from .players import Players

State = dict[str, torch.Tensor]


@dataclass
class DisBackRecipe:
    """``nodes`` N (0: off); ``record``: critic updates between two of them; ``interval``: student updates a target."""

    nodes: int = 0
    record: int = 50
    interval: int = 50


def node_at(iteration: int, nodes: int, interval: int) -> int:
    """The target's node at a student update: N - 1 first, 0 (the teacher) from (N - 1) interval on.

    >>> [node_at(i, nodes=3, interval=2) for i in range(7)]
    [2, 2, 1, 1, 0, 0, 0]
    """
    return max(0, nodes - 1 - iteration // interval)


def record(
    players: Players, data: Data, recipe: DisBackRecipe, seed: int, batch: int, lr: float, weight: str = "edm"
) -> list[State]:
    """[S'_0 .. S'_N]: the teacher's weights, and those of its copy on the way to fitting the untrained student."""
    if players.teacher.net is None:
        raise ValueError("disback.nodes > 0 needs a teacher with a network, and this one is exact")
    fallen = players.teacher.copy()
    net = fallen.net.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    nodes = [_copied(net)]
    for turn in range(recipe.nodes * recipe.record):
        made = data.batch(Draws(seed ^ 0xD15BAC, turn, 0, batch, batch))
        with torch.no_grad():
            x0 = made.generate(players.student)
        loss = critic_denoising_loss(players._replace(critic=fallen), made, x0, Times("karras"), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (turn + 1) % recipe.record == 0:
            nodes.append(_copied(net))
    return nodes


def recorded(folder: Path, make) -> list[State]:
    """The nodes as they lie in ``folder``, or made and written there: a resumed run must follow the same path."""
    path = folder / "disback.safetensors"
    if not path.is_file():
        nodes = make()
        flat = {f"{k}/{name}": value for k, node in enumerate(nodes) for name, value in node.items()}
        checkpoint.write(path, flat, {"kind": "disback", "nodes": len(nodes)})
    tensors, meta = checkpoint.read(path)
    nodes = [{} for _ in range(meta["nodes"])]
    for key, value in tensors.items():
        k, _, name = key.partition("/")
        nodes[int(k)][name] = value
    return nodes


class Backtrack:
    """The moving target: ``teacher`` answers with the weights of the node that it is the turn of."""

    def __init__(self, teacher: Denoiser, nodes: Sequence[State], interval: int):
        self.teacher, self.nodes, self.interval = teacher.copy(), nodes, interval
        self.teacher.net.eval().requires_grad_(False)
        self.node: int | None = None

    def at(self, iteration: int) -> None:
        """Load the target of a student update, if it is another than the last one's."""
        node = node_at(iteration, len(self.nodes) - 1, self.interval)
        if node != self.node:
            self.teacher.net.load_state_dict(self.nodes[node])
            self.node = node

    def begin(self, players: Players) -> Players:
        """The players with the moving target for a teacher and S'_N for a critic."""
        players.critic.net.load_state_dict(self.nodes[-1])
        features = self.teacher if players.features is players.teacher else players.features
        self.at(0)
        return players._replace(teacher=self.teacher, features=features)


def _copied(net: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}
