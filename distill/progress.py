"""One progress line for long work: tqdm on a terminal, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator


def track(
    total: int, title: str, every: int = 250, quiet: bool = False
) -> Iterator[tuple[int, Callable[..., None]]]:
    """Yield (step, say) for each step; ``say(loss=0.1)`` sets the numbers shown beside it.

    >>> for step, say in track(2, "demo", every=2): say(loss=0.5)   # doctest: +SKIP
    demo 2/2 loss=0.5 (0 s)
    """
    shown: dict[str, float] = {}
    if quiet:
        yield from ((step, shown.update) for step in range(total))
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(range(total), desc=title, unit="step")

        def on_bar(**numbers: float) -> None:
            bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()}, refresh=False)

        for step in bar:
            yield step, on_bar
        return
    start = time.monotonic()
    for step in range(total):
        yield step, shown.update
        if (step + 1) % every == 0 or step + 1 == total:
            numbers = " ".join(f"{k}={v:.4g}" for k, v in shown.items())
            print(
                f"{title} {step + 1}/{total} {numbers} ({time.monotonic() - start:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
