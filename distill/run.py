"""``fewstep distill RECIPE [key=value ...]``: a student from a teacher, resumed by itself where it was.

    fewstep distill dmd2-digits                                   # a recipe by name, or a path
    fewstep distill fdistill-digits divergence=kl train.iters=500
    torchrun --nproc_per_node=2 -m fewstep distill dmd2-digits

The folder ``runs/NAME`` holds config.yaml, metrics.jsonl, grids, checkpoints and, at the end, student.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import write_atomically
from ..models.denoiser import Denoiser
from . import checkpoints, parallel
from . import recipe as recipes
from .cast import cast, networks
from .data import Data
from .diagnostics import Watch, contrast, diagnose
from .disback import Backtrack, record, recorded
from .lora import adapters_of
from .methods.preference import Preference
from .opening import check_guidance, open_batches, open_teacher
from .pairs import open_pairs
from .parallel import Ranks, shard
from .players import Players
from .precision import autocast
from .progress import track
from .saved import metrics, save_student
from .schema import DistillRecipe, differences, read
from .sinks import Sink, open_sinks
from .student import sampled
from .training import Trainer
from .validation import Exam, draw, modes_found, rewards_of, set_exam


def run(source: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train by a recipe; the run's folder."""
    recipe, method = read(source, overrides)
    torch.set_num_threads(recipe.threads)  # sums, and so weights, depend on it
    ranks = parallel.start(recipe.device)
    if recipe.train.batch % (ranks.world * recipe.train.accumulate):
        raise ValueError(
            f"train.batch = {recipe.train.batch} must be a multiple of ranks x train.accumulate = "
            f"{ranks.world} x {recipe.train.accumulate}"
        )
    folder = recipe.folder
    _claim(folder, recipe, ranks)
    teacher = open_teacher(recipe).to(ranks.device)
    data = open_batches(recipe, teacher, ranks)
    check_guidance(method, teacher, data)
    with autocast(recipe.train.precision, ranks.device):
        guidance = getattr(method, "guidance", 1.0)
        exam = set_exam(teacher, data, recipe.report.exam, guidance, recipe.report.teacher_calls)
    data = _preferred(recipe, method, teacher, data, ranks, folder)
    players = cast(recipe, method, teacher, data)
    back = _backtrack(recipe, players, data, folder)
    players = players if back is None else back.begin(players)
    whole = recipe.shard != "fsdp" or ranks.world == 1  # what is sharded goes to the device as shards
    for net in networks(players):
        shard(net.to(ranks.device) if whole else net, recipe.shard, ranks)
    if players.adapters is not None:  # sharding has put others in their place
        players = players._replace(adapters=adapters_of(players.teacher.net))
    found = checkpoints.newest(folder / "checkpoints")
    fresh_critic = players.critic.copy() if getattr(method, "phases", 1) > 1 else None
    method.phase = _phase(method, recipe, _step(found))
    trainer = Trainer(recipe, method, players, data, ranks)
    if found is not None:
        state = trainer.state()
        checkpoints.load(found, state)
        trainer.load_state(state)
    if ranks.first:
        _drop_after(folder, trainer.iteration)
    best = _best(folder)
    watch = Watch(recipe.train.iters)
    for line in metrics(folder):
        watch(line)  # what was said before the run was broken off is not said again
    sinks = open_sinks(recipe.report.sinks, folder, asdict(recipe)) if ranks.first else []
    for index, say in track(
        recipe.train.iters, recipe.name, every=recipe.report.validate, quiet=not ranks.first
    ):
        if index < trainer.iteration:
            continue
        phase = _phase(method, recipe, index)
        if phase != method.phase:
            trainer.next_phase(phase, fresh_critic.copy())
        if back is not None:
            back.at(index)
        numbers = trainer.turn()
        say(**{k: numbers[k] for k in ("loss", "critic") if k in numbers})
        best = _report(trainer, folder, exam, numbers, best, sinks, watch)
    save_student(trainer, folder)
    return folder


def _claim(folder: Path, recipe: DistillRecipe, ranks: Ranks) -> None:
    """Refuse a folder whose config is another, unless nothing was begun in it; write ours."""
    from omegaconf import OmegaConf

    config = folder / "config.yaml"
    if config.is_file() and any(other != config for other in folder.iterdir()):
        kept = _kept(config)
        changed = differences(asdict(kept), asdict(recipe))
        if recipe.method.get("phases", 1) > 1 and kept.train.iters != recipe.train.iters:
            # a phase is a share of the iterations: prolonged, the run would be another from its middle on
            changed.append(f"train.iters: {kept.train.iters} -> {recipe.train.iters}")
        if changed:
            raise ValueError(
                f"{folder} holds a run with another config; give this one another name=, or remove the folder:\n  "
                + "\n  ".join(changed)
            )
    if ranks.first:
        write_atomically(config, OmegaConf.to_yaml(OmegaConf.create(asdict(recipe))))
    ranks.wait()


def _kept(config: Path) -> DistillRecipe:
    """The recipe of a run's folder; what its version had no key for is as it is by default."""
    try:
        return read(str(config))[0]
    except ValueError as error:
        raise ValueError(
            f"{config} is not of this version of fewstep: {error}. Go on with the version that began the run, or give "
            "this one another name="
        ) from error


def _preferred(
    recipe: DistillRecipe, method: Any, teacher: Denoiser, data: Data, ranks: Ranks, folder: Path
) -> Any:
    """The pairs of a method that learns from preferences, made here if need be, and else the data."""
    if not isinstance(method, Preference):
        return data
    base = sampled(teacher, recipe.student)
    with autocast(recipe.train.precision, ranks.device):
        return open_pairs(method, base, data, folder / "pairs.safetensors", recipe.seed, ranks)


def _backtrack(recipe: DistillRecipe, players: Players, data: Data, folder: Path) -> Backtrack | None:
    if not recipe.disback.nodes:
        return None
    if players.critic is None:
        raise ValueError("disback.nodes > 0 is for methods with a critic, and this one has none")
    if recipe.lora.rank or recipe.shard != "replicate" or getattr(players.student.d, "experts", None):
        raise ValueError(
            "disback.nodes > 0 is for whole networks on each rank: not with lora, fsdp or phases"
        )
    train, optim = recipe.train, recipe.optim
    nodes = recorded(
        folder, lambda: record(players, data, recipe.disback, recipe.seed, train.batch, optim.critic_lr)
    )
    return Backtrack(players.teacher, nodes, recipe.disback.interval)


def _phase(method: Any, recipe: DistillRecipe, iteration: int) -> int:
    """Phases have equal shares of the iterations; methods of one phase are always in it."""
    phases = getattr(method, "phases", 1)
    return min(phases - 1, iteration * phases // recipe.train.iters)


def _step(checkpoint: Path | None) -> int:
    """The iteration that was the checkpoint's last: its state is that iteration's, phase and all."""
    if checkpoint is None:
        return 0
    return max(0, json.loads((checkpoint / checkpoints.MANIFEST).read_text())["step"] - 1)


def _drop_after(folder: Path, iteration: int) -> None:
    """An interrupted run may have logged beyond its last checkpoint."""
    kept = [line for line in metrics(folder) if line["iteration"] <= iteration]
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def _best(folder: Path) -> tuple[float, int | None]:
    lines = metrics(folder)
    marked = [(line["main"], line["iteration"]) for line in lines if "main" in line]
    return min(marked, default=(float("inf"), None))


def _report(
    trainer: Trainer,
    folder: Path,
    exam: Exam,
    numbers: dict[str, float],
    best: tuple[float, int | None],
    sinks: list[Sink],
    watch: Watch,
) -> tuple[float, int | None]:
    report, iteration = trainer.recipe.report, trainer.iteration
    last = iteration == trainer.recipe.train.iters
    line: dict[str, Any] = {"iteration": iteration, **numbers, "bad": trainer.bad}
    if iteration % report.validate == 0 or last:
        with trainer.averaged(), autocast(trainer.recipe.train.precision, trainer.ranks.device):
            made = exam.sat(trainer.players.student)
        with torch.no_grad():
            line |= exam.mark(made) | rewards_of(exam, made, trainer.players.reward)
            line |= diagnose(trainer) | {"contrast": contrast(made, exam.teacher)}
            if len(trainer.data.shape) == 1:
                line["modes"] = modes_found(made)
            if trainer.ranks.first and (iteration % report.grid == 0 or last):
                draw(folder / "grids" / f"{iteration:08d}.png", made, exam)
        best = min(best, (line["main"], iteration))
    wrong = watch(line)
    if wrong:
        line["warnings"] = wrong
    if trainer.ranks.first:
        for words in wrong:
            warnings.warn(f"iteration {iteration}: {words}", stacklevel=2)
        _log(folder, line)
        for sink in sinks:
            sink(line)
    if iteration % report.checkpoint == 0 or last:
        about = {"main": line.get("main"), "recipe": trainer.recipe.name}
        checkpoints.save(folder / "checkpoints", iteration, trainer.state(), about, trainer.ranks)
        if trainer.ranks.first:
            checkpoints.tidy(folder / "checkpoints", report.keep, best[1])
    return best


def _log(folder: Path, line: dict[str, Any]) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """``fewstep distill RECIPE [key=value ...]``."""
    parser = argparse.ArgumentParser(
        prog="fewstep distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help=f"{', '.join(recipes.names('distill'))}, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. train.iters=500 optim.lr=1e-4 out=runs")
    parser.add_argument("--print-config", action="store_true", help="print the whole recipe and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, make one turn, write nothing"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.print_config:
        from omegaconf import OmegaConf

        print(
            OmegaConf.to_yaml(OmegaConf.create(asdict(read(arguments.recipe, arguments.overrides)[0]))),
            end="",
        )
        return 0
    if arguments.dry_run:
        return _dry_run(arguments.recipe, arguments.overrides)
    try:
        folder = run(arguments.recipe, arguments.overrides)
    finally:
        parallel.finish()
    if int(os.environ.get("RANK", 0)) == 0:
        print(folder)
    return 0


def _dry_run(source: str, overrides: Sequence[str]) -> int:
    recipe, method = read(source, overrides)
    torch.set_num_threads(recipe.threads)
    ranks = parallel.start(recipe.device)
    teacher = open_teacher(recipe).to(ranks.device)
    data = open_batches(recipe, teacher, ranks)
    check_guidance(method, teacher, data)
    with tempfile.TemporaryDirectory() as aside:  # two groups are enough to see that it runs
        few = (
            replace(method, groups=replace(method.groups, count=2))
            if isinstance(method, Preference)
            else method
        )
        data = _preferred(recipe, few, teacher, data, ranks, Path(aside))
    players = cast(recipe, method, teacher, data)
    for net in networks(players):
        net.to(ranks.device)
    trainer = Trainer(recipe, method, players, data, ranks)
    numbers = trainer.turn()
    size = sum(p.numel() for p in players.student.d.net.parameters())
    times = players.student.table.times
    print(f"{recipe.name}: a student of {size} parameters, {players.student.calls} calls at {times}")
    print("  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    return 0
