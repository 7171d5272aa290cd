"""A benchmark of many cells: each is kept when it is done, and a run that was broken off goes on with what is missing.

A benchmark says its cells, in the order of their worth, and how the table is made of those that are there:

>>> from functools import partial
>>> def square(x, known): return x * x
>>> def jobs(): return [(f"square|{x}", partial(square, x)) for x in range(3)]
>>> results = Path("squares.json")
>>> command("Squares.", results, jobs(), lambda known: f"{len(known)} cells", argv=[])
3 cells
>>> json.loads(results.read_text())["results"]["square|2"]
4
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from . import bench
from .files import written_aside

Known = dict[str, Any]
Job = Callable[[Known], Any]  # of the cells that are there already
EVERY = 10  # seconds between two writings


def command(
    description: str,
    results: Path,
    jobs: Iterable[tuple[str, Job]],
    tables: Callable[[Known], str],
    argv: Sequence[str] | None = None,
    at_once: int = 1,
) -> None:
    """The benchmark's command: fill in what is missing, write ``results`` and its .md, print the tables.

    ``at_once`` cells are made by processes of their own, if it is more than 1: a job is then a ``functools.partial`` of
    a function of the script.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of the cells to make")
    parser.add_argument("--jobs", type=int, default=at_once, help="cells at once, a thread each")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = json.loads(results.read_text())["results"] if results.exists() else {}
    if not arguments.table:
        wanted = (
            (name, job)
            for name, job in jobs
            if name not in known and (not arguments.only or any(word in name for word in arguments.only))
        )
        fill(known, wanted, lambda: _write(results, known, tables), arguments.seconds, arguments.jobs)
    print(tables(known))


def fill(
    known: Known,
    wanted: Iterable[tuple[str, Job]],
    keep: Callable[[], None],
    seconds: float = math.inf,
    at_once: int = 1,
) -> None:
    """Put the answers of jobs into ``known``; ``keep`` is called now and then, and in the end, come what may."""
    begun = written = time.monotonic()
    try:
        for name, answer in _answers(known, wanted, begun + seconds, at_once):
            known[name] = answer
            if time.monotonic() - written > EVERY:
                keep()
                written = time.monotonic()
    finally:
        keep()


def _answers(known: Known, wanted: Iterable[tuple[str, Job]], until: float, at_once: int):
    if at_once == 1:
        for name, job in wanted:
            if time.monotonic() > until:
                return
            yield name, job(known)
        return
    with ProcessPoolExecutor(at_once, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        names: dict[Future, str] = {pool.submit(_until, until, job, known): name for name, job in wanted}
        try:
            for done in as_completed(names):
                for answer in done.result():
                    yield names[done], answer
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _until(until: float, job: Job, known: Known) -> list[Any]:
    """The answer, or none where it is too late to begin."""
    return [] if time.monotonic() > until else [job(known)]


def _write(results: Path, known: Known, tables: Callable[[Known], str]) -> None:
    bench.save(results, known)
    with written_aside(results.with_suffix(".md")) as file:
        file.write_text(tables(known))
