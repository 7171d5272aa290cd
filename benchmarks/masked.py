"""Samplers of masked diffusion models: first-hitting beside ancestral, and what float32 draws do to the latter.

    python benchmarks/masked.py                          everything that is not in the results yet, then the tables
    python benchmarks/masked.py --seconds 200            stop after so long; the next run goes on from there
    python benchmarks/masked.py --table                  print the tables from the results as they are

Toy: 200,000 draws of four tokens of three kinds, total variation to the joint that is known; exact draws have the
floor's. Digits: 500 samples of the embedded model, 50 a class; FD of classifier features to all 1,797 digits, label
accuracy, median distance to the nearest training digit (held-out digits: 2.09), the entropy of grey levels within an
image and over all of them, in nats; mean and standard deviation over three seeds. Floors: 500 training digits, and the
360 held out. Ceiling: all pixels drawn in one call, which is one ancestral step. Calls: those that a sample needs.
Tail: a million draws of common code between a token of probability 5e-8 and the mask, given the one case in 2^16 in
which it can win at all. Steps: the law of one token that common code draws in T steps, by the closed form of
``samplers.race``, as its entropy and the share of its rarer half. Time: of a batch of 16 digits, or of 4 sequences of
16 words and next to no network; medians over interleaved rounds of one run; "common code" draws with torch.rand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fewstep.eval import bench
from fewstep.eval.cells import Known, command
from fewstep.eval.demo import Judge
from fewstep.eval.token_metrics import (
    expected_total_variation,
    sequence_entropy,
    total_variation,
    unigram_entropy,
)
from fewstep.models.classifier import load_classifier
from fewstep.models.digits import SHAPE, digits
from fewstep.models.masked import MaskedModel, from_joint, load_masked
from fewstep.models.pixel_tokens import to_images, to_tokens
from fewstep.samplers import first_hitting, masked_ancestral, masked_cfg
from fewstep.samplers.race import LATTICE, lattice_odds, winners

RESULTS = Path(__file__).parent / "results" / "masked-cpu.json"
DRAWS, NUM, SEEDS, LEVELS = 200_000, 500, 3, 17
STEPS = (4, 16, 64, 256, 1000)
PARALLEL = (2, 4, 8, 16)
LONG = (16, 64, 256, 1024, 4096, 16384, 65536)
WORDS, KINDS = 50_257, 400  # of the vocabulary of Zipf's law, and how many of its probabilities differ
METHODS = {
    "first-hitting": {},
    **{f"first-hitting, {k} a call": {"parallel": k} for k in PARALLEL},
    **{f"first-hitting, {k} a call, order 2": {"parallel": k, "order": 2} for k in PARALLEL},
    **{f"ancestral, T = {t}": {"steps": t} for t in (1, *STEPS)},
    **{f"ancestral, T = {t}, float32": {"steps": t, "draws": "float32"} for t in STEPS},
    "first-hitting, guidance 2": {"guidance": 2.0},
    "first-hitting, temperature 0.9": {"temperature": 0.9},
}


def draw(model: MaskedModel, prompt, options: dict, **more):
    """Samples of one of the METHODS."""
    options = dict(options)
    if "guidance" in options:
        model = masked_cfg(model, options.pop("guidance"))
    if "steps" in options:
        return masked_ancestral(model, prompt, options.pop("steps"), **options, **more)
    return first_hitting(model, prompt, **options, **more)


# --- a joint that is known -------------------------------------------------------------------------------------------


def joint() -> torch.Tensor:
    table = torch.rand((3,) * 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    return table / table.sum()


TOYS = {
    "first-hitting": {},
    "first-hitting, 2 a call": {"parallel": 2},
    "first-hitting, 2 a call, order 2": {"parallel": 2, "order": 2},
    **{f"ancestral, T = {t}": {"steps": t} for t in (1, 2, 4, 8, 16, 64, 256, 1000)},
    "ancestral, T = 64, float32": {"steps": 64, "draws": "float32"},
    "ancestral, T = 64, float64": {"steps": 64, "draws": "float64"},
}


def toy(name: str, known: Known) -> dict:
    x, info = draw(from_joint(joint()), DRAWS, TOYS[name], seed=1)
    return {"tv": total_variation(x, joint()), "calls": float(info.needed.double().mean())}


def toy_floor(known: Known) -> dict:
    table = joint()
    rows = torch.multinomial(
        table.flatten(), DRAWS, replacement=True, generator=torch.Generator().manual_seed(5)
    )
    x = torch.stack(torch.unravel_index(rows, table.shape), 1)
    return {"tv": total_variation(x, table), "expected": expected_total_variation(table, DRAWS)}


# --- the digits ------------------------------------------------------------------------------------------------------


def judged(tokens: torch.Tensor, label: torch.Tensor) -> dict:
    images, entropies = to_images(tokens, SHAPE, LEVELS), sequence_entropy(tokens, LEVELS)
    quality = Judge.digits().quality(images)
    right = load_classifier()(images)[1].argmax(-1) == label
    return {
        "fd": quality["fd"], "nearest": quality["nearest"], "right": float(right.double().mean()),
        "entropy": float(entropies.mean()), "unigram": unigram_entropy(tokens, LEVELS),
    }  # fmt: skip


def sampled(name: str, seed: int, known: Known) -> dict:
    label = torch.arange(NUM) % 10
    tokens, info = draw(load_masked("digits-masked"), NUM, METHODS[name], seed=seed, cond={"label": label})
    return {**judged(tokens, label), "calls": float(info.needed.double().mean())}


def real(split: str, known: Known) -> dict:
    images, labels = (torch.from_numpy(a) for a in digits(split))
    rows = np.random.RandomState(0).permutation(len(images))[:NUM]
    return judged(to_tokens(images[rows], LEVELS), labels[rows])


# --- float32 ---------------------------------------------------------------------------------------------------------


def tail(known: Known) -> dict:
    """How often a token of probability 5e-8 beats the mask, of a million draws that are given a leading word of 2^16;
    and what theory says."""
    q, n, random, won = 5e-8, 1_000_000, torch.Generator().manual_seed(0), {}
    for dtype, bits in (("float32", 24), ("float64", 53)):
        token, mask = (torch.randint(2**bits, (n,), generator=random) for _ in range(2))
        token = 2**bits - 2 ** (bits - 16) + token % 2 ** (bits - 16)
        u = torch.stack([token, mask], -1).to(getattr(torch, dtype)) * 2.0**-bits
        won[dtype] = int((winners(torch.tensor([q, 1 - q], dtype=u.dtype), u) == 0).sum())
    given = n * 2**16
    theory = {
        "true": given * q,
        "lattice": given * float(lattice_odds(torch.tensor(q, dtype=torch.float64))),
        "paper": given * q * math.exp(-LATTICE / q),
    }
    return {**won, **theory}


def laws(known: Known) -> dict:
    """For words by Zipf's law and the grey levels of digits: entropy, and the mass of the rarer half of all draws."""
    ranks = np.unique(np.geomspace(1, WORDS + 1, KINDS).astype(int))
    many = torch.tensor(np.diff(ranks), dtype=torch.float64)
    zipf = torch.tensor([1 / np.arange(a, b).mean() for a, b in zip(ranks[:-1], ranks[1:], strict=True)])
    grey = torch.bincount(to_tokens(torch.from_numpy(digits("all")[0]), LEVELS).flatten()).double()
    found = {}
    for name, p, times in (("words", zipf, many), ("grey levels", grey, torch.ones(LEVELS))):
        p = (p / (p * times).sum()).double()
        half = (p * times).flip(0).cumsum(0).flip(0) <= 0.5 if name == "words" else p <= p.median()
        rows = {"true": _said(p, times, half)}
        for steps in LONG:
            law, alive = torch.zeros_like(p), 1.0
            for left in range(steps, 0, -1):
                odds = lattice_odds(p / left)
                total = float((odds * times).sum())
                law += alive * odds if left > 1 else alive * odds / total
                alive *= 1 - total
            rows[str(steps)] = _said(law, times, half)
        found[name] = rows
    return found


def _said(law: torch.Tensor, times: torch.Tensor, half: torch.Tensor) -> list[float]:
    return [float(-(torch.xlogy(law, law) * times).sum()), float((law * times)[half].sum())]


# --- time ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def common(model: MaskedModel, n: int, steps: int, dtype: torch.dtype, cond: dict) -> torch.Tensor:
    """Ancestral sampling as it is often written: a draw for every token at every step, the network asked again once
    anything in the batch has changed."""
    x, p = model.masks(n), None
    for k in range(steps, 0, -1):
        if p is None:
            p = model(x, **cond).to(dtype).softmax(-1)
        q = torch.cat([p / k, torch.full((*x.shape, 1), 1 - 1 / k, dtype=dtype)], -1)
        new = torch.where(x == model.mask, winners(q, torch.rand(q.shape, dtype=dtype)), x)
        if not torch.equal(new, x):
            p = None
        x = new
    return x


def timed(name: str, known: Known) -> dict:
    if name == "digits":
        model, n, steps, repeats = load_masked("digits-masked"), 16, (64, 1000), 5
        cond = {"label": torch.arange(n) % 10}
    else:  # next to no network, a large vocabulary
        table = torch.randn(WORDS, generator=torch.Generator().manual_seed(0))
        model = MaskedModel(lambda tokens: table.expand(*tokens.shape, -1), WORDS, 16)
        n, steps, repeats, cond = 4, (16, 128), 3, {}
    runs: dict[str, Callable[[], object]] = {"first-hitting": lambda: first_hitting(model, n, cond=cond)}
    for t in steps:
        runs[f"ancestral, T = {t}"] = lambda t=t: masked_ancestral(model, n, t, cond=cond)
        runs[f"common code, T = {t}, float64"] = lambda t=t: common(model, n, t, torch.float64, cond)
    runs[f"common code, T = {steps[-1]}, float32"] = lambda: common(model, n, steps[-1], torch.float32, cond)
    found = bench.compare(runs, repeats=repeats, warmup=1)["names"]
    return {run: value["ratio"]["median"] for run, value in found.items()}


# --- the tables ------------------------------------------------------------------------------------------------------


def jobs():
    yield "toy|floor", toy_floor
    for name in TOYS:
        yield f"toy|{name}", partial(toy, name)
    for split in ("train", "held_out"):
        yield f"real|{split}", partial(real, split)
    yield "laws", laws
    yield "tail", tail
    for name in ("digits", "words"):
        yield f"time|{name}", partial(timed, name)
    for seed in range(SEEDS):
        for name in METHODS:
            yield f"digits|{name}|{seed}", partial(sampled, name, seed)


def tables(known: Known) -> str:
    lines = ["# Masked diffusion", "", "`python benchmarks/masked.py`, on a CPU.", ""]
    lines += [
        " ".join(__doc__.split("\n\n")[2].split()),
        "",
        "| toy | calls | total variation |",
        "|---|--:|--:|",
    ]
    if floor := known.get("toy|floor"):
        lines.append(f"| exact draws (on average {floor['expected']:.4f}) | | {floor['tv']:.4f} |")
    for name in TOYS:
        if cell := known.get(f"toy|{name}"):
            lines.append(f"| {name} | {cell['calls']:.2f} | {cell['tv']:.4f} |")
    lines += [
        "", "| digits | calls | FD | right label | nearest | entropy of an image | of all |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    keys = ("fd", "right", "nearest", "entropy", "unigram")
    places = (2, 3, 2, 3, 3)
    for split, said in (("train", "500 training digits"), ("held_out", "360 held-out digits")):
        if cell := known.get(f"real|{split}"):
            cells = (f"{cell[key]:.{n}f}" for key, n in zip(keys, places, strict=True))
            lines.append(f"| {said} | | " + " | ".join(cells) + " |")
    for name in METHODS:
        cells = [known[key] for seed in range(SEEDS) if (key := f"digits|{name}|{seed}") in known]
        if not cells:
            continue
        told = []
        for key, n in zip(keys, places, strict=True):
            values = np.array([cell[key] for cell in cells])
            spread = f" +- {values.std(ddof=1):.{n}f}" if len(cells) > 1 else ""
            told.append(f"{values.mean():.{n}f}{spread}")
        calls = np.mean([cell["calls"] for cell in cells])
        lines.append(f"| {name} | {calls:.1f} | " + " | ".join(told) + " |")
    if cell := known.get("tail"):
        lines += [
            "", "| rare tokens that won | |", "|---|--:|", f"| expected | {cell['true']:.0f} |",
            f"| drawn in float64 | {cell['float64']} |", f"| drawn in float32 | {cell['float32']} |",
            f"| float32 by the lattice's formula | {cell['lattice']:.0f} |",
            f"| float32 by the continuous formula of 2409.02908 | {cell['paper']:.0f} |",
        ]  # fmt: skip
    if cell := known.get("laws"):
        lines += ["", "| steps of common code in float32 | " + " | ".join(
            f"{name}: entropy | rarer half" for name in cell) + " |", "|---|" + "--:|--:|" * len(cell)]  # fmt: skip
        for row in next(iter(cell.values())):
            numbers = (f"{entropy:.4f} | {half:.4f}" for entropy, half in (cell[name][row] for name in cell))
            lines.append(f"| {row} | " + " | ".join(numbers) + " |")
    for name in ("digits", "words"):
        if cell := known.get(f"time|{name}"):
            lines += ["", f"| {name} | time over first-hitting's |", "|---|--:|"]
            lines += [f"| {run} | {ratio:.2f} |" for run, ratio in cell.items()]
    return "\n".join([*lines, ""])


# --- the figure ------------------------------------------------------------------------------------------------------


def page(figure) -> None:
    """Distances by calls, on the toy and on the digits, and what float32 loses by steps."""
    known = json.loads(RESULTS.read_text())["results"]
    toys, pictures, lost = figure.subplots(1, 3)

    def fd(name: str) -> tuple[float, float]:
        cells = [cell for key, cell in known.items() if key.startswith(f"digits|{name}|")]
        return float(np.mean([c["calls"] for c in cells])), float(np.mean([c["fd"] for c in cells]))

    found = [known[f"toy|{name}"] for name in TOYS if name.startswith("ancestral") and "float" not in name]
    toys.plot(
        [1, 2, 4, 8, 16, 64, 256, 1000],
        [c["tv"] for c in found],
        "o-",
        markersize=3,
        label="ancestral, by steps",
    )
    toys.plot(4, known["toy|first-hitting"]["tv"], "s", color="C1", label="first-hitting, 4 calls")
    toys.plot(2, known["toy|first-hitting, 2 a call"]["tv"], "v", color="C2", label="2 a call")
    toys.plot(
        2, known["toy|first-hitting, 2 a call, order 2"]["tv"], "^", color="C3", label="2 a call, order 2"
    )
    toys.axhline(known["toy|floor"]["tv"], color="0.5", linestyle=":", label="exact draws")
    toys.set(xscale="log", yscale="log", xlabel="steps, or calls", ylabel="total variation to the joint")

    lines = {
        "ancestral": [f"ancestral, T = {t}" for t in STEPS],
        "first-hitting, K a call": [*(f"first-hitting, {k} a call" for k in PARALLEL[::-1]), "first-hitting"],
        "the same, order 2": [f"first-hitting, {k} a call, order 2" for k in PARALLEL[::-1]],
    }
    for (label, names), colour in zip(lines.items(), ("C0", "C1", "C3"), strict=True):
        points = [fd(name) for name in names]
        pictures.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=label)
    pictures.axhline(known["real|train"]["fd"], color="0.5", linestyle=":", label="training digits")
    pictures.set(xscale="log", xlabel="calls a sample needs", ylabel="FD of 500 digits", ylim=(0, None))
    pictures.set_xticks([4, 8, 16, 32, 64], labels=["4", "8", "16", "32", "64"])
    pictures.minorticks_off()

    for name, rows in known["laws"].items():
        lost.plot(
            LONG,
            [rows["true"][0] - rows[str(t)][0] for t in LONG],
            "o-",
            markersize=3,
            label=f"{name}, {WORDS if name == 'words' else LEVELS}",
        )
    lost.set(xscale="log", yscale="log", xlabel="steps", ylabel="entropy lost by float32 draws, nats")
    for axis in (toys, pictures, lost):
        axis.legend(fontsize=7)


if __name__ == "__main__":
    command(__doc__, RESULTS, jobs(), tables)
