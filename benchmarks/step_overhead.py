"""What a step costs outside the network, beside diffusers' schedulers: ``eval.bench_solvers`` at 4 x 4 x 64 x 64.

OMP_NUM_THREADS=1 python benchmarks/step_overhead.py --out step_overhead.json
"""

from __future__ import annotations

import argparse

import torch

from fewstep.eval import bench
from fewstep.eval.bench_solvers import measure, show


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The cost of a step outside the network, beside diffusers' schedulers."
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", help="also write JSON here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.steps, options.repeats)
    print(show(result))
    if options.out:
        bench.save(options.out, result)


if __name__ == "__main__":
    main()
