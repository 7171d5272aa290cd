"""``fewstep bench kernels``, ``fewstep bench solvers``, ``fewstep bench pipelines FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_device, parser_for

MODES = ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "off"]


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "bench",
        "Time what runs here, against torch and diffusers, in one run.\n\n"
        "  fewstep bench kernels                                 every kernel beside eager torch and torch.compile\n"
        "  fewstep bench solvers                                 a step outside the network, beside diffusers' own\n"
        '  fewstep bench pipelines path/to/sdxl --prompt "a fox" a whole call: diffusers, compiled, ours, captured',
    )
    parser.add_argument("what", choices=["kernels", "solvers", "pipelines"])
    parser.add_argument("folder", nargs="?", help="of pipelines: what diffusers saved")
    parser.add_argument("--op", action="append", metavar="NAME", help="of kernels: only this op (or several)")
    parser.add_argument(
        "--case", default="", metavar="TEXT", help="of kernels: only cases whose name holds TEXT"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="of kernels: begin nothing after them (default: 8)"
    )
    parser.add_argument("--prompt", action="append", help="of pipelines of texts")
    parser.add_argument("--steps", type=int, default=10, help="of solvers and pipelines (default: 10)")
    parser.add_argument("--out", metavar="FILE.json", help="write the run")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it")
    add_device(parser)
    parser.add_argument("--repeats", type=int, default=20, help="interleaved rounds (default: 20)")
    parser.add_argument(
        "--compile", choices=MODES, help="torch.compile's mode (default: default; of pipelines on a CPU off)"
    )
    arguments = parser.parse_args(argv)
    if (arguments.what == "pipelines") != (arguments.folder is not None):
        raise ValueError(
            "bench pipelines needs a folder that diffusers saved; bench kernels and solvers take none"
        )
    return {"kernels": _kernels, "solvers": _solvers, "pipelines": _pipelines}[arguments.what](arguments)


def _kernels(arguments: argparse.Namespace) -> int:
    from ..eval import bench, bench_kernels

    result = bench_kernels.run(
        arguments.op, arguments.device, arguments.minutes, arguments.repeats, arguments.compile or "default",
        lambda case: arguments.case in case.name, arguments.out, _say,
    )  # fmt: skip
    print(f"{result['runs']}; a copy moves {result['bandwidth'] / 1e9:.1f} GB/s")
    if result["left_out"]:
        print(f"no time was left for {len(result['left_out'])} rows")
    if arguments.out:
        bench.save(arguments.out, result)
    if arguments.plot:
        bench_kernels.plot(result, arguments.plot)
    return 0 if all(row.get("right") for row in result["rows"]) else 1


def _solvers(arguments: argparse.Namespace) -> int:
    from ..eval import bench, bench_solvers

    result = bench_solvers.measure(arguments.steps, arguments.repeats, device=_device(arguments))
    print(bench_solvers.show(result))
    _keep(arguments, bench, bench_solvers, result)
    return 0


def _pipelines(arguments: argparse.Namespace) -> int:
    from ..eval import bench, bench_pipelines

    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            f"bench pipelines needs diffusers ({error}): pip install 'fewstep[diffusers]'"
        ) from error
    if not (Path(arguments.folder) / "model_index.json").is_file():
        raise ValueError(
            f"{arguments.folder} has no model_index.json: expected a folder that diffusers saved"
        )
    device = _device(arguments)
    pipe = DiffusionPipeline.from_pretrained(arguments.folder).to(device)
    call = {"prompt": arguments.prompt} if arguments.prompt else {}
    mode = arguments.compile or ("default" if device == "cuda" else "off")
    result = bench_pipelines.measure(pipe, call, arguments.steps, arguments.repeats, mode, _say)
    _keep(arguments, bench, bench_pipelines, result)
    return 0


def _device(arguments: argparse.Namespace) -> str:
    import torch

    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _keep(arguments: argparse.Namespace, bench, module, result) -> None:
    if arguments.out:
        bench.save(arguments.out, result)
    if arguments.plot:
        module.plot(result, arguments.plot)


def _say(text: str) -> None:
    print(text, flush=True)
