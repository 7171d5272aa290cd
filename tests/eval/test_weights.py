"""The four places for weights, in their order, each file by its hash."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import save_file

from fewstep.eval import extractor, see
from fewstep.eval.weights import Found, Weights, find_weights, read_state


@pytest.fixture
def published(tmp_path, monkeypatch) -> Weights:
    """A file that a url serves, with an empty cache and nothing in the environment."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.delenv("FEWSTEP_TEST", raising=False)
    monkeypatch.delenv("FEWSTEP_OFFLINE", raising=False)
    served = tmp_path / "served.pth"
    torch.save({"w": torch.ones(3)}, served)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    return Weights("net.pth", served.as_uri(), digest, "FEWSTEP_TEST", also=("other-name.pth",))


def cached(tmp_path, name="net.pth"):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    return tmp_path / "hub" / "checkpoints" / name


def test_the_order(tmp_path, monkeypatch, published):
    target = cached(tmp_path)
    assert find_weights(published) == Found(target, published.sha256, True)  # a download fills the cache
    assert [path.name for path in target.parent.iterdir()] == ["net.pth"]
    offline = published._replace(url="file:///nowhere")
    assert find_weights(offline) == Found(target, published.sha256, True)
    for name in ("by-environment", "by-path"):
        torch.save({"w": torch.zeros(3)}, tmp_path / name)
    digest = hashlib.sha256((tmp_path / "by-path").read_bytes()).hexdigest()
    monkeypatch.setenv("FEWSTEP_TEST", str(tmp_path / "by-environment"))
    assert find_weights(offline).path == tmp_path / "by-environment"
    assert find_weights(offline, tmp_path / "by-path") == Found(tmp_path / "by-path", digest, False)


def test_another_name_in_the_cache_will_do(tmp_path, published):
    shutil.copy(tmp_path / "served.pth", cached(tmp_path, "other-name.pth"))
    assert find_weights(published, download=False).path.name == "other-name.pth"


def test_a_cached_or_downloaded_file_must_have_the_hash(tmp_path, published):
    cached(tmp_path).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"net.pth has sha256 .*, expected {published.sha256}: remove it"):
        find_weights(published)
    cached(tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match="what came has sha256 .*, and is not kept"):
        find_weights(published._replace(sha256="0" * 64))
    assert list(cached(tmp_path).parent.iterdir()) == []


def test_the_error_says_all_four_places(tmp_path, monkeypatch, published):
    gone = published._replace(url="file:///nowhere/net.pth")
    with pytest.raises(FileNotFoundError) as caught:
        find_weights(gone)
    for part in (
        "--weights",
        "FEWSTEP_TEST: not set",
        f"cache {tmp_path / 'hub' / 'checkpoints'}: no net.pth",
        "a download from file:///nowhere/net.pth",
        published.sha256,
    ):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match="download=False"):
        find_weights(published, download=False)
    monkeypatch.setenv("FEWSTEP_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="FEWSTEP_OFFLINE is set"):
        find_weights(published)
    with pytest.raises(FileNotFoundError, match="weights is .*none.pth', and there is no such file"):
        find_weights(published, tmp_path / "none.pth")
    monkeypatch.setenv("FEWSTEP_TEST", "gone.pth")
    with pytest.raises(FileNotFoundError, match="FEWSTEP_TEST is 'gone.pth'"):
        find_weights(published)


class Loud:
    def __reduce__(self):
        return print, ("this was run",)


def test_files_are_read_without_running_them(tmp_path, capsys):
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    linear = torch.nn.Linear(3, 2)
    linear.load_state_dict(state)
    torch.jit.trace(linear, torch.zeros(1, 3)).save(str(tmp_path / "a.pt"))
    for name in ("a.safetensors", "a.pth", "a.pt"):
        read = read_state(tmp_path / name)
        assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)
    torch.save({"weight": Loud()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="no weights that can be read without unpickling"):
        read_state(tmp_path / "bad.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="must hold a state_dict"):
        read_state(tmp_path / "tensor.pth")
    assert "this was run" not in capsys.readouterr().out


def test_the_digits_need_nothing_and_know_their_hash(tmp_path):
    from fewstep.models import checkpoint

    judge = extractor("digits")
    tensors, meta = checkpoint.read(checkpoint.DATA / "digits-classifier.safetensors")
    checkpoint.write(tmp_path / "other.safetensors", {k: v + 0.01 for k, v in tensors.items()}, meta)
    other = extractor("digits", tmp_path / "other.safetensors")
    assert judge.published and not other.published and judge.weights != other.weights
    checkpoint.write(tmp_path / "nan.safetensors", {k: v * torch.nan for k, v in tensors.items()}, meta)
    with pytest.raises(
        ValueError, match="digits features have NaN or infinity in 64 of 64 images; are these"
    ):
        see("digits:held_out", extractor("digits", tmp_path / "nan.safetensors"))
    with pytest.raises(ValueError, match="features must be one of digits, inception.*got 'vgg'"):
        extractor("vgg")
    with pytest.raises(ValueError, match="resize must be one of"):
        extractor("digits", resize="bilinear")
