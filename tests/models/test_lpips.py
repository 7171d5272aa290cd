"""LPIPS on random weights: the formula, its invariances, and files that are not its weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fewstep.models.lpips import lpips

WIDTHS = (4, 6, 8, 8, 8)  # a VGG16 in the arrangement of its layers, narrower


def vgg():
    """As torchvision builds it: convolution, relu, .., a pooling before every block but the first."""
    torch.manual_seed(0)
    layers, width = [], 3
    for level, (out, count) in enumerate(zip(WIDTHS, (2, 2, 3, 3, 3))):
        layers += [nn.MaxPool2d(2)] if level else []
        for _ in range(count):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, net = tmp_path_factory.mktemp("lpips"), vgg()
    save_file(
        {f"features.{name}": p.contiguous() for name, p in net.state_dict().items()},
        folder / "vgg.safetensors",
    )
    generator = torch.Generator().manual_seed(1)
    heads = {
        f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for k, w in enumerate(WIDTHS)
    }
    save_file(heads, folder / "heads.safetensors")
    return folder, net, heads


def test_it_is_the_sum_over_blocks_of_weighted_squares(files):
    folder, net, heads = files
    a, b = (torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(k)) * 2 - 1 for k in (2, 3))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    wanted, levels = torch.zeros(2), {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}  # after the last relu of a block
    x, y = ((v - shift[:, None, None]) / scale[:, None, None] for v in (a, b))
    for k, layer in enumerate(net):
        x, y = layer(x), layer(y)
        if k in levels:
            weight = heads[f"lin{levels[k]}.model.1.weight"].reshape(-1)
            one, two = (v / v.norm(dim=1, keepdim=True).clamp_min(1e-10) for v in (x, y))
            wanted += torch.einsum("bchw,c->bhw", (one - two) ** 2, weight).mean((1, 2))
    distance = lpips(folder / "vgg.safetensors", folder / "heads.safetensors")
    torch.testing.assert_close(distance(a, b), wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(distance(a, a), torch.zeros(2)) and torch.equal(distance(a, b), distance(b, a))
    grey = a[:, :1]
    assert torch.equal(
        distance(grey, -grey), distance(grey.expand(-1, 3, -1, -1), -grey.expand(-1, 3, -1, -1))
    )


def test_it_is_the_packages(tmp_path):
    """Beside the lpips package itself, where that is installed: a random backbone, and the heads that it ships."""
    lpips_package = pytest.importorskip("lpips")
    reference = lpips_package.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    held = {f"features.{n.split('.', 1)[1]}": p.contiguous() for n, p in reference.net.state_dict().items()}
    held |= {
        n: p.contiguous()
        for n, p in reference.state_dict().items()
        if n.startswith("lin") and "lins" not in n
    }
    save_file({n: p.clone() for n, p in held.items()}, tmp_path / "both.safetensors")
    distance = lpips(*[tmp_path / "both.safetensors"] * 2)
    a, b = (torch.rand(2, 3, 33, 47, generator=torch.Generator().manual_seed(k)) * 2 - 1 for k in (2, 3))
    with torch.no_grad():
        torch.testing.assert_close(distance(a, b), reference(a, b).flatten(), rtol=1e-5, atol=0)


def test_it_scores_minorities(files):
    from fewstep.models import Denoiser, paths
    from fewstep.samplers import minority_score

    folder, _, _ = files
    d = Denoiser(lambda x, tau: torch.zeros_like(x), paths.edm(), "x0")  # what comes back is grey
    x = torch.stack([torch.zeros(1, 16, 16), torch.rand(1, 16, 16)])
    plain, busy = minority_score(
        d, x, 1.0, lpips(*[folder / f"{n}.safetensors" for n in ("vgg", "heads")]), draws=1
    )
    assert plain == 0 and busy > 0


def test_what_is_not_its_weights_is_named(files, tmp_path):
    folder, _, _ = files
    good, heads = folder / "vgg.safetensors", folder / "heads.safetensors"
    with pytest.raises(FileNotFoundError, match="vgg must be"):
        lpips(tmp_path / "none.safetensors", heads)
    with pytest.raises(ValueError, match="heads must hold lin0.model.1.weight and 4 more"):
        lpips(good, good)
    (tmp_path / "vgg.pth").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="weights_only=True"):
        lpips(tmp_path / "vgg.pth", heads)
    distance = lpips(good, heads)
    for a, b in ((torch.zeros(1, 1, 8, 8),) * 2, (torch.zeros(1, 2, 32, 32),) * 2):
        with pytest.raises(ValueError, match="images must be"):
            distance(a, b)
    with pytest.raises(ValueError, match="one shape"):
        distance(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
