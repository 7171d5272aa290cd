"""``fewstep bench kernels``."""

from __future__ import annotations

from .arguments import parser_for


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "bench", "Time what runs here. On a CPU there are only the references, on small shapes."
    )
    parser.add_argument("what", choices=["kernels"])
    parser.add_argument(
        "--op", action="append", metavar="NAME", help="only this op (more than once for more)"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    parser.add_argument("--out", metavar="FILE.json", help="write the run, whole after every row")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the shares of the roofline")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after them (default: 8)")
    parser.add_argument("--repeats", type=int, default=20, help="interleaved rounds a case (default: 20)")
    modes = ["default", "max-autotune-no-cudagraphs", "off"]
    parser.add_argument("--compile", default="default", choices=modes, help="torch.compile's mode")
    arguments = parser.parse_args(argv)
    from ..eval import bench, bench_kernels

    result = bench_kernels.run(
        arguments.op, arguments.device, arguments.minutes, arguments.repeats, arguments.compile,
        lambda case: arguments.case in case.name, arguments.out, lambda text: print(text, flush=True),
    )  # fmt: skip
    print(f"{result['runs']}; a copy moves {result['bandwidth'] / 1e9:.1f} GB/s")
    if result["left_out"]:
        print(f"no time was left for {len(result['left_out'])} rows")
    if arguments.out:
        bench.save(arguments.out, result)
    if arguments.plot:
        bench_kernels.plot(result, arguments.plot)
    return 0 if all(row.get("right") for row in result["rows"]) else 1
