"""``fewstep search MODEL --nfe N``."""

from __future__ import annotations

import sys
from pathlib import Path

from .arguments import parser_for


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "search",
        "Search the times and decisions of every step that bring a model's samples nearest to its\n"
        "converged ones. An interrupted search goes on where it was.",
    )
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

    from ..models import load
    from ..samplers import search as find

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
