"""The ``fewstep`` command: a thin skin over the package. Heavy imports wait until a verb needs them.

fewstep sample digits --solver deis --order 3 --steps 10 --num 64 --seed 0 --out samples.png
fewstep solvers
fewstep table deis --steps 6 --path vp_linear
fewstep search digits --nfe 5 --out table.json
fewstep teacher digits-flow
fewstep demo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {}


def verb(summary: str):
    """Make ``def some_name(argv)`` the command ``fewstep some-name``."""

    def mark(function: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        VERBS[function.__name__.replace("_", "-")] = (summary, function)
        return function

    return mark


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; bad input ends with one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: fewstep VERB ...   (fewstep VERB --help says more)\n")
        print("\n".join(f"  {name:<15} {summary}" for name, (summary, _) in VERBS.items()))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .version import __version__

        print(f"fewstep {__version__}")
        return 0
    if arguments[0] not in VERBS:
        return _fail(f"the verb must be one of {', '.join(VERBS)}, got {arguments[0]!r}")
    try:
        return VERBS[arguments[0]][1](arguments[1:])
    except (ValueError, TypeError, FileExistsError, FileNotFoundError, ImportError) as error:
        return _fail(str(error))
    except BrokenPipeError:  # fewstep solvers | head
        sys.stderr.close()
        return 0


def _fail(message: str) -> int:
    print(f"fewstep: {message}", file=sys.stderr)
    return 2


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"fewstep {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _solver_options(solver: Callable, words: list[str]) -> dict[str, Any]:
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


def _times(path, solver: Callable, arguments: argparse.Namespace, options: dict[str, Any]):
    from .samplers import catalogue, grids

    grid = catalogue.find_grid(arguments.grid)
    if arguments.calls is not None:
        return grids.for_calls(solver, path, arguments.calls, grid=grid, **options)
    return grid(path, arguments.steps)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grid", default="vp", help="where the steps lie (default: vp)")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--steps", type=int, default=10, help="number of steps (default: 10)")
    many.add_argument(
        "--calls", type=int, help="number of network calls instead: as many steps as they allow"
    )


@verb("samples from a model, as one picture, an .npz, or a folder of PNGs")
def sample(argv: list[str]) -> int:
    """``fewstep sample MODEL ...``."""
    parser = _parser(
        "sample", "Sample a model. Options of the solver (fewstep solvers lists them) are given as flags too."
    )
    parser.add_argument(
        "model", help="digits-edm, digits-vp, digits-flow, a checkpoint, or a diffusers folder"
    )
    parser.add_argument("--solver", default="abm", help="fewstep solvers lists them (default: abm)")
    parser.add_argument("--table", type=Path, help="a saved table instead of --solver, --grid and --steps")
    _add_grid(parser)
    parser.add_argument("--num", type=int, default=64, help="number of samples (default: 64)")
    parser.add_argument(
        "--batch", type=int, default=256, help="samples at once; changes nothing but memory (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", type=int, help="class of all samples (default: every class in turn)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="scale of classifier-free guidance: 1 is none, 0 forgets the class (default: 1)",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help=".png, .npz, or a new folder (default: samples.png)",
    )
    arguments, rest = parser.parse_known_args(argv)

    import torch

    from .eval import images
    from .models import in_blocks, load
    from .samplers import Table, catalogue, cfg
    from .samplers import sample as draw
    from .samplers.noise import starting_noise

    if arguments.num < 1 or arguments.batch < 1:
        raise ValueError(f"--num and --batch must be positive, got {arguments.num} and {arguments.batch}")
    if arguments.out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"--out must end in .png or .npz, or name a folder, got {arguments.out}")
    solver = catalogue.find(arguments.solver)
    if arguments.table is not None and rest:
        raise ValueError(f"--table is a table as it is: it takes no {' '.join(rest)}")
    options = _solver_options(solver, rest)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    d = load(arguments.model).to(device)
    if device.type == "cpu":
        d = in_blocks(d, 16)  # the same bits whatever --batch and --num
    if arguments.table is not None:
        table = Table.load(arguments.table)
    else:
        table = solver(d.path, _times(d.path, solver, arguments, options), **options)
    classes = getattr(d.net, "null_label", None)  # the label after the last class
    if arguments.label is not None and not (classes and 0 <= arguments.label < classes):
        raise ValueError(
            f"--label must lie in 0 .. {classes - 1}" if classes else f"{arguments.model} takes no --label"
        )
    if arguments.guidance != 1:
        if not classes:
            raise ValueError(f"--guidance needs a model of classes, and {arguments.model} has none")
        d = cfg(d, arguments.guidance)
    plan = table.on(d, device)
    made, labels = [], []
    for first in _progress(range(0, arguments.num, arguments.batch)):
        ids = torch.arange(first, min(first + arguments.batch, arguments.num), device=device)
        label = ids % classes if classes else ids
        if arguments.label is not None:
            label = torch.full_like(ids, arguments.label)
        cond = {"label": label} if classes else {}
        noise = starting_noise(arguments.seed, ids, d.shape)
        made.append(draw(d, noise, plan, cond=cond, seed=arguments.seed, ids=ids).cpu())
        labels.append(label.cpu())
    pictures = images.to_uint8(torch.cat(made))
    if arguments.out.suffix == ".png":
        columns = 10 if classes and arguments.label is None else None
        images.save_png(
            arguments.out, images.grid(pictures, columns=columns, scale=max(1, 32 // pictures.shape[-1]))
        )
    elif arguments.out.suffix == ".npz":
        images.save_npz(arguments.out, pictures, torch.cat(labels) if classes else None)
    else:
        images.save_folder(arguments.out, pictures)
    print(
        f"{arguments.num} samples of {arguments.model} by {table.solver}, {table.calls} calls each: {arguments.out}"
    )
    return 0


def _progress(steps: range):
    if len(steps) < 2 or not sys.stderr.isatty():
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, unit="batch")


@verb("lists every solver: options, calls a step, order of convergence, paper")
def solvers(argv: list[str]) -> int:
    """``fewstep solvers``."""
    parser = _parser("solvers", "List the solvers. Orders are the theory's, and tested.")
    parser.add_argument("name", nargs="?", help="show the documentation of one")
    arguments = parser.parse_args(argv)
    from .samplers import catalogue

    if arguments.name:
        import inspect

        found = catalogue.find(arguments.name)
        print(
            f"{arguments.name}{inspect.signature(found)}\n\n{inspect.getdoc(found)}\n\narXiv {found.entry.paper}"
        )
        return 0
    rows = [("solver", "calls a step", "order", "arXiv", "options")]
    for name, function in sorted(catalogue.solvers().items()):
        entry = function.entry
        options = ", ".join(
            f"{key}={getattr(value, '__name__', value)}" for key, value in entry.options.items()
        )
        rows.append((name, entry.calls, str(entry.order_of()), entry.paper, options))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[4])
    print(
        f"\nThe order is that of the default options, cold start included.\ngrids: {', '.join(catalogue.grid_names())}"
    )
    return 0


@verb("prints a solver's coefficients on a path, draws or saves them")
def table(argv: list[str]) -> int:
    """``fewstep table SOLVER ...``."""
    parser = _parser("table", "Print the coefficients of a solver. Its options are given as flags too.")
    parser.add_argument("solver", help="fewstep solvers lists them")
    parser.add_argument(
        "--path",
        default="vp_linear",
        help="vp_linear, vp_cosine, vp_discrete, edm or flow (default: vp_linear)",
    )
    _add_grid(parser)
    parser.add_argument(
        "--plot",
        nargs="?",
        type=Path,
        const=Path("table.png"),
        help="draw it, into table.png or the file named",
    )
    parser.add_argument("--out", type=Path, help="save it as JSON, for Table.load")
    arguments, rest = parser.parse_known_args(argv)
    from .models import paths
    from .samplers import catalogue

    solver = catalogue.find(arguments.solver)
    options = _solver_options(solver, rest)
    path = paths.by_name(arguments.path)
    made = solver(path, _times(path, solver, arguments, options), **options)
    print(made)
    if arguments.plot:
        made.plot(arguments.plot)
        print(f"drawn: {arguments.plot}")
    if arguments.out:
        made.save(arguments.out)
        print(f"saved: {arguments.out}")
    return 0


@verb("mean and covariance of a data set, for skipping the noisy steps")
def teleport_stats(argv: list[str]) -> int:
    """``fewstep teleport-stats --data DATA --out FILE.npz``."""
    parser = _parser("teleport-stats", "Gaussian statistics of a data set: fewstep.samplers.skip takes them.")
    parser.add_argument("--data", required=True, help="digits, an .npz of images, or a folder of pictures")
    parser.add_argument(
        "--rank",
        type=int,
        default=64,
        help="eigenvectors to keep (default: 64, or all where there are fewer)",
    )
    parser.add_argument(
        "--tail",
        default="mean",
        help="variance in all other directions: mean of what is left out, or zero (default: mean)",
    )
    parser.add_argument("--flip", action="store_true", help="count every image's mirror image too")
    parser.add_argument(
        "--by-class", action="store_true", help="a Gaussian a class, where the data have labels"
    )
    parser.add_argument("--out", type=Path, default=Path("stats.npz"), help="default: stats.npz")
    arguments = parser.parse_args(argv)

    from .models import gaussian
    from .models.image_data import image_batches

    def batches():
        for images, labels in image_batches(arguments.data):
            if arguments.by_class and labels is None:
                raise ValueError(f"--by-class needs labels, and {arguments.data} has none")
            yield (images, labels) if arguments.by_class else images

    if arguments.out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, got {arguments.out}")
    first = next(iter(image_batches(arguments.data, size=1)), None)
    rank = arguments.rank if first is None else min(arguments.rank, first[0].numel())
    stats = gaussian(batches(), rank=rank, tail=arguments.tail, flip=arguments.flip)
    stats.save(arguments.out)
    kept = stats.values.sum(1)
    left = (stats.dim - stats.rank) * stats.rest
    print(
        f"{sum(stats.count)} images of {' x '.join(map(str, stats.shape))}, rank {stats.rank}"
        f"{f', {stats.classes} classes' if stats.classes > 1 else ''}: {arguments.out}"
    )
    if arguments.tail == "mean" and bool((kept > 0).all()):
        print(
            f"{100 * float((kept / (kept + left)).mean()):.2f} % of the variance lies in the directions kept"
        )
    return 0


@verb("searches a solver for a model at a number of network calls, and saves its table")
def search(argv: list[str]) -> int:
    """``fewstep search MODEL --nfe N``."""
    parser = _parser("search", "Search the times and decisions of every step that bring a model's samples nearest to\n"
                               "its converged ones. An interrupted search goes on where it was.")  # fmt: skip
    parser.add_argument(
        "model", help="digits-edm, digits-vp, digits-flow, a checkpoint, or a diffusers folder"
    )
    parser.add_argument("--nfe", "--calls", type=int, required=True, help="network calls of the solver")
    parser.add_argument(
        "--budget", type=int, default=5000, help="network calls of the search (default: 5000)"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples in each of them (default: 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, default=Path("table.json"), help="(default: table.json)")
    arguments = parser.parse_args(argv)

    import torch

    from .models import load
    from .samplers import search as find

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    d = load(arguments.model).to(device)
    classes = getattr(d.net, "null_label", None)
    state = arguments.out.with_name(f"{arguments.out.name}.search")
    table = find(
        d, arguments.nfe, budget=arguments.budget, batch=arguments.batch, seed=arguments.seed, file=state,
        cond={"label": torch.arange(classes)} if classes else None, progress=sys.stderr.isatty(),
    )  # fmt: skip
    table.save(arguments.out)
    state.unlink()
    told = table.options["search"]
    print("\n".join(f"{time:8.4g}  {step}" for time, step in zip(table.times, table.options["steps"])))
    print(
        f"on fresh noise its error is {told['fresh_error']:.4g}, that of {told['by_hand']}, the best made by hand, "
        f"{told['fresh_error_by_hand']:.4g}: {arguments.out}"
    )
    return 0


@verb("trains one of the small teachers by its recipe")
def teacher(argv: list[str]) -> int:
    """``fewstep teacher RECIPE [key=value ...]``."""
    from .distill import teacher as training

    return training.main(argv)


@verb("samples the embedded teacher with several solvers: a picture and a table")
def demo(argv: list[str]) -> int:
    """``fewstep demo``."""
    from .eval import demo as show

    return show.main(argv)
