"""Statistics as the tools write them, read; and what is wrong with a file, said."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from fewstep.eval import (
    Gaussian,
    Protocol,
    Statistics,
    extractor,
    gaussian_stats,
    read_statistics,
    write_statistics,
)
from fewstep.eval.measure import measure
from fewstep.eval.seen import is_statistics, reference_of, see

D = 5


@pytest.fixture
def gaussian() -> Gaussian:
    draw = torch.Generator().manual_seed(0)
    return gaussian_stats(torch.randn(40, D, dtype=torch.float64, generator=draw))


def arrays(gaussian: Gaussian) -> dict[str, np.ndarray]:
    return {"mu": gaussian.mean.numpy(), "sigma": gaussian.cov.numpy()}


def assert_same(ours: Gaussian, theirs: Gaussian) -> None:
    assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.cov, theirs.cov)


def test_what_is_written_is_read_and_others_can_read_it_too(tmp_path, gaussian):
    protocol = Protocol("inception", "6" * 64, "clean", "nearest", 40, None, "0-39")
    features, labels = torch.randn(40, D), torch.arange(40)
    write_statistics(tmp_path / "a.npz", Statistics(gaussian, protocol, features, labels))
    back = read_statistics(tmp_path / "a.npz")
    assert_same(back.gaussian, gaussian)
    assert (back.gaussian.n, back.protocol) == (40, protocol)
    assert torch.equal(back.features, features) and torch.equal(back.labels, labels)
    assert back.name.startswith("a.npz@") and len(back.name) == len("a.npz@") + 12
    # pytorch-fid, clean-fid and EDM: f["mu"], f["sigma"], without pickles
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.array_equal(file["mu"], gaussian.mean.numpy()) and file["sigma"].dtype == np.float64
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_files_of_edm_pytorch_fid_and_clean_fid(tmp_path, gaussian):
    np.savez(tmp_path / "edm.npz", **arrays(gaussian))
    np.savez_compressed(tmp_path / "pytorch-fid.npz", **arrays(gaussian))
    for name in ("edm.npz", "pytorch-fid.npz"):
        read = read_statistics(tmp_path / name)
        assert_same(read.gaussian, gaussian)
        assert read.gaussian.n is None and read.protocol.unknown() == list(Protocol.__dataclass_fields__)
    features = np.random.RandomState(0).randn(30, D).astype(np.float32)
    np.savez(tmp_path / "kid.npz", feats=features)  # clean-fid's for KID
    read = read_statistics(tmp_path / "kid.npz")
    assert_same(read.gaussian, gaussian_stats(torch.from_numpy(features)))
    assert read.gaussian.n == 30 and np.array_equal(read.features, features)


def test_files_of_adm_with_images_and_spatial_moments(tmp_path, gaussian):
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays(gaussian), **spatial)
    assert_same(read_statistics(tmp_path / "adm.npz").gaussian, gaussian)
    assert is_statistics(tmp_path / "adm.npz")


@pytest.mark.parametrize("level", [3, 4, 5])
def test_pickles_of_edm2_are_read_and_not_run(tmp_path, gaussian, level):
    other = gaussian._replace(mean=gaussian.mean + 1)
    content = {"num_images": 40, "fid": arrays(gaussian), "fd_dinov2": arrays(other)}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(content, protocol=level))
    for metric, expected in (("inception", gaussian), ("dinov2", other)):
        read = read_statistics(tmp_path / "edm2.pkl", metric)
        assert_same(read.gaussian, expected)
        assert read.gaussian.n == 40 and read.protocol == Protocol(features=metric)
    with pytest.raises(
        ValueError, match="holds statistics of dinov2, inception; say which of them, got None"
    ):
        read_statistics(tmp_path / "edm2.pkl")
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n(S'echo ran'\ntR.")
    with pytest.raises(ValueError, match="os.system.*nothing was called"):
        read_statistics(tmp_path / "bad.pkl", "inception")


def test_a_file_in_float32_of_the_other_byte_order(tmp_path, gaussian):
    np.savez(tmp_path / "a.npz", **{name: array.astype(">f4") for name, array in arrays(gaussian).items()})
    read = read_statistics(tmp_path / "a.npz").gaussian
    assert read.mean.dtype == torch.float64 and torch.equal(read.mean, gaussian.mean.float().double())


def test_without_a_count_what_needs_one_says_so(tmp_path, gaussian):
    np.savez(tmp_path / "edm.npz", **arrays(gaussian))
    with pytest.raises(
        ValueError, match=r"edm.npz@\w+ has no count of images \(num_images\), which merging needs"
    ):
        read_statistics(tmp_path / "edm.npz").counted("merging")
    assert Statistics(gaussian, Protocol()).counted("merging") == 40


def test_samples_are_refused_statistics_of_other_features(tmp_path):
    judge = extractor("digits")
    seen = see("digits:held_out", judge, num=100)
    wide = gaussian_stats(torch.randn(200, 70, generator=torch.Generator().manual_seed(0)))
    np.savez(tmp_path / "wide.npz", **arrays(wide))
    with pytest.raises(ValueError, match=r"wide.npz@\w+ is of 70 dimensions, and digits features have 64"):
        measure(seen, reference_of(tmp_path / "wide.npz", judge))
    write_statistics(
        tmp_path / "clean.npz", Statistics(seen.stats.finish(), Protocol("digits", judge.weights, "clean"))
    )
    with pytest.raises(ValueError, match="do not compare: resize is 'none' in one and 'clean' in the other"):
        measure(seen, reference_of(tmp_path / "clean.npz", judge))
    with pytest.raises(
        ValueError, match="kid needs the features of the reference, and clean.npz.* has moments alone"
    ):
        measure(seen, Statistics(seen.stats.finish(), seen.protocol, name="clean.npz"), ["kid"])


def test_bad_files_are_named(tmp_path, gaussian):
    np.savez(tmp_path / "m2.npz", m2=np.zeros(3), s2=np.eye(3))
    with pytest.raises(ValueError, match="m2.npz has no mu and sigma, it has m2, s2"):
        read_statistics(tmp_path / "m2.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"mu has shape \(4,\) and sigma \(3, 3\)"):
        read_statistics(tmp_path / "shape.npz")
    np.savez(tmp_path / "nan.npz", mu=np.array([0.0, np.nan]), sigma=np.eye(2))
    with pytest.raises(ValueError, match="nan.npz: mu has NaN"):
        read_statistics(tmp_path / "nan.npz")
    np.savez(tmp_path / "one.npz", num_images=1, **arrays(gaussian))
    with pytest.raises(ValueError, match="num_images is 1; a covariance needs at least 2"):
        read_statistics(tmp_path / "one.npz")
    np.savez(tmp_path / "object.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="object.npz cannot be read as .npz"):
        read_statistics(tmp_path / "object.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "one.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="cut.npz cannot be read as .npz"):
        read_statistics(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match="there is no "):
        read_statistics(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="path must end in .npz"):
        write_statistics(tmp_path / "a.pt", Statistics(gaussian, Protocol()))
