"""``fewstep search MODEL --nfe N``."""

from __future__ import annotations

import sys
from pathlib import Path

from .arguments import add_device, parser_for
from .model import add_model, told


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "search",
        "Search the times and decisions of every step that bring a model's samples nearest to its\n"
        "converged ones, and then, with --metric, nearest to data. An interrupted search goes on where it was.",
    )
    add_model(parser)
    add_device(parser)
    parser.add_argument("--nfe", "--calls", type=int, required=True, help="network calls of the solver")
    parser.add_argument(
        "--budget", type=int, help="network calls of the search (default: 5000, with --metric 20000)"
    )
    parser.add_argument(
        "--metric", choices=("fd", "kid"), help="digits: distance of classifier features to the data's"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples in each of them (default: 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("table.json"), help="(default: table.json)")
    arguments = parser.parse_args(argv)

    import torch

    from ..eval.digit_metrics import digit_metric
    from ..samplers import search as find

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    d, cond, _ = told(arguments, device)
    if arguments.metric and d.shape != (1, 8, 8):
        raise ValueError(
            f"--metric knows digits alone, not samples {d.shape}: from Python, search(d, metric=f) takes any"
        )
    metric = digit_metric(arguments.metric) if arguments.metric else None
    budget = arguments.budget or (20_000 if metric else 5000)
    state = arguments.out.with_name(f"{arguments.out.name}.search")
    table = find(
        d, arguments.nfe, budget=budget, batch=arguments.batch, seed=arguments.seed, file=state, cond=cond,
        metric=metric, progress=sys.stderr.isatty(),
    )  # fmt: skip
    table.save(arguments.out)
    state.unlink()
    found = table.options["search"]
    print("\n".join(f"{time:8.4g}  {step}" for time, step in zip(table.times, table.options["steps"])))
    print(
        f"on fresh noise its error is {found['fresh_error']:.4g}, that of {found['by_hand']}, the best made by hand, "
        f"{found['fresh_error_by_hand']:.4g}: {arguments.out}"
    )
    if metric:
        print(
            f"on fresh noise its {arguments.metric} is {found['metric_value']:.4g}, that of the first stage's winner "
            f"{found['metric_value_first_stage']:.4g}, of {found['by_hand']} {found['metric_value_by_hand']:.4g}"
        )
    return 0
