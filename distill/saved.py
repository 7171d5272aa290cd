"""What a run leaves behind and how it is read again: student.safetensors, table.json, the last line of metrics."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from ..models import checkpoint
from ..models.denoiser import Denoiser
from ..models.latent_codec import LatentCodec
from ..models.load import build, restore
from ..samplers import Table
from .lora import STUDENT, merged_state
from .methods.phased import Experts
from .opening import open_teacher
from .parallel import whole
from .schema import DistillRecipe, read
from .student import Student
from .training import Trainer


def save_student(trainer: Trainer, folder: Path) -> None:
    """Write the averaged student of a run; every rank must ask."""
    student: Student = trainer.players.student
    with trainer.averaged():
        net = student.d.net
        state = net.state_dict() if trainer.players.adapters is None else merged_state(net, STUDENT)
        parts = ((k, whole(v.detach())) for k, v in state.items())
        tensors = {k: v.to("cpu", copy=True) for k, v in parts if trainer.ranks.first}
    if not trainer.ranks.first:
        return
    if isinstance(trainer.players.teacher.codec, LatentCodec):
        tensors |= trainer.players.teacher.codec.tensors()  # it decodes wherever it is taken
    experts = getattr(student.d, "experts", None)
    config = student.d.config if experts is None else experts[0].config
    whose = "denoiser" if config is not None else "of the teacher's kind"  # a pipeline is no config of ours
    meta = {
        "kind": whose if experts is None else "experts",
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
    recipe, ends = read(meta["training"])[0], meta.get("ends")
    if meta["config"] is not None:
        made = [build(meta["config"]) for _ in ends or [None]]
    else:
        made = [_like_the_teacher(recipe)]
        made += [made[0].copy() for _ in (ends or [None])[1:]]
    d = made[0] if ends is None else Experts(made, ends)
    restore(d, tensors)
    d.net.eval().requires_grad_(False)
    numbers = next((line for line in reversed(metrics(folder)) if "main" in line), {})
    return Student(d, Table.load(folder / "table.json")), recipe, numbers


def _like_the_teacher(recipe: DistillRecipe) -> Denoiser:
    """The teacher's pipeline again: the student is its network with other weights."""
    try:
        d = open_teacher(replace(recipe, teacher=replace(recipe.teacher, dtype="fp32")))
    except ValueError as error:
        raise ValueError(
            f"the student is a network of its teacher's kind, and that is not to be had: {error}"
        ) from None
    if recipe.prompts.scale is not None and getattr(d.codec, "distilled", False):
        d.codec.guidance = recipe.prompts.scale  # what it was told in training
    return d


def metrics(folder: Path) -> list[dict]:
    """What the run logged, a line an iteration; a last line that was broken off is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
