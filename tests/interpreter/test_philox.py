"""The noise kernel by the interpreter: the reference's normals, and the same bits for every block and split."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fewstep.kernels import lang, philox
from fewstep.kernels.lang import jit, tl
from fewstep.samplers.noise import normal


@pytest.mark.parametrize("case", [c for c in philox.CASES if not c.real], ids=lambda c: c.name)
def test_the_references_normals(case, monkeypatch):
    arguments = case.make("cpu")
    expected = philox.reference(**arguments)
    monkeypatch.setattr(philox, "reference", None)  # whoever answers now, it is not the reference
    for found in (philox.normals(**arguments), philox.op(**arguments)):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert not found.numel() or float((found - expected).abs().max()) <= 3e-6


@jit
def corners(words, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = philox.box_muller(tl.load(words + i).to(tl.uint32), tl.load(words + N + i).to(tl.uint32))
    tl.store(out + i, x)
    tl.store(out + N + i, y)


def test_the_tails_and_quadrants():
    """All radii at the ends and about one, against all angles where the quadrant changes."""
    ends = torch.tensor([0, 1, 2, 2**22 - 1, 2**22, 2**23 - 3, 2**23 - 2, 2**23 - 1])
    borders = torch.cat([torch.arange(9)[:, None] * 2**20 + torch.arange(-3, 4)]).flatten() % 2**23
    grid = torch.cartesian_prod(ends, torch.cat([borders, borders[:1]])).T.contiguous()
    out = torch.zeros(grid.shape)
    corners[(1,)](grid << 9, out, N=grid.shape[1])
    radius, angle = (grid.double() + 0.5) * 2.0**-23
    r, turn = torch.sqrt(-2 * torch.log(radius)), 2 * torch.pi * angle
    expected = torch.stack([r * torch.cos(turn), r * torch.sin(turn)])
    assert float(expected.abs().max()) > 5.7
    assert float((out - expected).abs().max()) <= 3e-6


def test_blocks_and_splits_change_no_bit(monkeypatch):
    ids = torch.arange(7) * 2**29
    whole = normal(3, ids, (5, 77), row=4)
    for block in (16, 64, 4096):
        monkeypatch.setattr(philox, "BLOCK", block)
        assert torch.equal(whole, normal(3, ids, (5, 77), row=4))
    assert torch.equal(whole, torch.cat([normal(3, ids[k : k + 3], (5, 77), row=4) for k in (0, 3, 6)]))
    assert torch.equal(whole[:, :1, :13], normal(3, ids, (1, 13), row=4))
    assert torch.equal(whole[2:], normal(torch.full((5,), 3), ids[2:], (5, 77), row=torch.full((5,), 4)))
    assert not torch.equal(whole, normal(3 + 2**32, ids, (5, 77), row=4))


def test_the_reference_on_request():
    ids = torch.arange(2)
    asked = normal(1, ids, (64,), impl="reference")
    assert torch.equal(asked, philox.reference(torch.tensor([1]), ids, 64, torch.tensor([0]), 2))


def test_launches_go_to_the_first_tensors_gpu(monkeypatch):
    ran, entered = [], []

    class OnGpu(torch.Tensor):
        is_cuda = True

    guarded = lang._on_its_gpu(lambda *args, **kwargs: ran.append(list(entered)))
    there = torch.zeros(1).as_subclass(OnGpu)

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor is there)
        yield
        entered.clear()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    guarded(1, there, torch.zeros(1))
    guarded(torch.zeros(1))
    assert ran == [[True], []]
    philox.launch(**philox.CASES[0].make("cpu"))
    assert philox.normals_kernel.run.__wrapped__  # every launch goes that way
