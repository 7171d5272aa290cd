"""The linear-Gaussian bed: teacher N(m, S), student G(z) = A z + b, everything in closed form, no sampling noise.

``z`` and ``eps`` are moment-matched and antithetic: their means are 0 and their second moments the identity, jointly,
so every quadratic expectation over them is exact.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewstep.models import GaussianMixture, paths

DIM = 3
PATHS = {
    "edm": (paths.edm(), 0.8),
    "vp": (paths.vp_linear(), 0.4),
    "flow": (paths.flow(), 0.55),
}


@pytest.fixture(scope="session")
def pipelines():
    """The tiny pipelines of the samplers' tests."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    file = Path(__file__).parents[1] / "samplers/pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_two_ranks(tmp_path):
    """``on_two_ranks(lines)`` runs Python under torchrun, with ``fewstep.distill.run`` there as ``run``.

    One launch for all that a test wants: starting three interpreters takes longer than small runs.
    """

    def launch(lines: str) -> None:
        script = tmp_path / "ranks.py"
        script.write_text(f"from fewstep.distill import parallel, run\n{lines}\nparallel.finish()\n")
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            str(script),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]

    return launch


@pytest.fixture(params=list(PATHS))
def bed(request):
    return gaussian_bed(request.param)


def gaussian_bed(name: str) -> SimpleNamespace:
    random = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    path, t = PATHS[name]
    m, b = normal(DIM), normal(DIM)
    root = normal(DIM, DIM)
    s = root @ root.T + 0.5 * torch.eye(DIM, dtype=torch.float64)
    a = 0.7 * normal(DIM, DIM)
    n = 32
    draws = torch.linalg.qr(normal(n, 2 * DIM))[0] * math.sqrt(n)
    draws = torch.cat([draws, -draws])
    draws = draws / draws.square().mean(0).sqrt()
    z, eps = draws[:, :DIM], draws[:, DIM:]
    alpha, sigma = path.alpha(t), path.sigma(t)
    p = alpha**2 * s + sigma**2 * torch.eye(DIM, dtype=torch.float64)
    q = alpha**2 * a @ a.T + sigma**2 * torch.eye(DIM, dtype=torch.float64)
    return SimpleNamespace(
        path=path, t=t, alpha=alpha, sigma=sigma, m=m, s=s, a=a, b=b, z=z, eps=eps, p=p, q=q,
        teacher=GaussianMixture([1.0], m[None].numpy(), s[None].numpy()).denoiser(path),
        critic=GaussianMixture([1.0], b[None].numpy(), (a @ a.T)[None].numpy()).denoiser(path),
    )  # fmt: skip


@pytest.fixture
def student_gradients():
    """The gradients on A and b of a loss of x0 = A z + b and its noised x_t."""

    def gradients(bed, loss):
        a, b = bed.a.clone().requires_grad_(), bed.b.clone().requires_grad_()
        x0 = bed.z @ a.T + b
        return torch.autograd.grad(loss(x0, bed.alpha * x0 + bed.sigma * bed.eps), (a, b))

    return gradients
