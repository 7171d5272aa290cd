"""The weights that turn an error of x0 into one of any other target."""

import pytest
import torch

from fewstep.distill.losses import denoising_loss, x0_weight
from fewstep.distill.losses.denoising import WEIGHTS
from fewstep.models import Denoiser, paths


@pytest.mark.parametrize("path", [paths.edm(), paths.vp_linear(), paths.flow()], ids=lambda p: p.name)
def test_each_weight_is_the_squared_error_of_its_target(path):
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    alpha, sigma = (v(t)[:, None] for v in (path.alpha, path.sigma))
    random = torch.Generator().manual_seed(0)
    x0, eps, estimate = torch.randn(3, 2, 5, dtype=torch.float64, generator=random).unbind()
    x = alpha * x0 + sigma * eps
    noise = (x - alpha * estimate) / sigma
    pairs = {
        "x0": (estimate, x0),
        "eps": (noise, eps),
        "flow": (noise - estimate, eps - x0),
        "v": (alpha * noise - sigma * estimate, alpha * eps - sigma * x0),
        "score": (-noise / sigma, -eps / sigma),
    }
    for name, (got, wanted) in pairs.items():
        loss = denoising_loss(estimate, x0, path.alpha(t), path.sigma(t), name)
        torch.testing.assert_close(loss, (got - wanted).square().mean(), rtol=1e-10, atol=0)


def test_edm_s_weight_is_its_network_s_own_target():
    sigma = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    d = Denoiser(lambda x, tau: x, paths.edm(), predicts="x0", precond="edm", sigma_data=0.4)
    _, (q,) = d.affine(sigma, "x0")  # x0 = p x + q F
    torch.testing.assert_close(x0_weight("edm", 1.0, sigma, 0.4), 1 / q**2)
    # as DMD2 writes it
    torch.testing.assert_close(x0_weight("edm", 1.0, sigma, 0.4), sigma**-2 + 0.4**-2)


def test_min_snr_is_capped_for_numbers_and_tensors():
    assert x0_weight("min_snr", 1.0, 0.1) == 5.0 and x0_weight("min_snr", 0.5, 0.5) == 1.0
    tensor = x0_weight("min_snr", torch.tensor([1.0, 0.5]), torch.tensor([0.1, 0.5]))
    torch.testing.assert_close(tensor, torch.tensor([5.0, 1.0]))


def test_every_weight_is_listed_and_others_are_refused():
    for name in WEIGHTS:
        assert x0_weight(name, 0.5, 0.5) > 0
    with pytest.raises(ValueError, match="weight must be one of x0, eps, .* got 'snr'"):
        x0_weight("snr", 0.5, 0.5)
    with pytest.raises(ValueError, match="x0's shape"):
        denoising_loss(torch.zeros(2, 3), torch.zeros(2, 4), 0.5, 0.5)
