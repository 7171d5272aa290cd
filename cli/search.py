"""``fewstep search MODEL --nfe N``."""

from __future__ import annotations

import sys
from pathlib import Path

from .arguments import parser_for
from .model import add_model, told


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "search",
        "Search the times and decisions of every step that bring a model's samples nearest to its\n"
        "converged ones. An interrupted search goes on where it was.",
    )
    add_model(parser)
    parser.add_argument("--nfe", "--calls", type=int, required=True, help="network calls of the solver")
    parser.add_argument(
        "--budget", type=int, default=5000, help="network calls of the search (default: 5000)"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples in each of them (default: 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("table.json"), help="(default: table.json)")
    arguments = parser.parse_args(argv)

    import torch

    from ..samplers import search as find

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    d, cond, _ = told(arguments, device)
    state = arguments.out.with_name(f"{arguments.out.name}.search")
    table = find(
        d, arguments.nfe, budget=arguments.budget, batch=arguments.batch, seed=arguments.seed, file=state,
        cond=cond, progress=sys.stderr.isatty(),
    )  # fmt: skip
    table.save(arguments.out)
    state.unlink()
    found = table.options["search"]
    print("\n".join(f"{time:8.4g}  {step}" for time, step in zip(table.times, table.options["steps"])))
    print(
        f"on fresh noise its error is {found['fresh_error']:.4g}, that of {found['by_hand']}, the best made by hand, "
        f"{found['fresh_error_by_hand']:.4g}: {arguments.out}"
    )
    return 0
