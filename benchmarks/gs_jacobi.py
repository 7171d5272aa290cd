"""GS-Jacobi on the digits' TarFlow, beside the sequential inverse with keys and values kept.

    python benchmarks/gs_jacobi.py                       everything that is not in the results yet, then the tables
    python benchmarks/gs_jacobi.py --seconds 200         stop after so long; the next run goes on from there
    python benchmarks/gs_jacobi.py --table               print the tables from the results as they are

Calls: of a block's network, 63 a block for the sequential inverse; work: tokens computed, over its. Error: the largest
of any pixel, to the sequential inverse. Time: of the sequential inverse over that of GS-Jacobi, median over interleaved
rounds of one run, one thread. Quality: 500 denoised samples, 50 a class; FD of classifier features to the 360 held-out
digits, label accuracy; mean and standard deviation over three seeds; "J sweeps kept" is one module of J sweeps a block,
taken as it is. Control: the flow with a made so many times larger.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.eval import bench
from fewstep.eval.cells import Known, command
from fewstep.eval.frechet import frechet_distance
from fewstep.models.classifier import load_classifier
from fewstep.models.digits import digits
from fewstep.models.tarflow import TarFlow, load_flow
from fewstep.samplers import gs_jacobi, starting_noise
from fewstep.samplers.gs_jacobi import Plan
from fewstep.samplers.gs_jacobi_plan import choose, metrics

RESULTS = Path(__file__).parent / "results" / "gs-jacobi-cpu.json"
NUM, SEEDS, BATCH = 500, 3, 100
BATCHES = (1, 2, 4, 8, 16, 64)
KEPT = (2, 4, 6, 8, 12)
SHORT = (4, 6, 8)  # of these, the ones that are timed
SCALES = (1.0, 3.0, 6.0)
WAYS = {
    "Jacobi, from z": {},
    "Jacobi, from 0": {"plan": Plan(guess="zero")},
    "2 modules": {"plan": Plan(2)},
    "4 modules": {"plan": Plan(4)},
    "8 modules": {"plan": Plan(8)},
    "as released": {"stop": "norm", "unfinished": "keep"},
    "as released, [2-4-12-16]": {
        "plan": Plan((1, 1, 4), (16, 16, 12)),
        "stop": "norm",
        "unfinished": "keep",
    },
}


def kept(sweeps: int) -> dict[str, Any]:
    return {"plan": Plan(1, sweeps), "tolerance": None, "unfinished": "keep"}


QUALITY: dict[str, dict[str, Any] | None] = {
    "sequential": None,
    "GS-Jacobi": {},
    **{f"{j} sweeps kept": kept(j) for j in KEPT},
    "sequential, guidance 0.5": None,
    "GS-Jacobi, guidance 0.5": {},
}


def start(n: int, flow: TarFlow, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return starting_noise(seed, n, flow.shape, flow.blocks[0].inp.weight.dtype), torch.arange(n) % 10


def quiet(flow: TarFlow, z: torch.Tensor, label: torch.Tensor, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what is left unfinished is in the table
        return gs_jacobi(flow, z, label, **options)


# --- is it the inverse -----------------------------------------------------------------------------------------------


def exact(dtype: str, known: Known) -> dict:
    flow = load_flow().to(getattr(torch, dtype))
    z, label = start(16, flow)
    truth, found = flow.inverse(z, label), {}
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    back = float((flow(truth, label)[0] - z).abs().max())
    found["sequential"] = {"error": 0.0, "back": back, "calls": 189, "work": 1.0, "sweeps": [63] * 3}
    for name, options in WAYS.items():
        x, info = quiet(flow, z, label, tolerance=tolerance, **options)
        found[name] = {
            "error": float((x - truth).abs().max()),
            "back": float((flow(x, label)[0] - z).abs().max()),
            "calls": info.calls, "work": info.work, "sweeps": list(info.sweeps),
        }  # fmt: skip
    return found


def rounding(known: Known) -> dict:
    """Largest errors of 256 digits in float32: of both to float64, and to each other."""
    flow, fine = load_flow(), load_flow().double()
    z, label = start(256, flow)
    truth, one, other = fine.inverse(z.double(), label), flow.inverse(z, label), gs_jacobi(flow, z, label)[0]
    return {
        "sequential": float((one - truth).abs().max()), "gs_jacobi": float((other - truth).abs().max()),
        "between": float((one - other).abs().max()),
    }  # fmt: skip


def trace(block: int, known: Known) -> list[float]:
    """The image's largest error if this block alone is left after k sweeps."""
    flow = load_flow()
    z, label = start(16, flow)
    truth, off = flow.inverse(z, label), []
    for k in range(1, 33):
        plan = Plan(1, [k if i == block else None for i in range(len(flow.blocks))])
        x, _ = gs_jacobi(flow, z, label, plan, tolerance=None, unfinished="keep")
        off.append(float((x - truth).abs().max()))
    return off


def measured(known: Known) -> dict:
    flow = load_flow()
    x, label = (torch.from_numpy(a[:128]) for a in digits("train"))
    noisy = x + flow.config.noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = {kind: metrics(flow, noisy, label, kind) for kind in ("derived", "released")}
    sweeps = gs_jacobi(flow, *start(128, flow))[1].sweeps
    return {
        **{kind: list(m.shares) for kind, m in found.items()},
        "igm_z": list(found["derived"].igm_z), "igm_zero": list(found["derived"].igm_zero),
        "sweeps": list(sweeps), "modules": list(choose(flow, noisy, label).modules),
    }  # fmt: skip


def control(scale: float, known: Known) -> dict:
    """Larger a: what 4 sweeps leave, what they say of it, and what ``finish`` makes of it."""
    flow = copy.deepcopy(load_flow()).double()
    for block in flow.blocks:
        half = block.out.weight.shape[0] // 2
        block.out.weight[:half] *= scale
        block.out.bias[:half] *= scale
    z, label = start(16, flow)
    truth = flow.inverse(z, label)
    kept, left = quiet(flow, z, label, plan=Plan(1, 4), unfinished="keep")
    whole, info = gs_jacobi(flow, z, label, Plan(1, 4))
    return {
        "kept": float((kept - truth).abs().max()), "said": max(left.residuals), "settled": all(left.settled),
        "finished": float((whole - truth).abs().max()), "calls": info.calls,
        "jacobi": gs_jacobi(flow, z, label)[1].calls,
    }  # fmt: skip


# --- time and quality ------------------------------------------------------------------------------------------------


def timed(batch: int, known: Known) -> dict:
    flow = load_flow()
    z, label = start(batch, flow)
    runs = {"sequential": lambda: flow.inverse(z, label)}
    for name, options in WAYS.items():
        runs[name] = lambda options=options: quiet(flow, z, label, **options)
    found = bench.compare(runs, repeats=15 if batch < 16 else 7, warmup=2)["names"]
    calls = gs_jacobi(flow, z, label)[1].calls
    return {
        "seconds": found["sequential"]["median"],
        "calls": calls,
        **{name: [1 / found[name]["ratio"][q] for q in ("median", "q75", "q25")] for name in WAYS},
    }


def cut_short(batch: int, known: Known) -> dict:
    """The same for few sweeps, which the next table says the quality of."""
    flow = load_flow()
    z, label = start(batch, flow)
    runs: dict[str, Callable[[], Any]] = {"sequential": lambda: flow.inverse(z, label)}
    for j in SHORT:
        runs[str(j)] = lambda j=j: gs_jacobi(flow, z, label, **kept(j))
    found = bench.compare(runs, repeats=11, warmup=2)["names"]
    return {str(j): [1 / found[str(j)]["ratio"][q] for q in ("median", "q75", "q25")] for j in SHORT}


def sampled(name: str, seed: int, known: Known) -> dict:
    flow, options, parts, calls = load_flow(), QUALITY[name], [], 0
    z, label = start(NUM, flow, seed)
    guidance = 0.5 if "guidance" in name else 0.0
    for part, of in zip(z.split(BATCH), label.split(BATCH), strict=True):
        if options is None:
            x = flow.inverse(part, of, guidance)
            calls += len(flow.blocks) * (flow.tokens - 1)
        else:
            x, info = gs_jacobi(flow, part, of, guidance=guidance, **options)
            calls += info.calls
        parts.append(flow.denoise(x, of))
    return {**judged(torch.cat(parts), label), "calls": calls / len(parts)}


def judged(x: torch.Tensor, label: torch.Tensor) -> dict:
    judge = load_classifier()
    features, logits = judge(x.clamp(-1, 1))
    real = judge.features(torch.from_numpy(digits("held_out")[0]))
    return {
        "fd": frechet_distance(features, real),
        "right": float((logits.argmax(-1) == label).double().mean()),
    }


def floor(known: Known) -> dict:
    images, labels = (torch.from_numpy(a) for a in digits("train"))
    rows = np.random.RandomState(0).permutation(len(images))[:NUM]
    return judged(images[rows], labels[rows])


# --- the tables ------------------------------------------------------------------------------------------------------


def jobs():
    for dtype in ("float32", "float64"):
        yield f"exact|{dtype}", partial(exact, dtype)
    yield "rounding", rounding
    yield "metrics", measured
    for batch in BATCHES:
        yield f"time|{batch}", partial(timed, batch)
        yield f"short|{batch}", partial(cut_short, batch)
    for scale in SCALES:
        yield f"control|{scale}", partial(control, scale)
    yield "quality|floor", floor
    for seed in range(SEEDS):
        for name in QUALITY:
            yield f"quality|{name}|{seed}", partial(sampled, name, seed)
    for block in range(3):
        yield f"trace|{block}", partial(trace, block)


def tables(known: Known) -> str:
    lines = ["# GS-Jacobi", "", "`python benchmarks/gs_jacobi.py`, on a CPU.", ""]
    lines += [" ".join(__doc__.split("\n\n")[2].split()), ""]
    for dtype in ("float32", "float64"):
        if cell := known.get(f"exact|{dtype}"):
            lines += [
                f"| 16 digits, {dtype} | calls | by block, from the image | work | error | forward(inverse(z)) - z |",
                "|---|--:|---|--:|--:|--:|",
            ]
            for name, row in cell.items():
                by = " ".join(map(str, row["sweeps"]))
                lines.append(
                    f"| {name} | {row['calls']} | {by} | {row['work']:.1f} | {row['error']:.1e} | {row['back']:.1e} |"
                )
            lines.append("")
    if cell := known.get("rounding"):
        lines += [
            f"256 digits in float32: the sequential inverse is {cell['sequential']:.1e} off its own in float64, GS-"
            f"Jacobi {cell['gs_jacobi']:.1e}, and they differ by {cell['between']:.1e}.", "",
        ]  # fmt: skip
    if cell := known.get("metrics"):
        lines += ["| block, from the image | 0 | 1 | 2 |", "|---|--:|--:|--:|"]
        for key, said in (
            ("derived", "share of CRM, derived"), ("released", "share of CRM, as released"),
            ("igm_z", "IGM from z"), ("igm_zero", "IGM from 0"), ("sweeps", "sweeps of 128 digits"),
            ("modules", "modules that `choose` gives"),
        ):  # fmt: skip
            lines.append(f"| {said} | " + " | ".join(f"{v:.3g}" for v in cell[key]) + " |")
        lines.append("")
    if found := [(batch, known[f"time|{batch}"]) for batch in BATCHES if f"time|{batch}" in known]:
        names = list(WAYS)
        lines += [
            "| batch | sequential, ms | calls | " + " | ".join(f"faster by: {name}" for name in names) + " |",
            "|--:|--:|--:|" + "--:|" * len(names),
        ]
        for batch, cell in found:
            told = " | ".join("{:.2f} ({:.2f} .. {:.2f})".format(*cell[name]) for name in names)
            lines.append(f"| {batch} | {1000 * cell['seconds']:.0f} | {cell['calls']} | {told} |")
        lines.append("")
    if found := [(batch, known[f"short|{batch}"]) for batch in BATCHES if f"short|{batch}" in known]:
        head = " | ".join(f"faster by: {j} sweeps kept" for j in SHORT)
        lines += [f"| batch | {head} |", "|--:|" + "--:|" * len(SHORT)]
        for batch, cell in found:
            told = " | ".join("{:.2f} ({:.2f} .. {:.2f})".format(*cell[str(j)]) for j in SHORT)
            lines.append(f"| {batch} | {told} |")
        lines.append("")
    lines += ["| 500 digits | calls | FD to held-out digits | right label |", "|---|--:|--:|--:|"]
    if cell := known.get("quality|floor"):
        lines.append(f"| training digits | | {cell['fd']:.2f} | {cell['right']:.3f} |")
    for name in QUALITY:
        cells = [known[key] for seed in range(SEEDS) if (key := f"quality|{name}|{seed}") in known]
        if cells:
            fd, right = (np.array([cell[key] for cell in cells]) for key in ("fd", "right"))
            spread = f" +- {fd.std(ddof=1):.2f}" if len(fd) > 1 else ""
            calls = np.mean([cell["calls"] for cell in cells])
            lines.append(f"| {name} | {calls:.0f} | {fd.mean():.2f}{spread} | {right.mean():.3f} |")
    if found := [(scale, known[f"control|{scale}"]) for scale in SCALES if f"control|{scale}" in known]:
        lines += [
            "", "| a times | 4 sweeps kept: error | residual said | settled | finished token by token: error | calls "
            "| calls of Jacobi |", "|--:|--:|--:|---|--:|--:|--:|",
        ]  # fmt: skip
        for scale, cell in found:
            lines.append(
                f"| {scale} | {cell['kept']:.1e} | {cell['said']:.1e} | {'yes' if cell['settled'] else 'no'} | "
                f"{cell['finished']:.1e} | {cell['calls']} | {cell['jacobi']} |"
            )
    return "\n".join([*lines, ""])


# --- the figure ------------------------------------------------------------------------------------------------------


def page(figure) -> None:
    """The error of each block by sweeps, and where it is faster."""
    known = json.loads(RESULTS.read_text())["results"]
    errors, times = figure.subplots(1, 2)
    for block in range(3):
        off = known[f"trace|{block}"]
        errors.semilogy(range(1, len(off) + 1), off, "o-", markersize=3, label=f"block {block}")
    errors.axhline(1e-6, color="0.5", linestyle=":", label="tolerance")
    errors.axvline(63, color="0.8")
    errors.text(62.5, 1e-3, "sequential: 63 calls", rotation=90, ha="right", va="center", color="0.5")
    errors.set(xlabel="sweeps of the block", ylabel="largest error of a pixel, 16 digits")
    shown = [b for b in BATCHES if f"time|{b}" in known]
    for name in ("Jacobi, from z", "4 modules"):
        times.plot(shown, [known[f"time|{b}"][name][0] for b in shown], "o-", markersize=3, label=name)
    few = [b for b in BATCHES if f"short|{b}" in known]
    times.plot(few, [known[f"short|{b}"]["6"][0] for b in few], "o-", markersize=3, label="6 sweeps kept")
    times.axhline(1, color="0.5", linestyle=":", label="sequential")
    times.set(xscale="log", xlabel="batch", ylabel="times as fast, one CPU thread", ylim=(0, None))
    times.set_xticks(shown, labels=[str(b) for b in shown])
    times.minorticks_off()
    for axis in (errors, times):
        axis.legend(fontsize=8)


if __name__ == "__main__":
    command(__doc__, RESULTS, jobs(), tables)
