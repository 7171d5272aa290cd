"""The samples that ``MODEL --solver .. --steps .. --prompt ..`` asks for, as a function of their numbers."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .arguments import add_grid, solver_options, times_of
from .model import add_model, embedded, scale_of, told

if TYPE_CHECKING:
    import torch

    from ..samplers import Table


class Maker(NamedTuple):
    """``make(ids)`` gives images in [-1, 1] and labels or None; ``told`` is all that decides their bytes."""

    make: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    told: dict[str, Any]
    table: Table

    @property
    def folder(self) -> Path:
        """Where such samples go if nobody says where: named after what they are."""
        digest = hashlib.sha256(repr(sorted(self.told.items())).encode()).hexdigest()[:8]
        model = re.sub(r"[^\w.-]+", "-", Path(str(self.told["model"])).name) or "model"
        return Path("samples") / f"{model}-{self.table.solver}-{self.table.calls}-{digest}"


def add_maker(parser: argparse.ArgumentParser, model: str) -> None:
    """MODEL, how it is sampled, and by which seed; options of the solver are what is left over."""
    add_model(parser, model)
    parser.add_argument("--prompts", type=Path, help="a file with a prompt a line: sample i is of line i")
    parser.add_argument("--solver", default="abm", help="fewstep solvers lists them (default: abm)")
    parser.add_argument("--table", type=Path, help="a saved table instead of --solver, --grid and --steps")
    add_grid(parser)
    parser.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")


def maker(arguments: argparse.Namespace, rest: list[str], device: torch.device) -> Maker:
    """Load the model and build the table; ``ValueError`` where the two do not go together."""
    from ..models import decode
    from ..models.codec import dealt
    from ..samplers import Table, catalogue
    from ..samplers import sample as draw
    from ..samplers.noise import starting_noise

    if arguments.table is not None and rest:
        raise ValueError(f"--table is a table as it is: it takes no {' '.join(rest)}")
    solver = catalogue.find(arguments.solver)
    options = solver_options(solver, rest)
    if arguments.prompt and arguments.prompts:
        raise ValueError("--prompt and --prompts exclude each other")
    lines = None if arguments.prompts is None else read_prompts(arguments.prompts)
    if lines is not None:
        arguments.prompt = lines[:1]
    d, cond, classes = told(arguments, device, blocks=True)
    scale = scale_of(arguments, d.codec)
    if len(d.shape) == 4:
        raise ValueError(f"{arguments.model} makes videos; expected a model of pictures")
    if arguments.table is not None:
        table = Table.load(arguments.table)
    else:
        table = solver(d.path, times_of(d.path, solver, arguments, options), **options)
    plan = table.on(d, device)

    def make(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mine = None
        if lines is not None:
            mine, _ = embedded(arguments, [lines[i % len(lines)] for i in ids.tolist()], d.codec, scale)
        elif cond is not None:
            mine = dealt(cond, ids)
        noise = starting_noise(arguments.seed, ids, d.shape)
        made = decode(d, draw(d, noise, plan, cond=mine, seed=arguments.seed, ids=ids))
        return made, mine["label"] if classes and mine is not None else None

    words = (
        "model",
        "prompt",
        "negative",
        "label",
        "guidance",
        "height",
        "width",
        "dtype",
        "variant",
        "seed",
    )
    facts = {name: getattr(arguments, name) for name in words if getattr(arguments, name) is not None}
    if lines is not None:
        facts["prompt"] = f"{len(lines)} lines, sha256 {_digest(chr(10).join(lines))}"
    return Maker(make, {**facts, "table": _digest(table.to_json()), "solver": table.solver}, table)


def read_prompts(file: Path) -> list[str]:
    """A prompt a line."""
    if not file.is_file():
        raise FileNotFoundError(f"prompts: there is no file {file}")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    if not lines or not all(lines):
        raise ValueError(f"{file} must have a prompt in every line, and at least one")
    return lines


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
