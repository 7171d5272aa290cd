"""Two ranks give what one gives: uneven shares, a rank that has nothing, errors on every rank alike."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fewstep.eval import Stats, extractor, measure, reference_of, see, stream_stats
from fewstep.eval.moments import over_ranks
from fewstep.eval.ranks import ALONE, Ranks, gather_rows, share


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_runs_that_cover_everything(count, world):
    shares = [share(count, Ranks(rank, world)) for rank in range(world)]
    assert [row for rows in shares for row in rows] == list(range(count))
    sizes = [len(rows) for rows in shares]
    assert max(sizes) - min(sizes) <= 1


def test_alone_nothing_is_sent():
    x = torch.randn(5, 3)
    stats = stream_stats([x])
    assert gather_rows(x, ALONE) is x and over_ranks(stats, ALONE) is stats


# Far from the origin, so that sums of squares would show their cancellation.
ROWS = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
CUTS = {"uneven": 37, "one rank has one": 49, "the last has nothing": 50, "the first has nothing": 0}


def images(seed: int, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=draw)


def of_one(ranks: Ranks) -> dict:
    """What is compared: moments in every split, rows, and numbers from images."""
    found = {}
    for name, cut in CUTS.items():
        mine = ROWS if ranks.world == 1 else ROWS[:cut] if ranks.first else ROWS[cut:]
        stats = stream_stats([mine]) if len(mine) else Stats()
        found[name] = over_ranks(stats, ranks)
        found[name + ", rows"] = gather_rows(mine if len(mine) else None, ranks)
    judge = extractor("digits")
    reference = reference_of(images(1, 40), judge, batch=7, ranks=ranks)
    for count in (2, 3, 31):  # in batches of 4: the second rank has nothing, nothing, and 15
        seen = see(images(2, count), judge, batch=4, ranks=ranks)
        metrics = (
            ["fd"] if count < 10 else ["fd", "fd-infinity", "kid", "kid-full", "is", "prdc", "cmmd", "sw2"]
        )
        found[f"{count} images"] = [number.record() for number in measure(seen, reference, metrics)]
    return found


def process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        ranks = Ranks(rank, 2)
        torch.save((of_one(ranks), of_different_kinds(ranks)), folder / f"{rank}.pt")
        ranks.wait()  # torch 2.6's gloo may hang where one leaves long before the other
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list:
    """What each of two processes, which run this file, found and said."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [[sys.executable, __file__, str(rank), str(port), str(folder)] for rank in range(2)]
    running = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for line in words]
    said = [process.communicate(timeout=110)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_are_one(both):
    one = of_one(ALONE)
    for two, _ in both:
        for name in CUTS:
            assert two[name].n == 50
            assert torch.allclose(two[name].mean, one[name].mean, rtol=1e-14, atol=0)
            # Relative to the covariance, 1e8 smaller than the squares of the features.
            scale = float(one[name].scatter.abs().max())
            assert float((two[name].scatter - one[name].scatter).abs().max()) <= 1e-10 * scale
            assert torch.equal(two[name + ", rows"], one[name + ", rows"])
        for name in [name for name in one if name.endswith("images")]:
            assert len(two[name]) == len(one[name])
            for ours, theirs in zip(two[name], one[name]):
                assert ours.pop("value") == pytest.approx(theirs["value"], rel=1e-10, abs=1e-10)
                assert (ours.pop("stderr") is None) == (theirs["stderr"] is None)
                assert ours.items() <= theirs.items()


def of_different_kinds(ranks: Ranks) -> list[str]:
    said = []
    for attempt in (
        lambda: over_ranks(stream_stats([ROWS[:, : 3 + ranks.rank]]), ranks),
        lambda: gather_rows(ROWS[:, : 3 + ranks.rank], ranks),
        # the second rank's share has another size
        lambda: see(Mixed.images(), extractor("digits", resize="clean"), batch=2, ranks=ranks),
        lambda: see(Mixed.broken(), extractor("digits"), batch=2, ranks=ranks),
    ):
        try:
            attempt()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


class Mixed:
    @staticmethod
    def images():
        from fewstep.eval import Images

        return Images("mixed", 4, lambda i: images(0, 1)[0] if i < 2 else torch.zeros(1, 9, 9).byte(), str)

    @staticmethod
    def broken():
        from fewstep.eval import Images

        def read(i: int) -> torch.Tensor:
            if i == 3:
                raise ValueError("damaged")
            return images(0, 1)[0]

        return Images("broken", 4, read, str)


def test_what_is_wrong_on_one_is_said_by_all(both):
    for _, said in both:
        assert said[0] == "ranks saw features of [3, 4] dimensions; expected one number for all"
        assert said[1].startswith("ranks have rows of different kinds")
        assert said[2].startswith("images of mixed have shapes [(1, 8, 8), (1, 9, 9)]")
        assert said[3].startswith("1 of 2 images of broken cannot be read: 3 (damaged)")


if __name__ == "__main__":
    process(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
