"""``fewstep eval fid --samples out/ --ref stats.npz``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import parser_for
from .eval_arguments import add_features, extractor_of, say_skipped
from .maker import add_maker, maker

if TYPE_CHECKING:
    from ..eval.ranks import Ranks
    from ..eval.sources import Images


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "eval fid",
        "Distances between samples and a reference, each printed with the protocol it was measured under.\n\n"
        "  fewstep eval fid --samples out/ --ref stats.npz --features inception\n"
        "  fewstep eval fid --samples out/ --ref digits --metrics fd,kid,prdc\n"
        "  fewstep eval fid --model digits --steps 8 --count 2000 --ref digits\n"
        "  torchrun --nproc_per_node=8 -m fewstep eval fid --model path/to/pipeline --count 50000 --ref stats.npz "
        "--features inception\n\n"
        "Samples of --model are kept, so a run that was killed goes on. Options of the solver are flags too.",
    )
    parser.add_argument("--samples", help="a folder, a .zip or an .npz of images, or digits")
    add_maker(parser, "--model")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the samples of --model, which is gone on with (default: samples/..)",
    )
    parser.add_argument(
        "--ref",
        required=True,
        help="statistics (.npz of fewstep, EDM, pytorch-fid, clean-fid, ADM; .pkl of EDM2), or images as for --samples",
    )
    parser.add_argument(
        "--metrics",
        default="fd",
        help="some of fd, fd-infinity, fd-by-class, kid, kid-full, is, prdc, cmmd, mmd, sw2 (default: fd, which is "
        "FID with --features inception)",
    )
    parser.add_argument("--jackknife", type=int, metavar="GROUPS", help="a standard error for fd")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON too")
    add_features(parser)
    arguments, rest = parser.parse_known_args(argv)
    if (arguments.samples is None) == (arguments.model is None):
        raise ValueError("say either --samples, which are there, or --model, which makes them")
    if rest and arguments.model is None:
        raise ValueError(f"unknown argument {rest[0]!r}")

    from ..eval import ranks as processes
    from ..eval.files import written_aside
    from ..eval.measure import METRICS, MOMENTS_DO, measure
    from ..eval.protocol import FEATURES
    from ..eval.seen import reference_of, see

    metrics = [name for name in arguments.metrics.split(",") if name]
    if wrong := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"--metrics must be among {', '.join(METRICS)}, got {', '.join(wrong) or 'none'}")
    ranks = processes.start(arguments.device or "auto")
    try:
        extractor = extractor_of(arguments, ranks)
        keep = arguments.jackknife is not None or any(name not in MOMENTS_DO for name in metrics)
        options = {"batch": arguments.batch, "ranks": ranks, "progress": True}
        reference = reference_of(arguments.ref, extractor, keep, **options)
        samples = arguments.samples if arguments.model is None else _made(arguments, rest, ranks)
        seen = see(samples, extractor, arguments.num, keep, skip_bad=arguments.skip_bad, **options)
        say_skipped(seen, ranks)
        if not ranks.first:
            ranks.wait()  # to leave together: gloo may hang where one leaves long before the others
            return 0
        if unknown := reference.protocol.unknown([name for name in FEATURES if name != "rounding"]):
            print(
                f"note: {reference.name} says nothing of its {', '.join(unknown)}; taken to be as here",
                file=sys.stderr,
            )
        numbers = measure(seen, reference, metrics, arguments.jackknife)
        for number in numbers:
            print(number.line())
        if arguments.out is not None:
            with written_aside(arguments.out) as aside:
                aside.write_text(json.dumps([number.record() for number in numbers], indent=1) + "\n")
        ranks.wait()
    finally:
        processes.finish()
    return 0


def _made(arguments: argparse.Namespace, rest: list[str], ranks: Ranks) -> Images:
    from ..eval.generate import generate

    if arguments.num is None:
        raise ValueError(
            "--num is needed with --model: a distance says little without it (50000 is the custom)"
        )
    asked = maker(arguments, rest, ranks.device)
    folder = asked.folder if arguments.keep is None else arguments.keep
    made = generate(
        asked.make, folder, arguments.num, asked.told, batch=arguments.batch, ranks=ranks, progress=True
    )
    if ranks.first:
        print(f"{arguments.num} samples, {asked.table.calls} calls each: {folder}", file=sys.stderr)
    return made
