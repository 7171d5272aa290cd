"""``fewstep pairs RECIPE --out FILE``: the pairs that a preference recipe would make from its reward, and no more.

    fewstep pairs dpo-digits reward=ink --out ink.safetensors
    torchrun --nproc_per_node=8 -m fewstep pairs dpo-sdxl teacher.path=SDXL data.path=prompts.txt \\
        reward=package.module:function method.groups.guidance=7 --out pairs.safetensors

Any preference method of the same teacher takes the file: ``pairs=FILE``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import parallel
from .opening import open_batches, open_teacher
from .pairs import make_file, read_pairs
from .precision import autocast
from .schema import read
from .student import sampled


def make(source: str, overrides: Sequence[str], out: Path) -> None:
    """Make the file of a recipe's pairs."""
    recipe, method = read(source, overrides)
    if not hasattr(method, "groups"):
        raise ValueError(f"{recipe.method['name']} learns from no pairs; dpo, inpo, smpo and mapo do")
    if method.reward is None:
        raise ValueError("pairs are made from a reward: give reward=NAME")
    torch.set_num_threads(recipe.threads)
    ranks = parallel.start(recipe.device)
    teacher = open_teacher(recipe).to(ranks.device)
    data = open_batches(recipe, teacher, ranks)
    base = sampled(teacher, recipe.student)
    with autocast(recipe.train.precision, ranks.device):
        make_file(out, method.reward, base, data, method.groups, recipe.seed, ranks)
    if ranks.first:
        pairs = read_pairs(out, data.shape)
        better, worse = pairs.scores.mean(0).tolist()
        print(f"{out}: {len(pairs.winner)} pairs, mean scores {better:.4g} and {worse:.4g}")


def main(argv: Sequence[str] | None = None) -> int:
    """``fewstep pairs``."""
    parser = argparse.ArgumentParser(
        prog="fewstep pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="dpo-digits, or any recipe of a preference method")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. reward=ink method.groups.count=1000")
    parser.add_argument("--out", type=Path, required=True, help="a new .safetensors")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.out.exists():
        raise FileExistsError(f"{arguments.out} exists already: --out must name a new file")
    try:
        make(arguments.recipe, arguments.overrides, arguments.out)
    finally:
        parallel.finish()
    return 0
