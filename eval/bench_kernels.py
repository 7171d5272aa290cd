"""Every op's cases, timed beside its torch reference, torch.compile and rivals, against what the memory can do.

Each row first compares every provider with the reference in float64, then times all of them interleaved in one run. On
a GPU two times are read: of the device, from a CUDA graph of calls on arguments that change so that none is in the
cache, and of a single call from Python. ``roofline`` is the share of the copy bandwidth, measured in the same run, that
reaching each tensor once would need; for what multiplies matrices ``tflops`` says more.

    >>> found = run(["philox"], "cpu", repeats=1, wanted=lambda case: case.name == "one")
    >>> found["rows"][0]["op"], found["rows"][0]["right"]
    ('philox', True)
"""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..kernels import cases
from ..kernels.cases import Case
from . import bench

CACHE = 192 * 2**20  # bytes: more than any cache of today's holds
Fn = Callable[[], Any]


def run(
    ops: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    minutes: float = 8.0,
    repeats: int = 20,
    compile_mode: str = "default",
    wanted: Callable[[Case], bool] = lambda case: True,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """{"bandwidth", "device", "driver", "rows", "left_out"}: saved after every row if ``out`` is given.

    Args:
        ops: names of files of ``kernels/``; all by default.
        minutes: no case begins after them.
        compile_mode: of ``torch.compile``; "off" leaves it out.
        wanted: which cases to time.
        say: is given a line a row.
    """
    known = cases.ops()
    unknown = sorted(set(ops or ()) - known.keys())
    if unknown:
        raise ValueError(f"ops must be among {', '.join(known)}, got {', '.join(unknown)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    end, gpu = time.monotonic() + 60 * minutes, device.type == "cuda"
    result: dict[str, Any] = {
        "device": str(device),
        "driver": driver(),
        "runs": "kernels and references" if gpu else "references alone, on small shapes: no GPU is here",
        "bandwidth": bandwidth(device),
        "rows": [],
        "left_out": [],
    }
    for name in ops or known:
        module = known[name]
        for case in module.CASES:
            if case.real != gpu or not wanted(case) or _is_empty(case):
                continue
            for mode in ("forward", "both") if gpu and hasattr(module, "op_backward") else ("forward",):
                if time.monotonic() > end:
                    result["left_out"].append([name, case.name, mode])
                    continue
                row = {"op": name, "case": case.name, "mode": mode}
                try:
                    row |= one(module, case, mode, device, repeats, compile_mode, result["bandwidth"])
                except Exception as error:  # a row that fails is a result; the others still run
                    row["failed"] = _told(error)
                result["rows"].append(row)
                if out is not None:
                    bench.save(out, result)
                if say is not None:
                    say(line(row))
                if gpu:
                    torch.cuda.empty_cache()
    return result


def one(
    module: ModuleType,
    case: Case,
    mode: str,
    device: torch.device,
    repeats: int = 20,
    compile_mode: str = "default",
    copies_per_second: float | None = None,
) -> dict[str, Any]:
    """A row: errors against float64, seconds of every provider, ratios to "triton" (to "eager" without a GPU)."""
    arguments = case.make(device)
    names = _differentiable(module, arguments) if mode == "both" else []
    providers = _providers(module, mode, compile_mode, device, names)
    failed: dict[str, str] = {}
    with torch.set_grad_enabled(mode != "forward"):
        exact = providers["eager"](cases.exact(arguments))
        moved = cases.traffic(arguments, providers["eager"](arguments))
        errors = {}
        for name, provider in providers.items():
            try:
                errors[name] = cases.error(provider(arguments), exact)
            except Exception as error:  # a rival that fails is told of, and the others are timed
                failed[name] = _told(error)
    providers = {name: providers[name] for name in errors}
    tolerance = case.tolerance if mode == "forward" else 10 * case.tolerance  # sums over all tokens
    row: dict[str, Any] = {
        "bytes": moved,
        "errors": errors,
        "tolerance": tolerance,
        "right": "triton" not in failed and errors.get("triton", errors["eager"]) <= tolerance,
    }
    if failed:
        row["failed_providers"] = failed
    del exact
    baseline = "triton" if "triton" in providers else "eager"
    gpu = device.type == "cuda"
    count = min(32, 1 + CACHE // max(moved, 1)) if gpu else 1
    many = [arguments] + [copy.deepcopy(arguments) for _ in range(count - 1)]
    fns = {name: _cycled(provider, many) for name, provider in providers.items()}
    row["call"] = bench.compare(fns, repeats=repeats, baseline=baseline)["names"]
    if gpu and mode == "forward":
        graphs = {name: graph for name, fn in fns.items() if (graph := _graphed(fn, len(many))) is not None}
        timed = bench.compare(graphs, repeats=repeats, baseline=baseline, clock="events")["names"]
        row["device"] = {
            name: {k: v if k == "ratio" else v / len(many) for k, v in times.items()}
            for name, times in timed.items()
        }
    seconds = {name: times["median"] for name, times in row.get("device", row["call"]).items()}
    if copies_per_second:
        row["roofline"] = {name: moved / copies_per_second / s for name, s in seconds.items() if s > 0}
    if hasattr(module, "flops"):
        work = module.flops(**arguments)
        row["tflops"] = {name: work / s / 1e12 for name, s in seconds.items() if s > 0}
    return row


def _providers(
    module: ModuleType, mode: str, compile_mode: str, device: torch.device, names: Sequence[str]
) -> dict[str, Callable[[dict], Any]]:
    """Functions of an op's arguments. Mode "both" goes forward and back to the inputs ``names``."""
    compiled = None
    if device.type == "cuda" and compile_mode != "off":
        torch._dynamo.reset()
        compiled = torch.compile(module.reference, mode=compile_mode, dynamic=False)
    if mode == "forward":
        forward = {"triton": getattr(module, "launch", None)} if device.type == "cuda" else {}
        forward |= {"eager": module.reference, "compile": compiled, **getattr(module, "RIVALS", {})}
    else:
        forward = {"triton": module.op, "eager": module.reference, "compile": compiled}

    def forwards(function: Callable) -> Callable[[dict], Any]:
        return lambda arguments: function(**arguments)

    def both(function: Callable) -> Callable[[dict], Any]:
        return lambda arguments: [g for g in _gradients(function, arguments, names).values() if g is not None]

    wrap = forwards if mode == "forward" else both
    return {name: wrap(function) for name, function in forward.items() if function is not None}


def _gradients(function: Callable, arguments: dict, names: Sequence[str]) -> dict[str, torch.Tensor | None]:
    """Of the arguments ``names``, for results that are weighed with fixed normals: their plain sum may be constant."""
    leaves = {k: arguments[k].detach().requires_grad_() for k in names}
    given = [t for t in cases.tensors(function(**arguments | leaves)) if t.requires_grad and t.numel()]
    weights = [cases.randn(*t.shape, seed=1000 + k).to(t) for k, t in enumerate(given)]
    found = torch.autograd.grad(given, list(leaves.values()), weights, allow_unused=True)
    return dict(zip(leaves, found))


def _differentiable(module: ModuleType, arguments: dict) -> list[str]:
    """The arguments for which the op has gradients."""
    floats = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return [k for k, g in _gradients(module.op, arguments, floats).items() if g is not None]


def _cycled(provider: Callable[[dict], Any], many: list[dict]) -> Fn:
    turn = itertools.cycle(many)
    return lambda: provider(next(turn))


def _graphed(fn: Fn, calls: int) -> Fn | None:
    """``calls`` calls as one CUDA graph, None where they cannot be: then only the call is timed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.no_grad():
            with torch.cuda.stream(side):
                fn()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    fn()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _is_empty(case: Case) -> bool:
    return any(t.numel() == 0 for t in cases.tensors(case.make("meta")))


# --- the machine -----------------------------------------------------------------------------------------------------


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy moves, read and written: of 1 GiB on a GPU, of 64 MiB on a CPU."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    clock = "events" if device.type == "cuda" else "wall"
    times = bench.compare({"copy": lambda: target.copy_(source)}, repeats=10, clock=clock)
    return 2 * size / times["names"]["copy"]["median"]


def driver() -> str | None:
    """The version of the GPU's driver, where a tool says it."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 and asked.stdout else None


# --- for people ------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """A row as text: the providers' times, and of ours the error and the share of the roofline.

    >>> times = {"eager": {"median": 2e-3, "ratio": {"median": 4.0}}}
    >>> times["triton"] = {"median": 5e-4, "ratio": {"median": 1.0}}
    >>> row = {"op": "a", "case": "b", "mode": "forward", "call": times, "right": True}
    >>> line(row | {"errors": {"triton": 1e-7, "eager": 0.0}, "roofline": {"triton": 0.9, "eager": 0.2}})
    'a, b, forward: eager 2000.0 us (x4.00, 20%), triton 500.0 us (90%); error 1.0e-07'
    """
    head = f"{row['op']}, {row['case']}, {row['mode']}: "
    if "failed" in row:
        return head + row["failed"]
    parts = []
    for name, times in row.get("device", row["call"]).items():
        ratio = times["ratio"]["median"]
        notes = [f"x{ratio:.2f}"] * (ratio != 1.0)
        if "roofline" in row:
            notes.append(f"{row['roofline'][name]:.0%}")
        parts.append(f"{name} {times['median'] * 1e6:.1f} us" + f" ({', '.join(notes)})" * bool(notes))
    parts += [f"{name} failed: {why}" for name, why in row.get("failed_providers", {}).items()]
    error = row["errors"].get("triton", row["errors"]["eager"])
    return head + ", ".join(parts) + f"; error {error:.1e}" + " WRONG" * (not row["right"])


def plot(result: dict[str, Any], file: str | Path) -> None:
    """The shares of the roofline, a group of bars a case."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a plot needs matplotlib ({error}): pip install 'fewstep[demo]'") from error
    rows = [row for row in result["rows"] if "roofline" in row]
    names: Sequence[str] = list(dict.fromkeys(name for row in rows for name in row["roofline"]))
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    high = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        at = [i + (k + 0.5) * high - 0.4 for i in range(len(rows))]
        axes.barh(at, [row["roofline"].get(name, 0.0) for row in rows], height=high, label=name)
    axes.set_yticks(
        range(len(rows)), [f"{row['op']}, {row['case']}, {row['mode']}" for row in rows], fontsize=7
    )
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel(
        f"share of the copy bandwidth, {result['bandwidth'] / 1e9:.0f} GB/s on {result['device']}"
    )
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
