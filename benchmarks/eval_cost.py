"""What measuring costs: the trace of FID by every route, and streamed statistics beside their matrix products.

One thread, float64, interleaved. Traces: two covariances of 2,048 dimensions with spectra over six decades that do not
commute. Statistics: 50,000 rows of 2,048 float32 features in batches of 250, against the plain products X^T X of the
same batches in float64, summed in place, with nothing else done to them.

    OMP_NUM_THREADS=1 python benchmarks/eval_cost.py --out benchmarks/results/eval-cost-cpu.json
"""

from __future__ import annotations

import argparse

import torch

from fewstep.eval import Gaussian, bench, frechet_distance, stream_stats
from fewstep.eval.frechet import trace_term


def covariance(dim: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=draw))[0]
    cov = q * torch.logspace(1, -5, dim, dtype=torch.float64) * (1 + seed) @ q.T
    return (cov + cov.T) / 2


def traces(dim: int, slow: bool) -> dict:
    """name -> the trace of (A^1/2 B A^1/2)^1/2 by that route; slow: also those that take many times as long."""
    a, b = covariance(dim, 1), covariance(dim, 2)
    zero = torch.zeros(dim, dtype=torch.float64)
    pair = Gaussian(zero, a), Gaussian(zero, b)

    def cholesky():
        lower = torch.linalg.cholesky(a)
        return torch.linalg.eigvalsh(lower.T @ b @ lower).clamp_min(0).sqrt().sum()

    def symmetric():
        values, vectors = torch.linalg.eigh(a)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        return torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()

    def singular():
        return torch.linalg.svdvals(torch.linalg.cholesky(a).T @ torch.linalg.cholesky(b)).sum()

    def product():
        return torch.linalg.eigvals(a @ b).sqrt().real.sum()

    def sqrtm():
        from scipy import linalg

        return torch.tensor(linalg.sqrtm((a @ b).numpy()).real.trace())

    fast = {
        "ours": lambda: trace_term(*pair),
        "ours, all of fd with its checks": lambda: torch.tensor(frechet_distance(*pair)),
        "cholesky, eigvalsh(L^T B L)": cholesky,
        "two choleskys, singular values": singular,
    }
    others = {
        "eigh, eigvalsh(R B R)": symmetric,
        "eigvals of the product (torch-fidelity, torchmetrics)": product,
        "scipy sqrtm (pytorch-fid, clean-fid, EDM)": sqrtm,
    }
    return {**fast, **others} if slow else fast


def statistics(rows: int, dim: int, batch: int) -> dict:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(4 * batch, dim, generator=draw) + torch.randn(dim, generator=draw)
    wide = features.double()

    def batches(x):
        for first in range(0, rows, batch):
            at = first % len(x)
            yield x[at : at + min(batch, rows - first)]

    def products():
        total = torch.zeros(dim, dim, dtype=torch.float64)
        for some in batches(wide):
            total.addmm_(some.T, some)
        return total

    return {
        "the matrix products": products,
        "ours, stream_stats": lambda: stream_stats(batches(features)).finish(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=50000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    routes = traces(arguments.dim, slow=False)
    results = {"trace": bench.compare(routes, arguments.repeats, 1)}
    print(bench.table(results["trace"]), flush=True)
    slow = {
        name: fn
        for name, fn in traces(arguments.dim, slow=True).items()
        if name == "ours" or name not in routes
    }
    results["trace, slow routes"] = bench.compare(slow, 1, 0)
    print(bench.table(results["trace, slow routes"]), flush=True)
    values = {name: float(fn()) for name, fn in routes.items() if "all of fd" not in name}
    results["trace, values"] = values
    print("\n".join(f"{value:.10g}  {name}" for name, value in values.items()), flush=True)
    results["statistics"] = bench.compare(
        statistics(arguments.rows, arguments.dim, 250), arguments.repeats, 0
    )
    print(bench.table(results["statistics"]), flush=True)
    if arguments.out:
        bench.save(arguments.out, {"dim": arguments.dim, "rows": arguments.rows, **results})


if __name__ == "__main__":
    main()
