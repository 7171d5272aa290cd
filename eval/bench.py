"""Timing things against each other: interleaved in one run, compared round by round.

A clock's absolute reading drifts with the machine's load and temperature; the ratio of two readings taken
one after the other hardly does. So the callables run A B C A B C ..., and what is reported of B against A
is the median over rounds of time(B) / time(A), not the ratio of their medians.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..version import __version__
from .checks import whole_number
from .files import written_aside

QUANTILES = (0.1, 0.25, 0.75, 0.9)


def compare(
    fns: Mapping[str, Callable[[], Any]],
    repeats: int = 30,
    warmup: int = 3,
    inner: int = 1,
    baseline: str | None = None,
    clock: str = "wall",
) -> dict[str, Any]:
    """Times callables without arguments against each other; returns plain data, ready for `save`.

    repeats: rounds that count. warmup: rounds before them, run alike. inner: calls a reading, for what is
    too short to time alone. baseline: the name that ratios refer to (the first one by default).
    clock: "wall" reads the time between two synchronisations (what a user waits; any device); "events"
    reads CUDA events (what the GPU's stream takes, without the waiting for it).

    In the result, `names[name]` has `median` and quantiles `q10 .. q90` in seconds a call, and the
    same of `ratio` to the baseline, round by round; `rounds[name]` has every reading, and `order` the
    sequence of names in which they were taken, warm-up first.

    >>> result = compare({"short": lambda: sum(range(100)), "long": lambda: sum(range(2000))}, repeats=5)
    >>> result["order"][:4], result["names"]["short"]["ratio"]["median"]
    (['short', 'long', 'short', 'long'], 1.0)
    >>> result["names"]["long"]["ratio"]["median"] > 2
    True
    """
    if not isinstance(fns, Mapping) or not fns or not all(callable(fn) for fn in fns.values()):
        raise ValueError(f"fns is {fns!r}; expected a dict of names to callables without arguments")
    repeats, inner = whole_number(repeats, "repeats"), whole_number(inner, "inner")
    warmup = whole_number(warmup, "warmup", 0)
    baseline = next(iter(fns)) if baseline is None else baseline
    if baseline not in fns:
        raise ValueError(f"baseline is {baseline!r}; expected one of {sorted(fns)}")
    if clock not in ("wall", "events"):
        raise ValueError(f"clock is {clock!r}; expected 'wall' or 'events'")
    if clock == "events" and not torch.cuda.is_available():
        raise ValueError("clock is 'events' but there is no CUDA device here; expected 'wall'")
    read = _read_events if clock == "events" else _read_wall
    rounds: dict[str, list[float]] = {name: [] for name in fns}
    order = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(warmup + repeats):
            for name, fn in fns.items():
                seconds = read(fn, inner)
                order.append(name)
                if r >= warmup:
                    rounds[name].append(seconds)
    finally:
        if collecting:
            gc.enable()
    names = {}
    for name, seconds in rounds.items():
        # A clock too coarse for the work reads 0: such a round says nothing about a ratio.
        ratios = [s / base for s, base in zip(seconds, rounds[baseline]) if base > 0]
        if not ratios:
            raise ValueError(
                f"inner is {inner}, with which the clock reads 0 s for {baseline!r}; expected more"
            )
        names[name] = {**_spread(seconds), "ratio": _spread(ratios)}
    settings = {"repeats": repeats, "warmup": warmup, "inner": inner, "baseline": baseline, "clock": clock}
    return {**settings, "names": names, "rounds": rounds, "order": order}


def table(result: Mapping[str, Any]) -> str:
    """The outcome of `compare` as lines of text, one a name.

    >>> spread = {"median": 2e-3, "q10": 1.9e-3, "q25": 2e-3, "q75": 2e-3, "q90": 2.2e-3}
    >>> ratio = {"median": 1.0, "q10": 1.0, "q25": 1.0, "q75": 1.0, "q90": 1.0}
    >>> print(table({"baseline": "ours", "names": {"ours": {**spread, "ratio": ratio}}}))
    name     median       10 %       90 %  / ours
    ours   2.000 ms   1.900 ms   2.200 ms   1.000  (1.000 .. 1.000)
    """
    head = f"/ {result['baseline']}"
    wide, narrow = max([4, *map(len, result["names"])]), max(6, len(head))
    lines = [f"{'name':<{wide}} {'median':>10} {'10 %':>10} {'90 %':>10}  {head:>{narrow}}"]
    for name, row in result["names"].items():
        times = " ".join(f"{_with_unit(row[q]):>10}" for q in ("median", "q10", "q90"))
        middle, low, high = (row["ratio"][q] for q in ("median", "q10", "q90"))
        lines.append(f"{name:<{wide}} {times}  {middle:>{narrow}.3f}  ({low:.3f} .. {high:.3f})")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What a number depends on: device, versions, threads, commit. No host names and no paths.

    >>> environment()["fewstep"] == __version__
    True
    """
    cuda = torch.cuda.is_available()
    versions = {name: _version(name) for name in ("triton", "diffusers", "xformers", "numpy")}
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "devices": torch.cuda.device_count() if cuda else 0,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
        "torch": str(torch.__version__),  # with its build: 2.11.0+cu130 where the registry only says 2.11.0
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "fewstep": __version__,
        **_commit(),
    }


def save(path: str | os.PathLike, results: Any) -> None:
    """Writes {"environment": ..., "results": ...} as JSON; whole or not at all.

    Arrays and scalars of numpy and torch become lists and numbers; NaN and infinity are refused.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     save(Path(tmp) / "a.json", {"fd": torch.tensor(0.5)})
    ...     json.loads((Path(tmp) / "a.json").read_text())["results"]
    {'fd': 0.5}
    """
    whole = {"environment": environment(), "results": results}
    try:
        text = json.dumps(whole, indent=1, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as err:
        expected = "finite numbers, strings, lists and dicts"
        raise ValueError(f"results cannot be written as JSON ({err}); expected {expected}") from err
    with written_aside(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def _read_wall(fn: Callable[[], Any], inner: int) -> float:
    _synchronise()
    start = time.perf_counter()
    for _ in range(inner):
        fn()
    _synchronise()
    return (time.perf_counter() - start) / inner


def _read_events(fn: Callable[[], Any], inner: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / inner


def _synchronise() -> None:
    # A process that has not touched the GPU has nothing to wait for, and need not start CUDA to learn it.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), **{f"q{100 * q:.0f}": float(np.quantile(values, q)) for q in QUANTILES}}


def _with_unit(seconds: float) -> str:
    power = min(0, max(-3, math.floor(math.log10(seconds) / 3))) if seconds > 0 else 0
    return f"{seconds * 1000**-power:.3f} {('s', 'ms', 'us', 'ns')[-power]}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> dict[str, Any]:
    """The commit, where the package's folder is the root of a checkout, and whether files differ from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30)

    try:
        # An empty prefix says that this folder is the root, and not, say, a venv inside another repository.
        prefix = git("rev-parse", "--show-prefix")
        sha = git("rev-parse", "--verify", "HEAD")
        changed = git("diff", "--quiet", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}
    if prefix.returncode or prefix.stdout.strip() or sha.returncode:
        return {"commit": None, "changed": None}
    return {"commit": sha.stdout.strip(), "changed": changed.returncode != 0}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain data")
