"""Where a run's numbers go besides its metrics.jsonl: TensorBoard or Weights & Biases, where its recipe asks.

Neither is needed, neither is imported before, and neither goes online by itself: W&B writes into the run's folder
unless WANDB_MODE says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Sink = Callable[[dict[str, Any]], None]


def open_sinks(names: list[str], folder: Path, recipe: dict[str, Any]) -> list[Sink]:
    """A function for each of ``names`` (tensorboard, wandb) that takes a line of metrics."""
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise ValueError(f"report.sinks may hold {' and '.join(makers)}, got {', '.join(unknown)}")
    return [makers[name](folder, recipe) for name in names]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "iteration"}


def _tensorboard(folder: Path, recipe: dict[str, Any]) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("report.sinks = [tensorboard] needs it: pip install tensorboard") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(line: dict[str, Any]) -> None:
        for key, value in _numbers(line).items():
            writer.add_scalar(key, value, line["iteration"])
        writer.flush()

    return write


def _wandb(folder: Path, recipe: dict[str, Any]) -> Sink:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("report.sinks = [wandb] needs it: pip install wandb") from error
    mode = os.environ.get("WANDB_MODE", "offline")
    # one run of theirs for one of ours, however often it was resumed
    run = wandb.init(project="fewstep", name=recipe["name"], id=recipe["name"], resume="allow", dir=str(folder),
                     config=recipe, mode=mode)  # fmt: skip
    return lambda line: run.log(_numbers(line), step=line["iteration"])
