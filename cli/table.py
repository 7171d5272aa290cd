"""``fewstep table SOLVER ...``."""

from __future__ import annotations

from pathlib import Path

from .arguments import add_grid, parser_for, solver_options, times_of


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for("table", "Print the coefficients of a solver. Its options are given as flags too.")
    parser.add_argument("solver", help="fewstep solvers lists them")
    parser.add_argument(
        "--path",
        default="vp_linear",
        help="vp_linear, vp_cosine, vp_discrete, edm or flow (default: vp_linear)",
    )
    add_grid(parser)
    parser.add_argument(
        "--plot",
        nargs="?",
        type=Path,
        const=Path("table.png"),
        help="draw it, into table.png or the file named",
    )
    parser.add_argument("--out", type=Path, help="save it as JSON, for Table.load")
    arguments, rest = parser.parse_known_args(argv)
    from ..models import paths
    from ..samplers import catalogue

    solver = catalogue.find(arguments.solver)
    options = solver_options(solver, rest)
    path = paths.by_name(arguments.path)
    made = solver(path, times_of(path, solver, arguments, options), **options)
    print(made)
    if arguments.plot:
        made.plot(arguments.plot)
        print(f"drawn: {arguments.plot}")
    if arguments.out:
        made.save(arguments.out)
        print(f"saved: {arguments.out}")
    return 0
