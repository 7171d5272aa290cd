"""Weights in the layout of FID's network, random, where the real ones would be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def random_inception(path: Path) -> Path:
    """Write them to ``path``; batch norms know how large features are, so that these neither vanish nor explode."""
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as their_inception
    except (
        ImportError,
        RuntimeError,
    ) as error:  # beside a CPU-only torch the registry's torchvision does not import
        pytest.skip(f"torch-fidelity does not import: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(their_inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(their_inception, "load_state_dict_from_url", lambda *_, **__: None)
        torch.manual_seed(0)
        network = their_inception.FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    network.train()(torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8))
    torch.save(network.eval().state_dict(), path)
    return path
