"""``fewstep eval stats --data path/ --out stats.npz``."""

from __future__ import annotations

from pathlib import Path

from .arguments import parser_for
from .eval_arguments import add_features, extractor_of, say_skipped


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "eval stats",
        "Statistics of a reference, mu and sigma as every tool reads them, with the protocol beside them.\n\n"
        "  fewstep eval stats --data cifar10-32x32.zip --features inception --out cifar10.npz",
    )
    parser.add_argument("--data", required=True, help="a folder, a .zip or an .npz of images, or digits")
    parser.add_argument("--out", type=Path, default=Path("stats.npz"), help="default: stats.npz")
    parser.add_argument(
        "--keep-features",
        action="store_true",
        help="store every image's features too, as KID, precision, CMMD and the like need (50,000 of 2,048: 400 MB)",
    )
    add_features(parser)
    arguments = parser.parse_args(argv)

    from ..eval import ranks as processes
    from ..eval.seen import see
    from ..eval.statistics_files import Statistics, write_statistics

    if arguments.out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, got {arguments.out}")
    ranks = processes.start(arguments.device or "auto")
    try:
        extractor = extractor_of(arguments, ranks)
        seen = see(
            arguments.data,
            extractor,
            arguments.num,
            arguments.keep_features,
            arguments.batch,
            arguments.skip_bad,
            ranks,
            progress=True,
        )
        say_skipped(seen, ranks)
        if ranks.first:
            features, labels = (seen.features, seen.labels) if arguments.keep_features else (None, None)
            write_statistics(arguments.out, Statistics(seen.stats.finish(), seen.protocol, features, labels))
            print(f"{arguments.out}: {seen.protocol.line()}")
        ranks.wait()
    finally:
        processes.finish()
    return 0
