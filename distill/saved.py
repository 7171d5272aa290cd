"""What a run leaves behind and how it is read again: student.safetensors, table.json, the last line of metrics."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..models import checkpoint
from ..models.load import build
from ..samplers import Table
from .lora import STUDENT, merged
from .methods.phased import Experts
from .parallel import whole
from .schema import DistillRecipe, read
from .student import Student
from .training import Trainer


def save_student(trainer: Trainer, folder: Path) -> None:
    """Write the averaged student of a run; every rank must ask."""
    student: Student = trainer.players.student
    with trainer.averaged():
        net = student.d.net if trainer.players.adapters is None else merged(student.d.net, STUDENT)
        tensors = {k: whole(v.detach()).clone() for k, v in net.state_dict().items()}
    if not trainer.ranks.first:
        return
    experts = getattr(student.d, "experts", None)
    config = student.d.config if experts is None else experts[0].config
    meta = {
        "kind": "denoiser" if experts is None else "experts",
        "config": config,
        "training": asdict(trainer.recipe),
    }
    if experts is not None:
        meta["ends"] = student.d.ends
    checkpoint.write(folder / "student.safetensors", tensors, meta)
    student.table.save(folder / "table.json")


def open_student(folder: str | Path) -> tuple[Student, DistillRecipe, dict[str, float]]:
    """(student, recipe, what it was last measured to be) from a run's folder."""
    folder = Path(folder)
    path = folder / "student.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no student.safetensors: it is no run, or one that did not finish"
        )
    tensors, meta = checkpoint.read(path)
    ends = meta.get("ends", [None])
    made = [build(meta["config"]) for _ in ends]
    d = made[0] if meta["kind"] == "denoiser" else Experts(made, ends)
    d.net.load_state_dict(tensors)
    d.net.eval().requires_grad_(False)
    numbers = next((line for line in reversed(metrics(folder)) if "main" in line), {})
    return Student(d, Table.load(folder / "table.json")), read(meta["training"])[0], numbers


def metrics(folder: Path) -> list[dict]:
    """What the run logged, a line an iteration; a last line that was broken off is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
