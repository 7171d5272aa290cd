"""The mixture's kernels by the interpreter: against float64, at the edges, and through the exact denoisers."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import cases, mixture_kernels, mixture_score
from fewstep.models import GaussianMixture, IdealDenoiser, paths

score = mixture_score.mixture_score


def both(arguments, **options):
    """(mean, density, gradient at x) by the kernel in float32, and by the reference in float64."""
    results = []
    for run, given in ((mixture_score.op, arguments), (mixture_score.reference, cases.exact(arguments))):
        x = given["x"].detach().clone().requires_grad_()
        found = run(**given | {"x": x})
        generator = torch.Generator().manual_seed(5)
        slopes = [torch.randn(f.shape, generator=generator).to(f) for f in found]
        slopes[1] = slopes[1].where(~found[1].isnan(), 0)
        results.append((*(f.detach() for f in found), *torch.autograd.grad(found, x, slopes)))
    return results


@pytest.mark.parametrize("case", [c for c in mixture_score.CASES if not c.real], ids=lambda c: c.name)
def test_against_float64(case):
    found, wanted = both(case.make("cpu"))
    assert cases.error(found[:2], wanted[:2]) <= case.tolerance
    assert cases.error(found[2], wanted[2]) <= 1e-4


def test_it_is_the_kernel_that_answers(monkeypatch):
    arguments = mixture_score.CASES[2].make("cpu")
    wanted = mixture_score.reference(**arguments)
    monkeypatch.setattr(mixture_score, "reference", None)
    assert cases.error(score(**arguments), wanted) <= 1e-5


def around(rows, sigma, queries=None, alpha=1.0):
    queries = rows if queries is None else queries
    x = alpha * queries + sigma * cases.randn(*queries.shape, seed=9)
    each = torch.ones(len(x))
    return {"x": x, "alpha": alpha * each, "sigma": sigma * each, "rows": rows}


def test_outliers_do_not_underflow():
    arguments = around(cases.randn(70, 3), 0.1)
    arguments["x"] = arguments["x"] * 300
    found, wanted = both(arguments)
    assert torch.isfinite(found[0]).all() and float(wanted[1].detach().max()) < -1e5
    assert cases.error(found[:2], wanted[:2]) <= 1e-5
    # the gradient of the density is 1e5 here, and its rounding is that of the distances
    assert cases.error(found[2], wanted[2]) <= 1e-4


def test_near_and_exact_duplicates():
    """Rows 0.02 apart at sigma = 0.02: the weights hang on differences of distances that are tiny beside the norms."""
    rows = cases.randn(10, 24)
    rows = torch.cat([rows, rows, rows + 0.02 * cases.randn(10, 24, seed=3)])
    arguments = around(rows, 0.02, queries=rows[:20] + 0.004)
    found, wanted = both(arguments)
    assert cases.error(found[:2], wanted[:2]) <= 1e-5 and cases.error(found[2], wanted[2]) <= 1e-4
    # negative control: in float32 products lose ten times what differences do
    products = mixture_score.reference(**arguments)
    assert cases.error(products, wanted[:2]) > 10 * cases.error(found[:2], wanted[:2])


def test_the_clean_end_and_mixed_noise():
    rows = torch.cat([cases.randn(40, 5), cases.randn(40, 5)[:3]])  # three rows twice
    arguments = around(rows, 0.3)
    arguments["sigma"][::2] = 0
    found, wanted = both(arguments)
    assert torch.equal(found[1].isnan(), arguments["sigma"] == 0)
    assert cases.error(found[0], wanted[0]) <= 1e-5 and cases.error(found[2], wanted[2]) <= 1e-4
    assert not found[2][::2].any()


def test_no_label_matches_in_some_tiles():
    rows = cases.randn(150, 4)
    arguments = around(rows, 0.5, queries=rows[:20])
    arguments |= {"label": torch.arange(20) % 3, "labels": torch.arange(150) // 60}
    found, wanted = both(arguments)
    assert cases.error(found, wanted) <= 1e-5


def test_batches_blocks_and_strides(monkeypatch):
    monkeypatch.setattr(mixture_kernels, "ROWS", 64)
    rows = cases.randn(150, 9)
    arguments = around(rows, 0.4, queries=rows[:50])
    whole = mixture_score.launch(**arguments)
    assert mixture_kernels._splits(150) == (3, 64)
    for part in (slice(0, 1), slice(1, 34), slice(34, 50)):
        some = mixture_score.launch(**{k: v if k == "rows" else v[part] for k, v in arguments.items()})
        assert torch.equal(some[0], whole[0][part]) and torch.equal(some[1], whole[1][part])
    same = arguments | {k: arguments[k].mean().expand(50) for k in ("alpha", "sigma")}
    assert cases.error(mixture_score.launch(**same), whole) <= 1e-6
    strided = {k: v.repeat_interleave(2, 0)[::2] for k, v in arguments.items()} | {
        "rows": rows.T.contiguous().T
    }
    assert not strided["x"].is_contiguous() and not strided["rows"].is_contiguous()
    assert torch.equal(mixture_score.launch(**strided)[0], whole[0])
    monkeypatch.setattr(mixture_kernels, "WORKSPACE", 17 * 9 * 3)  # three launches
    assert torch.equal(mixture_score.launch(**arguments)[0], whole[0])


def test_the_exact_denoisers_use_it(monkeypatch):
    monkeypatch.setattr(mixture_score, "reference", None)
    path, rows, x = paths.flow(), cases.randn(60, 2).double() + 30, 20 + cases.randn(11, 2)
    t = torch.linspace(0.0, 0.9, 11).double()
    ideal = IdealDenoiser(rows, path, labels=torch.arange(60) % 3, dtype=torch.float32)
    label = torch.arange(11) % 4 - 1
    found, density = ideal(x, t, label=label), ideal.log_prob(x[1:], t[1:], label=label[1:])
    mixture = GaussianMixture(torch.arange(60) + 1.0, rows, 0.04, dtype=torch.float32)
    soft, logs = mixture.denoiser(path)(x, t, label=label), mixture.log_prob(x, path, t)
    monkeypatch.undo()
    exact = IdealDenoiser(rows, path, labels=torch.arange(60) % 3)
    precise = GaussianMixture(torch.arange(60) + 1.0, rows, 0.04)
    assert cases.error(found, exact(x.double(), t, label=label)) <= 1e-5
    assert cases.error(density, exact.log_prob(x[1:].double(), t[1:], label=label[1:])) <= 1e-5
    assert cases.error(soft, precise.denoiser(path)(x.double(), t, label=label)) <= 1e-5
    assert cases.error(logs, precise.log_prob(x.double(), path, t)) <= 1e-5
