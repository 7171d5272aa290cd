"""What a step costs outside the network: ours against diffusers' ``scheduler.step``, interleaved in one process.

The network is a constant tensor. A reading is one whole trajectory, divided by its number of steps; theirs without
``set_timesteps``, ours with ``init``. ``sample`` is the loop as users call it: it also looks for NaN and infinity.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from ..models import Denoiser, paths
from ..samplers import ddim, deis, dpmpp, grids, init, sample, step, unipc
from . import bench

PAIRS = {
    "deis 3": "DEISMultistep 3",
    "unipc 2": "UniPCMultistep 2",
    "dpmpp 2M": "DPMSolverMultistep 2M",
    "ddim": "DDIM",
}

WARMUP = 3


def _ours(steps: int, noise: torch.Tensor, answer: torch.Tensor) -> dict:
    """name -> a whole trajectory by hand, and one through ``sample``."""
    d = Denoiser(lambda x, tau: answer, paths.vp_linear(), predicts="eps")
    times = grids.logsnr(d.path, steps)
    tables = {
        "deis 3": deis(d.path, times, order=3, variable="lam"),
        "unipc 2": unipc(d.path, times, order=2),
        "dpmpp 2M": dpmpp(d.path, times, order=2),
        "ddim": ddim(d.path, times),
    }

    def by_hand(plan):
        state = init(plan, noise)
        for _ in range(plan.table.calls):
            state, _ = step(d, plan, state)

    runs = {}
    for name, table in tables.items():
        plan = table.on(d)
        runs[name] = lambda plan=plan: by_hand(plan)
        runs[f"{name}, sample"] = lambda plan=plan: sample(d, noise, plan)
    return runs


def _theirs(steps: int, noise: torch.Tensor, answer: torch.Tensor, readings: int) -> dict:
    """name -> a whole trajectory of diffusers' scheduler; each reading takes a fresh copy, made beforehand."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"the comparison needs diffusers ({error}): pip install 'fewstep[diffusers]'"
        ) from error
    schedulers = {
        "DEISMultistep 3": diffusers.DEISMultistepScheduler(solver_order=3),
        "UniPCMultistep 2": diffusers.UniPCMultistepScheduler(solver_order=2),
        "DPMSolverMultistep 2M": diffusers.DPMSolverMultistepScheduler(solver_order=2),
        "DDIM": diffusers.DDIMScheduler(),
    }

    def run(copies):
        scheduler, x = next(copies), noise
        for t in scheduler.timesteps:
            x = scheduler.step(answer, t, x, return_dict=False)[0]

    runs = {}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(steps, device=noise.device)
        copies = iter([copy.deepcopy(scheduler) for _ in range(readings)])
        runs[name] = lambda copies=copies: run(copies)
    return runs


def measure(
    steps: int = 20,
    repeats: int = 30,
    shape: Sequence[int] = (4, 4, 64, 64),
    device: torch.device | str = "cpu",
) -> dict:
    """Seconds a step of each, the cost of one axpy, and ratios ours / theirs taken round by round."""
    generator = torch.Generator().manual_seed(0)
    noise, answer = (torch.randn(*shape, generator=generator).to(device) for _ in range(2))
    target = torch.zeros_like(noise)
    runs = {**_ours(steps, noise, answer), **_theirs(steps, noise, answer, repeats + WARMUP)}
    runs["one axpy"] = lambda: [target.add_(noise, alpha=1e-3) for _ in range(steps)]
    with torch.no_grad():
        rounds = bench.compare(runs, repeats=repeats, warmup=WARMUP)["rounds"]
    middle = {name: sorted(times)[len(times) // 2] / steps for name, times in rounds.items()}
    ratios = {}
    for mine, other in PAIRS.items():
        for name in (mine, f"{mine}, sample"):
            pairs = sorted(a / b for a, b in zip(rounds[name], rounds[other]))
            ratios[name] = {
                "against": other,
                "median": pairs[len(pairs) // 2],
                "low": pairs[0],
                "high": pairs[-1],
            }
    return {
        "steps": steps,
        "repeats": repeats,
        "shape": list(shape),
        "seconds_a_step": middle,
        "ratios": ratios,
    }


def show(result: dict) -> str:
    """The table that people read."""
    seconds = result["seconds_a_step"]
    lines = [f"{'ours':<18} {'us a step':>9}   {'diffusers':<22} {'us a step':>9}   {'ratio':>5}"]
    for name, ratio in result["ratios"].items():
        other = ratio["against"]
        lines.append(
            f"{name:<18} {seconds[name] * 1e6:>9.1f}   {other:<22} {seconds[other] * 1e6:>9.1f}   "
            f"{ratio['median']:>5.2f}"
        )
    return "\n".join([*lines, f"one axpy: {seconds['one axpy'] * 1e6:.1f} us"])


def plot(result: dict, file) -> None:
    """Microseconds a step, ours beside theirs."""
    from matplotlib.figure import Figure

    seconds, names = result["seconds_a_step"], list(PAIRS)
    figure = Figure(figsize=(7, 3.2), layout="constrained", dpi=110)
    ax = figure.subplots()
    for shift, label, values in (
        (-0.2, "fewstep", [seconds[n] for n in names]),
        (0.2, "diffusers", [seconds[PAIRS[n]] for n in names]),
    ):
        ax.bar([i + shift for i in range(len(names))], [1e6 * v for v in values], 0.4, label=label)
    ax.set_xticks(range(len(names)), names)
    ax.set(
        ylabel="microseconds a step", title=f"outside the network, {' x '.join(map(str, result['shape']))}"
    )
    ax.legend()
    figure.savefig(file)
