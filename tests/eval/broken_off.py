"""Makes samples in processes that it forks, kills and starts again. It is a process of its own: a test has threads,
and with these one must not fork.

    python broken_off.py killed FOLDER | ranks FOLDER PORT
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fewstep.eval.generate import generate
from fewstep.eval.ranks import finish, start
from fewstep.samplers import starting_noise

TOLD, SIZES = {"model": "noise", "seed": 3}, {"per_shard": 100, "batch": 32}


def make(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return starting_noise(3, ids, (3, 4, 4)).clamp(-1, 1), ids % 10


def slowly(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    time.sleep(0.005)
    return make(ids)


def child(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def killed(folder: Path) -> None:
    """Five times, at random: somewhere in the shards after the next one to three."""
    draw = random.Random(0)
    for _ in range(5):
        wanted = len(list(folder.glob("?????.npz"))) + draw.randint(1, 3)
        pid = child(lambda: generate(slowly, folder, 2000, TOLD, **SIZES))
        while len(list(folder.glob("?????.npz"))) < wanted:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(len(list(folder.glob("?????.npz"))))


def ranks(folder: Path, port: str) -> None:
    def rank(number: int) -> None:
        os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=port)  # fmt: skip
        generate(make, folder, 2000, TOLD, ranks=(held := start("cpu")), **SIZES)
        held.wait()
        finish()

    children = [child(lambda n=n: rank(n)) for n in range(2)]
    sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, *more = sys.argv[1:]
    {"killed": killed, "ranks": ranks}[what](Path(folder), *more)
