"""``fewstep teleport-stats --data DATA --out FILE.npz``."""

from __future__ import annotations

from pathlib import Path

from .arguments import parser_for


def main(argv: list[str]) -> int:
    """Run the verb; the exit code."""
    parser = parser_for(
        "teleport-stats", "Gaussian statistics of a data set: fewstep.samplers.skip takes them."
    )
    parser.add_argument("--data", required=True, help="digits, an .npz of images, or a folder of pictures")
    parser.add_argument(
        "--rank",
        type=int,
        default=64,
        help="eigenvectors to keep (default: 64, or all where there are fewer)",
    )
    parser.add_argument(
        "--tail",
        default="mean",
        help="variance in all other directions: mean of what is left out, or zero (default: mean)",
    )
    parser.add_argument("--flip", action="store_true", help="count every image's mirror image too")
    parser.add_argument(
        "--by-class", action="store_true", help="a Gaussian a class, where the data have labels"
    )
    parser.add_argument("--out", type=Path, default=Path("stats.npz"), help="default: stats.npz")
    arguments = parser.parse_args(argv)

    from ..models import gaussian
    from ..models.image_data import image_batches

    def batches():
        for images, labels in image_batches(arguments.data):
            if arguments.by_class and labels is None:
                raise ValueError(f"--by-class needs labels, and {arguments.data} has none")
            yield (images, labels) if arguments.by_class else images

    if arguments.out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, got {arguments.out}")
    first = next(iter(image_batches(arguments.data, size=1)), None)
    rank = arguments.rank if first is None else min(arguments.rank, first[0].numel())
    stats = gaussian(batches(), rank=rank, tail=arguments.tail, flip=arguments.flip)
    stats.save(arguments.out)
    kept = stats.values.sum(1)
    left = (stats.dim - stats.rank) * stats.rest
    print(
        f"{sum(stats.count)} images of {' x '.join(map(str, stats.shape))}, rank {stats.rank}"
        f"{f', {stats.classes} classes' if stats.classes > 1 else ''}: {arguments.out}"
    )
    if arguments.tail == "mean" and bool((kept > 0).all()):
        print(
            f"{100 * float((kept / (kept + left)).mean()):.2f} % of the variance lies in the directions kept"
        )
    return 0
