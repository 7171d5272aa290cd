"""Features and metrics equal torch-fidelity's, on random weights in a file, where real ones would be."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fewstep.eval import (
    extractor,
    inception_score,
    kernel_distance,
    measure,
    prdc,
    reference_of,
    save_folder,
    see,
)
from fewstep.eval.protocol import replace

try:
    import torch_fidelity
    import torch_fidelity.feature_extractor_clip as their_clip
    import torch_fidelity.feature_extractor_inceptionv3 as their_inception
except (
    ImportError,
    RuntimeError,
) as error:  # torchvision raises RuntimeError beside a torch it was not built for
    pytest.skip(f"torch-fidelity does not import: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights in the layout of FID's network."""
    file = Path(__file__).with_name("inception_stand_in.py")
    spec = importlib.util.spec_from_file_location("inception_stand_in", file)
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    return stand_in.random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def pictures(count: int, seed: int, side: int = 32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(count, 3, 8, 8, generator=draw), size=side) + 0.3 * seed
    return (x * 64 + 128).round().clamp(0, 255).to(torch.uint8)


def theirs(weights, x: torch.Tensor, layers: list[str]) -> list[torch.Tensor]:
    made = their_inception.FeatureExtractorInceptionV3(
        "x", layers, feature_extractor_weights_path=str(weights)
    )
    return list(made(x))


def test_every_layer_of_inception_bit_by_bit(weights):
    x = pictures(1, 0)
    names = {"inception-64": "64", "inception-192": "192", "inception-768": "768", "inception": "2048"}
    expected = theirs(weights, x, [*names.values(), "logits_unbiased"])
    for (name, layer), values in list(zip(names.items(), expected))[
        1:
    ]:  # the first one below, by their whole program
        ours = extractor(name, weights)
        seen = ours(x)
        assert torch.equal(seen.values, values) and seen.values.shape == (1, int(layer))
        assert (ours.size, ours.resize, ours.published) == (299, "tensorflow", False)
    assert torch.equal(seen.logits, expected[4])


def test_metrics_of_a_folder(weights, tmp_path):
    """Their whole program on the first layer, which a CPU can afford; d = 64 > N, the hard case of the trace."""
    count = 8
    for name, seed in (("a", 0), ("b", 1)):
        save_folder(tmp_path / name, pictures(count, seed))
    found = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        fid=True,
        kid=True,
        prc=True,
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_layer_prc="64",
        feature_extractor="inception-v3-compat",  # precision and recall are VGG's by default
        kid_subset_size=6,
    )
    network = extractor("inception-64", weights)
    seen, reference = see(tmp_path / "a", network), reference_of(tmp_path / "b", network)
    assert seen.protocol == replace(network.protocol, num=count) and len(network.weights) == 64
    fd, precision, recall, *_ = measure(seen, reference, ["fd", "prdc"])
    assert fd.value == pytest.approx(found["frechet_inception_distance"], rel=1e-5)
    kid = kernel_distance(seen.features, reference.features, subsets=100, subset_size=6, seed=2020)
    assert kid.value == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-5)
    assert kid.stderr * 10 == pytest.approx(
        found["kernel_inception_distance_std"] * (100 / 99) ** 0.5, rel=1e-5
    )
    # They take float32 distances, we float64: no distance of these is that close to a border.
    assert (precision.value, recall.value) == pytest.approx((found["precision"], found["recall"]), abs=1e-6)

    # The resize alone changes the number, and the two are refused a comparison.
    other = extractor("inception-64", weights, resize="clean")
    (clean,) = measure(see(tmp_path / "a", other), reference_of(tmp_path / "b", other))
    assert abs(clean.value / fd.value - 1) > 1e-3
    with pytest.raises(
        ValueError, match="do not compare: resize is 'clean' in one and 'tensorflow' in the other"
    ):
        assert clean < fd
    with pytest.raises(ValueError, match="samples and b do not compare: resize is 'clean' in one"):
        measure(see(tmp_path / "a", other), reference)


@pytest.mark.parametrize("splits", [1, 10])
def test_the_inception_score_of_the_same_logits(splits):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(57, 1008, generator=torch.Generator().manual_seed(0))
    found = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=2020)
    ours = inception_score(logits, splits)
    assert ours.value == pytest.approx(found["inception_score_mean"], rel=1e-10)
    assert ours.stderr == pytest.approx(found["inception_score_std"], rel=1e-8, abs=1e-12)


def test_fid_kid_and_precision_of_the_same_features():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    from fewstep.eval import frechet_distance

    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=draw)
    a, b = torch.randn(300, 40, generator=draw) @ mix + 1, torch.randn(350, 40, generator=draw) @ mix.T
    found = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert frechet_distance(a, b) == pytest.approx(found["frechet_inception_distance"], rel=1e-5)
    ours = prdc(a, b, k=3)
    assert (ours.precision, ours.recall) == pytest.approx(calculate_precision_recall_full(a, b, 3), abs=1e-6)


def test_pytorch_fids_scaling(weights):
    """Half-pixel bilinear and 2 x / 255 - 1, by pytorch-fid's own order of steps."""
    x = pictures(2, 3)
    network = extractor("inception-64", weights, resize="pytorch")
    scaled = (
        torch.nn.functional.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2
        - 1
    )
    stem = [child for _, child in network.network.network.named_children()][:4]
    for child in stem:
        scaled = child(scaled)
    expected = scaled.mean(dim=(2, 3))
    assert torch.allclose(network(x).values, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_weights_of_something_else_are_refused(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save({name: value for name, value in state.items() if "Mixed_7c" not in name}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="the weights are not those of FID's InceptionV3: .*Mixed_7c"):
        extractor("inception", tmp_path / "cut.pth")
    # The names and shapes of the published file, so that it will load.
    assert (
        state["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)
        and state["fc.weight"].shape[0] == 1008
    )


def test_clip_is_theirs(tmp_path):
    """A small CLIP: the network is sized by its weights."""
    torch.manual_seed(0)
    visual = their_clip.CLIPVisual(16, 28, 2, 64, 14)
    for parameter in visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    class Saved(torch.nn.Module):  # CLIP's file is TorchScript, and its names begin with `visual`
        def __init__(self):
            super().__init__()
            self.visual = visual.visual
            self.text_projection = torch.nn.Parameter(torch.zeros(8, 16))

        def forward(self, x):
            return x

    torch.jit.trace(Saved(), torch.zeros(1)).save(str(tmp_path / "clip.pt"))
    x = pictures(3, 0, 40)
    made = their_clip.FeatureExtractorCLIP(
        "clip-vit-b-16", ["clip"], feature_extractor_weights_path=str(tmp_path / "clip.pt")
    )
    ours = extractor("clip", tmp_path / "clip.pt", resize="tensorflow")
    assert (ours.size, ours(x).values.shape) == (28, (3, 16))
    assert torch.allclose(ours(x).values, made(x)[0], rtol=1e-4, atol=1e-5)
    assert ours(x).logits is None and extractor("clip", tmp_path / "clip.pt").resize == "bicubic"


HUB = """
import torch

dependencies = ["torch"]

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 6, 14, 14)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.patch(x).mean(dim=(2, 3))

def dinov2_vitl14(pretrained=True):
    assert not pretrained or torch.manual_seed(7)
    return Net()
"""


def test_dinov2_is_theirs(tmp_path, monkeypatch):
    """A stand-in for the code in torch's hub, which both load; the weights are ours to find."""
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    repository = tmp_path / "facebookresearch_dinov2_main"
    repository.mkdir()
    (repository / "hubconf.py").write_text(HUB)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    load = torch.hub.load
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.hub, "load", lambda _, name: load(str(repository), name, source="local", verbose=False)
        )
        made = FeatureExtractorDinoV2("dinov2-vit-l-14", ["dinov2"])
    torch.save(made.model.state_dict(), tmp_path / "dinov2.pth")
    x = pictures(3, 0, 40)
    ours = extractor("dinov2", tmp_path / "dinov2.pth", resize="tensorflow")
    assert torch.allclose(ours(x).values, made(x)[0], rtol=1e-4, atol=1e-5)
    assert extractor("dinov2", tmp_path / "dinov2.pth").resize == "bicubic"
    torch.save({"x": torch.ones(1)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="the weights are not those of dinov2_vitl14"):
        extractor("dinov2", tmp_path / "bad.pth")
