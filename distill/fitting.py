"""A small network fitted by its own loss: the loop that teachers of other kinds than denoisers are trained by.

AdamW, a warm-up and half a cosine, and the running average of ``regression.average``, whose weights the network has in
the end. The loss is given the random numbers of its step (``draws``), so a run is decided by its seed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .draws import Draws
from .progress import track
from .regression import average, learning_rate

Loss = Callable[[Draws], torch.Tensor]


@dataclass
class Fitting:
    """What teachers' recipes have in common; a kind's own adds to it. ``ema_share``: the weights are averaged over so
    much of the run; ``clip``: of the gradient's norm."""

    kind: str = ""
    name: str = "teacher"
    steps: int = 1000
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema_share: float = 0.05
    seed: int = 0
    threads: int = 1
    out: str = "."

    @property
    def file(self) -> Path:
        """Where the teacher is written."""
        return Path(self.out) / f"{self.name}.safetensors"


def fit(net: nn.Module, loss_of: Loss, recipe: Fitting) -> dict[str, Any]:
    """Train ``net`` in place; the record for its checkpoint. ``loss_of(draws)``: the mean loss of a step's batch.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> wanted = lambda draws: (net(draws.normal("data", (1,))) - 3 * draws.normal("data", (1,))).square().mean()
    >>> record = fit(net, wanted, Fitting(steps=150, lr=0.1, batch=16))
    >>> round(net.weight.item(), 1)
    3.0
    """
    for name in ("steps", "batch"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(recipe, name)}")
    averaged = copy.deepcopy(net.train())
    optimizer = torch.optim.AdamW(net.parameters(), recipe.lr, (0.9, 0.99), weight_decay=recipe.weight_decay)
    cpu, wall, running = time.process_time(), time.monotonic(), None
    for step, say in track(recipe.steps, recipe.name):
        torch.manual_seed(((recipe.seed << 32) + step) % 2**63)  # for dropout
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * learning_rate(step, recipe.steps, recipe.warmup)
        loss = loss_of(Draws(recipe.seed, step, 0, recipe.batch, recipe.batch))
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        optimizer.step()
        average(averaged, net, step, recipe.ema_share)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of {recipe.name} became {value} at step {step}; try a smaller lr than {recipe.lr}"
            )
        running = value if running is None else 0.98 * running + 0.02 * value
        say(loss=running)
    net.load_state_dict(averaged.state_dict())
    net.eval().requires_grad_(False)
    said = {key: value for key, value in asdict(recipe).items() if key != "out"}
    return {
        "recipe": said,
        "core_seconds": round(time.process_time() - cpu, 1),
        "minutes": round((time.monotonic() - wall) / 60, 2),
        "parameters": sum(p.numel() for p in net.parameters()),
        "torch": torch.__version__,
    }


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Inside, torch has so many threads: sums, and so weights, depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
