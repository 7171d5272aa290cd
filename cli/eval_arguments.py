"""What the verbs of ``fewstep eval`` share: which features, of how many images, on which device and ranks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_device

if TYPE_CHECKING:
    from ..eval.features import Extractor
    from ..eval.ranks import Ranks
    from ..eval.seen import Seen


def add_features(parser: argparse.ArgumentParser) -> None:
    """The flags that ``extractor_of`` reads, and those of reading images."""
    parser.add_argument(
        "--features",
        default="digits",
        help="digits, inception, inception-64/-192/-768, dinov2 or clip (default: digits)",
    )
    parser.add_argument("--weights", type=Path, help="a file of weights; else environment, cache, download")
    parser.add_argument(
        "--resize",
        help="tensorflow (torch-fidelity, EDM), pytorch (pytorch-fid), clean (clean-fid), bicubic, pillow or none",
    )
    parser.add_argument("--no-download", action="store_true", help="never fetch weights")
    # torchrun of Python 3.11 and older takes --num, wherever it stands, for the start of its own --numa-binding.
    parser.add_argument(
        "--num", "--count", type=int, help="the first so many images (default: all); --count under torchrun"
    )
    parser.add_argument("--batch", type=int, default=64, help="images at once (default: 64)")
    add_device(parser)
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out images that cannot be read, and say how many"
    )


def extractor_of(arguments: argparse.Namespace, ranks: Ranks) -> Extractor:
    """The extractor asked for; where there are ranks, the first one fetches the weights and the others follow."""
    from ..eval.features import extractor

    def build() -> Extractor:
        download = not arguments.no_download
        return extractor(arguments.features, arguments.weights, arguments.resize, ranks.device, download)

    if ranks.first:
        built = build()
        ranks.wait()
    else:
        ranks.wait()
        built = build()
    if ranks.first and not built.published:
        print(f"note: the weights are not the published ones (sha256 {built.weights[:12]})", file=sys.stderr)
    return built


def say_skipped(seen: Seen, ranks: Ranks) -> None:
    """How many images were left out, and the first of them."""
    if seen.skipped and ranks.first:
        named = ", ".join(seen.skipped[:5]) + (", ..." if len(seen.skipped) > 5 else "")
        print(f"note: left out, since they could not be read: {len(seen.skipped)} ({named})", file=sys.stderr)
