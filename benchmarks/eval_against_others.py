"""FID, KID, IS and precision beside torch-fidelity, pytorch-fid and clean-fid, on the same images and the same weights.

The weights are random (made and calibrated here, or a file by --weights), the images smooth noise: the values mean
nothing, their differences do. Each tool reads the same folders with its own code and its own resize. clean-fid takes
its network as TorchScript from one address only, so it is given torch-fidelity's, behind its own reading and resizing.

    pip install torch-fidelity pytorch-fid clean-fid
    OMP_NUM_THREADS=1 python benchmarks/eval_against_others.py --out benchmarks/results/eval-against-others-cpu.json
    python benchmarks/eval_against_others.py --resizes       # the values that tests/eval/test_resize.py records
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from fewstep.eval import bench, extractor, measure, reference_of, save_folder, see
from fewstep.eval.resize import resize


def random_inception(path: Path) -> None:
    """Weights in the layout of FID's network: random, with batch norms that know the features' size."""
    import torch_fidelity.feature_extractor_inceptionv3 as theirs

    torch.manual_seed(0)
    network = theirs.FeatureExtractorInceptionV3
    kept = network.load_state_dict, theirs.load_state_dict_from_url
    network.load_state_dict = lambda self, state: None
    theirs.load_state_dict_from_url = lambda *_, **__: None
    try:
        made = network("random", ["2048"])
    finally:
        network.load_state_dict, theirs.load_state_dict_from_url = kept
    for module in made.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the average of what is seen
    made.train()(torch.randint(0, 256, (4, 3, 299, 299), dtype=torch.uint8))
    torch.save(made.eval().state_dict(), path)


def pictures(folder: Path, count: int, seed: int) -> None:
    """32 x 32 noise, smooth enough to look like something, with edges for resizes to differ on."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(count, 3, 8, 8, generator=draw), size=32, mode="bicubic")
    x = x + (x.mean(dim=1, keepdim=True) > 0.2 * seed).float()
    save_folder(folder, (x * 0.5).clamp(-1, 1))


def ours(a: Path, b: Path, weights: Path, method: str) -> dict[str, float]:
    network = extractor("inception", weights, method)
    metrics = ["fd", "kid", "is", "prdc"] if method == "tensorflow" else ["fd"]
    numbers = measure(see(a, network, batch=16), reference_of(b, network, keep=True, batch=16), metrics)
    return {number.metric: number.value for number in numbers}


def torch_fidelity(a: Path, b: Path, weights: Path, count: int) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    wanted = {"fid": True, "kid": True, "isc": True, "prc": True, "kid_subset_size": min(1000, count)}
    found = calculate_metrics(
        input1=str(a),
        input2=str(b),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        batch_size=16,
        feature_extractor="inception-v3-compat",  # precision and recall are VGG's by default
        feature_extractor_weights_path=str(weights),
        **wanted,
    )
    names = {
        "frechet_inception_distance": "fd",
        "kernel_inception_distance_mean": "kid",
        "inception_score_mean": "is",
    }
    return {names.get(name, name): value for name, value in found.items()}


def pytorch_fid(a: Path, b: Path) -> dict[str, float]:
    from pytorch_fid.fid_score import calculate_fid_given_paths

    return {"fd": float(calculate_fid_given_paths([str(a), str(b)], 16, "cpu", 2048, 0))}


def clean_fid(a: Path, b: Path, weights: Path) -> dict[str, float]:
    from cleanfid.fid import compare_folders

    network = extractor(
        "inception", weights, "clean"
    ).network  # floats of 0 to 255 at 299 x 299 in, as clean-fid wants
    options = {"num_workers": 0, "batch_size": 16, "device": torch.device("cpu"), "verbose": False}
    return {"fd": float(compare_folders(str(a), str(b), lambda x: network(x).values, "clean", **options))}


def resizes() -> None:
    """The statistics of one image by everybody's resize, and how far ours is from it."""
    import torch.nn.functional as F
    from cleanfid.resize import build_resizer
    from PIL import Image
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    i = torch.arange(3 * 20 * 14)
    image = ((i * i * 7 + i * 13) % 256).to(torch.uint8).reshape(1, 3, 20, 14)
    array = image[0].permute(1, 2, 0).numpy()

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].float()

    theirs = {
        "tensorflow": interpolate_bilinear_2d_like_tensorflow1x(
            image.float(), size=(299, 299), align_corners=False
        ),
        "clean": tensor(build_resizer("clean")(array)),
        "pytorch": tensor(build_resizer("legacy_pytorch")(array)),
        "bicubic": F.interpolate(image.float(), size=(299, 299), mode="bicubic", antialias=True),
        "pillow": tensor(np.asarray(Image.fromarray(array).resize((299, 299), Image.Resampling.BICUBIC))),
    }
    for name, x in theirs.items():
        places = [
            round(float(x[0, c, row, column]), 4)
            for c, row, column in ((0, 5, 7), (1, 150, 200), (2, 298, 298))
        ]
        gap = float((resize(image, 299, 299, name) - x).abs().max())
        print(
            f"{name:<12} {places} {float(x.double().mean()):.5f} {float(x.double().std()):.5f}   ours off by {gap:.2g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=48, help="a side")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--resizes", action="store_true", help="only how images are resized")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if arguments.resizes:
        return resizes()
    with tempfile.TemporaryDirectory() as folder:
        a, b, weights = (
            Path(folder) / "a",
            Path(folder) / "b",
            arguments.weights or Path(folder) / "inception.pth",
        )
        pictures(a, arguments.images, 0)
        pictures(b, arguments.images, 1)
        if arguments.weights is None:
            random_inception(weights)
        # pytorch-fid has no option for its weights; it looks into torch's cache.
        cache = Path(folder) / "hub" / "checkpoints"
        cache.mkdir(parents=True)
        shutil.copy(weights, cache / "pt_inception-2015-12-05-6726825d.pth")
        os.environ["TORCH_HOME"] = folder
        rows = []
        for tool, method, run in (
            ("torch-fidelity", "tensorflow", lambda: torch_fidelity(a, b, weights, arguments.images)),
            ("pytorch-fid", "pytorch", lambda: pytorch_fid(a, b)),
            ("clean-fid", "clean", lambda: clean_fid(a, b, weights)),
        ):
            mine, other = ours(a, b, weights, method), run()
            for metric in [name for name in mine if name in other]:
                off = abs(mine[metric] - other[metric]) / max(abs(other[metric]), 1e-300)
                row = {
                    "tool": tool,
                    "resize": method,
                    "metric": metric,
                    "ours": mine[metric],
                    "theirs": other[metric],
                }
                rows.append({**row, "relative": off})
                print(
                    f"{tool:<15} {metric:<10} {mine[metric]:.9g} {other[metric]:.9g}   {off:.1e}", flush=True
                )
    if arguments.out:
        bench.save(arguments.out, {"images": arguments.images, "rows": rows})
    return None


if __name__ == "__main__":
    main()
