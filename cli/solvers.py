"""``fewstep solvers``."""

from __future__ import annotations

from .arguments import parser_for


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for("solvers", "List the solvers. Orders are the theory's, and tested.")
    parser.add_argument("name", nargs="?", help="show the documentation of one")
    arguments = parser.parse_args(argv)
    from ..samplers import catalogue

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
