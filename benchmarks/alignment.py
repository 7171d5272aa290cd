"""Ways to tune the digits' teacher to a reward, at equal compute: what they gain, and how far they stray.

    python benchmarks/alignment.py                     # all cells, two at once; goes on where it was
    python benchmarks/alignment.py --only AWM          # some of them
    python benchmarks/alignment.py --table             # what is there

The base is the embedded EDM teacher without classes; rewards are the classifier's p(7) and the share of ink. Every
method has the same network passes (a forward counts one, a forward with its backward three; pairs, rollouts,
references and inversions are counted), three seeds (variants one), and its recipe's settings. Tuned models and the base
are judged on the same 1000 held-out starts: the mean reward, the gain in units of its standard error, KL to the base
(of the paths of 40 stochastic steps down to a noise of 0.1, less than a grey level: an upper bound of the samples'
own), FD (of class features, to the real sevens, or for ink to all digits), and the median distance to the nearest
training digit (2.09 for held-out ones). Below them RL guidance: the base and the first method's tuned model blended
with a scale, as it stands and with Feynman-Kac weights over 30 stochastic steps. Best of n of the base is the frontier
that costs no training; its KL is log n - (n - 1) / n at most.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.distill.run import run
from fewstep.distill.saved import metrics, open_student
from fewstep.eval.cells import command
from fewstep.eval.demo import Judge
from fewstep.eval.files import written_aside
from fewstep.eval.frechet import frechet_distance
from fewstep.eval.neighbours import nearest
from fewstep.eval.path_kl import path_kl
from fewstep.models import Denoiser, checkpoint, digits, load
from fewstep.models.checkpoint import write_atomically
from fewstep.models.reward_names import named_reward
from fewstep.samplers import abm, ddim, feynman_kac, grids, rlg, sample, starting_noise, targets

RESULTS = Path(__file__).parent / "results" / "alignment-cpu.json"
RUNS = Path("runs/alignment")
BUDGET = 75_000  # network passes of a run
SEEDS = (0, 1, 2)
REWARDS = ("class:7", "ink")
METHODS = {
    "AWM": ("awm-digits", []),
    "Flow-GRPO": ("grpo-digits", []),
    "DDPO": ("ddpo-digits", []),
    "Pref-GRPO": ("prefgrpo-digits", []),
    "RAFT": ("raft-digits", []),
    "RAFT, tree search": ("raft-digits", ["method.proposals=tree_search"]),
    "RAFT, Feynman-Kac": ("raft-digits", ["method.proposals=feynman_kac"]),
    "Diffusion-DPO": ("dpo-digits", []),
    "Diffusion-DPO, labels by chance": (
        "dpo-digits",
        ["method.groups.noise=bradley_terry", "method.beta=30"],
    ),
    "DDIM-InPO": ("inpo-digits", []),
    "SmPO": ("smpo-digits", []),
    "MaPO": ("mapo-digits", []),
}
VARIANTS = ("DDPO", "RAFT, tree search", "RAFT, Feynman-Kac", "Diffusion-DPO, labels by chance")  # one seed
CONTROL = "untouched control"  # AWM at a rate of 0
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
TUNED = "AWM"  # whose model RL guidance is shown with
JUDGED, PATHS, BEST = 1000, 250, (2, 4, 16)


def jobs() -> Iterator[tuple[str, Callable[[dict], Any]]]:
    """Cells, what matters most first."""
    yield "base", base_cell
    for reward in REWARDS:
        yield f"best|{reward}", partial(best_cell, reward)
    for seed in SEEDS:
        for reward in REWARDS:
            for method in (*METHODS, CONTROL):
                if seed and (method in VARIANTS or method == CONTROL):
                    continue
                yield f"run|{method}|{reward}|{seed}", partial(run_cell, method, reward, seed)
    for seed in SEEDS:
        for reward in REWARDS:
            for scale in SCALES:
                for kind in ("plain", "corrected"):
                    yield f"rlg|{kind}|{scale}|{reward}|{seed}", partial(rlg_cell, kind, scale, reward, seed)


# --- models and their samples ----------------------------------------------------------------------------------------


def starts(count: int = JUDGED, seed: int = 77) -> torch.Tensor:
    return starting_noise(seed, count, (1, 8, 8))


def unconditional(count: int) -> dict[str, torch.Tensor]:
    return {"label": torch.full((count,), 10)}


def drawn(d: Denoiser, noise: torch.Tensor) -> torch.Tensor:
    """Samples by ten calls of the default solver, as the recipes have it."""
    table = abm(d.path, grids.vp(d.path, 10))
    return torch.cat([sample(d, part, table, cond=unconditional(len(part))) for part in noise.split(500)])


def judged(x: torch.Tensor, reward: str, paired: bool = True) -> dict[str, Any]:
    """What samples (N, 1, 8, 8) are worth; ``paired``: they are from the starts that the base's rewards are of."""
    judge = Judge.digits()
    images, labels = (torch.as_tensor(a) for a in digits("all"))
    real = images[labels == 7] if reward == "class:7" else images
    seen = x.clamp(-1, 1)
    distance = nearest(seen.flatten(1), judge.train).distance.median()
    fd = frechet_distance(judge.features(seen), judge.features(real))
    scores = named_reward(reward)(x).double().numpy()
    base = np.array(base_rewards()[reward])
    if paired:
        error = (scores - base).std() / len(base) ** 0.5
    else:
        error = math.hypot(scores.std() / len(scores) ** 0.5, base.std() / len(base) ** 0.5)
    gain = {
        "reward": float(scores.mean()),
        "gain": float(scores.mean() - base.mean()),
        "gain_error": float(error),
    }
    return {**gain, "fd": fd, "nearest": float(distance)}


@functools.cache
def base_rewards() -> dict[str, list[float]]:
    """The base's rewards on the starts that all are judged on, made once."""
    kept = RUNS / "base.json"
    if not kept.is_file():
        x = drawn(load("digits-edm"), starts())
        write_atomically(kept, json.dumps({reward: named_reward(reward)(x).tolist() for reward in REWARDS}))
    return json.loads(kept.read_text())


def strayed(d: Denoiser, base: Denoiser) -> dict[str, float]:
    table = ddim(base.path, grids.vp(base.path, 40), eta=1.0)
    found = path_kl(d, base, starts(PATHS, 78), table, unconditional(PATHS), seed=78, level=0.1)
    return {"kl": found.value, "kl_error": found.error}


# --- cells -----------------------------------------------------------------------------------------------------------


def base_cell(known: dict) -> dict[str, Any]:
    x = drawn(load("digits-edm"), starts())
    return {reward: judged(x, reward) for reward in REWARDS}


def best_cell(reward: str, known: dict) -> dict[str, Any]:
    """The best of n for some n, out of as many groups as are judged elsewhere."""
    pool = drawn(load("digits-edm"), starts(JUDGED * max(BEST), 79))
    scores = named_reward(reward)(pool)
    found = {}
    for n in BEST:
        groups = scores[: JUDGED * n].reshape(JUDGED, n)
        rows = torch.arange(JUDGED) * n + groups.argmax(1)
        found[str(n)] = judged(pool[rows], reward, False) | {"kl": math.log(n) - (n - 1) / n, "kl_error": 0.0}
    return found


def folder(method: str, reward: str, seed: int) -> Path:
    words = f"{method}-{reward}-{seed}".lower()
    return RUNS / "".join(c if c.isalnum() or c == "-" else "-" for c in words)


def run_cell(method: str, reward: str, seed: int, known: dict) -> dict[str, Any]:
    """A run of as many iterations as the budget pays for; the first one says what an iteration costs."""
    place = folder(method, reward, seed)
    recipe, options = METHODS.get(method, METHODS["AWM"])
    options = [*options, *(["optim.lr=0.0"] if method == CONTROL else [])]
    options += [f"reward={reward}", f"seed={seed}", f"name={place.name}", f"out={RUNS}", "threads=1"]
    options += ["report.exam=200", "report.teacher_calls=10"]
    used, whole = time.process_time(), not place.exists()
    if whole:
        run(recipe, [*options, "train.iters=1"])
    once = pair_passes(place)
    iters = max(1, round((BUDGET - once) / metrics(place)[0]["passes"]))
    run(recipe, [*options, f"train.iters={iters}", f"report.validate={max(1, iters // 10)}"])
    minutes = {"core_minutes": (time.process_time() - used) / 60} if whole else {}
    student, _, _ = open_student(place)
    lines, passes, curve = metrics(place), once, []
    for line in lines:
        passes += line["passes"]
        if "reward" in line:
            curve.append((line["iteration"], passes, line["reward"]))
    found = judged(drawn(student.d, starts()), reward) | strayed(student.d, load("digits-edm"))
    return {"iterations": iters, "passes": passes, "curve": curve, **minutes, **found}


def pair_passes(place: Path) -> float:
    """What the making of a run's pairs cost, where it made any."""
    pairs = place / "pairs.safetensors"
    return checkpoint.read(pairs)[1]["passes"] if pairs.is_file() else 0.0


def rlg_cell(kind: str, scale: float, reward: str, seed: int, known: dict) -> dict[str, Any]:
    """RL guidance of a tuned model; ``corrected``: draws from the density that it aims at, by weighted particles."""
    base, tuned = load("digits-edm"), open_student(folder(TUNED, reward, seed))[0].d
    if kind == "plain":
        d = rlg(base, tuned, scale)
        return judged(drawn(d, starts()), reward) | strayed(d, base)
    groups, particles = 60, 16
    table = ddim(base.path, grids.vp(base.path, 30), eta=1.0)
    _, info = feynman_kac(
        base, starts(groups, 80), table, target=targets.rlg(base, tuned, scale), particles=particles,
        cond=unconditional(groups), seed=80,
    )  # fmt: skip
    # one draw in proportion to the weights for every particle: less independent ones than elsewhere
    chosen = torch.multinomial(
        info.weights, particles, replacement=True, generator=torch.Generator().manual_seed(80)
    )
    x = info.particles[torch.arange(groups)[:, None], chosen].flatten(0, 1)
    return judged(x, reward, False) | {"ess": float(info.ess.mean()) / particles}


# --- what is said of them --------------------------------------------------------------------------------------------


def errors(cell: dict) -> float:
    """The gain in its standard errors."""
    return cell["gain"] / cell["gain_error"] if cell["gain_error"] else 0.0


def rows_of(known: dict, reward: str) -> list[tuple[str, list[dict]]]:
    """(name, its cells) of everything that is there."""
    base = known.get("base", {}).get(reward)
    rows = [("the base", [base | {"kl": 0.0}])] if base else []
    rows += [(f"best of {n} of the base", [cell]) for n, cell in known.get(f"best|{reward}", {}).items()]
    for method in (*METHODS, CONTROL):
        rows.append((method, [known[k] for s in SEEDS if (k := f"run|{method}|{reward}|{s}") in known]))
    for kind in ("plain", "corrected"):
        for scale in SCALES:
            cells = [known[k] for s in SEEDS if (k := f"rlg|{kind}|{scale}|{reward}|{s}") in known]
            rows.append((f"RL guidance{'' if kind == 'plain' else ', corrected'}, {scale:g}", cells))
    return [(name, cells) for name, cells in rows if cells]


def spread(cells: list[dict], value: Callable[[dict], float | None], digits: int = 3) -> str:
    found = [v for cell in cells if (v := value(cell)) is not None]
    if not found:
        return ""
    mean = f"{np.mean(found):.{digits}g}"
    return f"{mean} ({min(found):.{digits}g} .. {max(found):.{digits}g})" if len(found) > 1 else mean


def calls_to(cell: dict, level: float) -> tuple[float, float] | None:
    """(iterations, passes) after which the held-out reward is above a level for the first time."""
    return next(((i, passes) for i, passes, reward in cell["curve"] if reward >= level), None)


def race(known: dict) -> list[str]:
    """AWM against Flow-GRPO: iterations and passes to the lower of their best rewards on held-out noise."""
    lines = [
        "| reward | seed | level | AWM: iterations, passes | Flow-GRPO: iterations, passes |",
        "|---|--:|--:|--:|--:|",
    ]
    for reward in REWARDS:
        for seed in SEEDS:
            both = [known.get(f"run|{method}|{reward}|{seed}") for method in ("AWM", "Flow-GRPO")]
            if None in both:
                continue
            level = min(max(r for _, _, r in cell["curve"]) for cell in both)
            said = [calls_to(cell, level) for cell in both]
            cells = [f"{at[0]}, {at[1]:.0f}" if at else "never" for at in said]
            lines.append(f"| {reward} | {seed} | {level:.3f} | " + " | ".join(cells) + " |")
    return lines


def claims(known: dict) -> list[str]:
    """What is claimed, and whether it is so."""
    said = []
    for reward in REWARDS:
        for method in METHODS:
            cells = [known[k] for s in SEEDS if (k := f"run|{method}|{reward}|{s}") in known]
            if cells:
                least = min(errors(cell) for cell in cells)
                said.append(f"- {'yes' if least > 3 else 'NO'}: {method}, {reward}: the reward rises by more than 3 "
                            f"standard errors in every seed (the least: {least:.1f})")  # fmt: skip
        control = known.get(f"run|{CONTROL}|{reward}|0")
        if control:
            off = errors(control)
            said.append(f"- {'yes' if abs(off) < 3 else 'NO'}: {CONTROL}, {reward}: it does not ({off:.1f})")
    return said


def tables(known: dict) -> str:
    """Markdown of what is there."""
    lines = ["# Tuning to a reward", "", "`python benchmarks/alignment.py`, on a CPU.", ""]
    lines += [
        " ".join(__doc__.split("\n\n")[2].split()),
        "",
        f"{BUDGET} passes a run. Means over seeds and their range.",
    ]
    numbers = {  # heading -> what of a cell, digits
        "reward": (lambda c: c["reward"], 3),
        "KL to the base": (lambda c: c.get("kl"), 2),
        "FD": (lambda c: c["fd"], 3),
        "nearest": (lambda c: c["nearest"], 3),
        "iterations": (lambda c: c.get("iterations"), 3),
        "core minutes": (lambda c: c.get("core_minutes"), 2),
    }
    for reward in REWARDS:
        lines += ["", f"## {reward}", "", f"| | {' | '.join(numbers)} | gain / s.e. | seeds |"]
        lines += ["|---|" + "--:|" * (len(numbers) + 2)]
        for name, cells in rows_of(known, reward):
            least = "" if name == "the base" else f"{min(errors(cell) for cell in cells):.0f}"
            told = [spread(cells, value, digits) for value, digits in numbers.values()]
            lines.append(f"| {name} | {' | '.join(told)} | {least} | {len(cells)} |")
    lines += ["", "## Iterations to the same reward", "", *race(known), "", *claims(known), ""]
    return "\n".join(lines)


def plot(known: dict) -> None:
    """Reward against KL, of methods and of RL guidance's scales; and against FD, with the corrected ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for row, reward in zip(axes, REWARDS, strict=True):
        for axis, key in zip(row, ("kl", "fd"), strict=True):
            named = {name: [c for c in cells if key in c] for name, cells in rows_of(known, reward)}
            at = {
                name: (np.mean([c[key] for c in cells]), np.mean([c["reward"] for c in cells]))
                for name, cells in named.items()
                if cells
            }
            for line, style in (
                ("best of", "k:"),
                ("RL guidance, corrected", "C1^-"),
                ("RL guidance", "C0s-"),
            ):
                some = [at.pop(name) for name in list(at) if name.startswith(line)]
                if line == "RL guidance" or some:
                    axis.plot(
                        *np.array(some).reshape(-1, 2).T,
                        style,
                        markersize=4,
                        label=line.replace("best of", "best of n"),
                    )
            for number, (name, place) in enumerate(at.items()):
                axis.plot(*place, "o*DvPXhdp<>8H"[number % 13], color=f"C{2 + number % 8}", label=name)
            axis.set(xlabel="KL to the base" if key == "kl" else "FD", ylabel=reward)
            if key == "kl":
                axis.set_xscale("symlog", linthresh=0.1)
    axes[0, 1].legend(fontsize=7, loc="upper right")  # has them all: what is corrected has no KL
    with written_aside(RESULTS.with_name("alignment-cpu.png")) as aside:
        figure.savefig(aside, format="png", dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    RUNS.mkdir(parents=True, exist_ok=True)
    command(__doc__, RESULTS, jobs(), tables, at_once=2)
    if RESULTS.is_file():
        plot(json.loads(RESULTS.read_text())["results"])
