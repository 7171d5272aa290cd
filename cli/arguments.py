"""What several verbs read from their command lines: a grid and its steps, and a solver's own options as flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def parser_for(name: str, description: str) -> argparse.ArgumentParser:
    """A parser that names the verb as its program."""
    return argparse.ArgumentParser(
        prog=f"fewstep {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def solver_options(solver: Callable, words: list[str]) -> dict[str, Any]:
    """``--order 3 --variable lam`` as the solver's own options, each read as its default's type."""
    entry = solver.entry  # type: ignore[attr-defined]
    options: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") or key not in entry.options:
            known = ", ".join(f"--{name}" for name in entry.options) or "none"
            raise ValueError(f"unknown argument {word!r}; the options of {entry.name} are: {known}")
        if not equals:
            if not queue:
                raise ValueError(f"{word} needs a value")
            value = queue.pop(0)
        options[key] = _read(word, value, entry.options[key])
    return options


def _read(word: str, text: str, default: Any) -> Any:
    """``text`` as the type of ``default``; where there is none to go by, as the number it spells, or else as it is."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{word} must be true or false, got {text!r}")
        return text.lower() == "true"
    kinds = (type(default),) if isinstance(default, (int, float)) else (int, float) if default is None else ()
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            if default is not None:
                raise ValueError(
                    f"{word} must be {'an integer' if kind is int else 'a number'}, got {text!r}"
                ) from None
    return text


def times_of(path, solver: Callable, arguments: argparse.Namespace, options: dict[str, Any]):
    """The times of the grid asked for: so many steps, or as many as so many calls allow."""
    from ..samplers import catalogue, grids

    grid = catalogue.find_grid(arguments.grid)
    if arguments.calls is not None:
        return grids.for_calls(solver, path, arguments.calls, grid=grid, **options)
    return grid(path, arguments.steps)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_grid(parser: argparse.ArgumentParser) -> None:
    """``--grid`` and either ``--steps`` or ``--calls``."""
    parser.add_argument("--grid", default="vp", help="where the steps lie (default: vp)")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--steps", type=int, default=10, help="number of steps (default: 10)")
    many.add_argument(
        "--calls", type=int, help="number of network calls instead: as many steps as they allow"
    )
