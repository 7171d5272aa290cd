"""Loading and saving denoisers."""

from __future__ import annotations

import pytest
import torch

from fewstep.models import checkpoint
from fewstep.models.load import build, load, save_checkpoint

CONFIG = {
    "path": {"path": "flow", "shift": 3.0},
    "predicts": "flow",
    "time_scale": 1000.0,
    "net": {"type": "unet", "block_out_channels": [8, 16], "norm_num_groups": 4, "num_class_embeds": 11},
    "shape": [1, 8, 8],
}
DIT = {
    **CONFIG,
    "net": {"type": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2, "num_class_embeds": 11},
}


@pytest.mark.parametrize("config", [CONFIG, DIT])
def test_a_checkpoint_gives_back_the_same_denoiser(tmp_path, config):
    torch.manual_seed(0)
    d = build(config)
    with torch.no_grad():
        for p in d.net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    file = tmp_path / "mine.safetensors"
    save_checkpoint(file, d, config, training={"seed": 0})
    again = load(file)
    x, label = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 10])
    assert torch.equal(again(x, 0.3, label=label), d(x, 0.3, label=label))
    assert again.path == d.path and again.shape == (1, 8, 8) and again.predicts == "flow"
    assert not again.net.training and not any(p.requires_grad for p in again.net.parameters())
    assert checkpoint.read(file)[1]["training"] == {"seed": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["mine.safetensors"]

    half = tmp_path / "half.safetensors"
    save_checkpoint(half, d, config, dtype=torch.float16)
    assert half.stat().st_size < 0.7 * file.stat().st_size
    assert load(half).dtype == torch.float32
    assert (load(half)(x, 0.3, label=label) - d(x, 0.3, label=label)).abs().max() < 0.02


def test_time_is_scaled_for_the_network():
    seen = []
    for config in (CONFIG, {**CONFIG, "path": {"path": "edm"}, "predicts": "x0", "precond": "edm"}):
        d = build(config)
        d.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].tolist()))
        d(torch.zeros(2, 1, 8, 8), 0.5)
    assert seen[0] == [500.0, 500.0] and seen[1] == pytest.approx([250 * torch.tensor(0.5).log().item()] * 2)


def test_what_cannot_be_loaded_again_is_not_written(tmp_path):
    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path / "wrong.safetensors", build(CONFIG), DIT)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.safetensors"
    checkpoint.write(file, {"w": torch.ones(1)}, {"kind": "x"})
    with pytest.raises(ValueError):  # JSON has no NaN
        checkpoint.write(file, {"w": torch.zeros(1)}, {"kind": float("nan")})
    with pytest.raises(IsADirectoryError):
        (tmp_path / "b.safetensors").mkdir()
        checkpoint.write(tmp_path / "b.safetensors", {"w": torch.zeros(1)}, {})
    assert checkpoint.read(file)[0]["w"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("digit-edm", "did you mean 'digits-edm'"),
        ("digits_flow", "did you mean 'digits-flow'"),
        ("nothing/like/it", "digits, digits-edm, digits-vp, digits-flow"),
        ("network-snapshot.pkl", "neither a name nor a path"),
        ("old.ckpt", "weights_only=True"),
    ],
)
def test_errors_say_what_can_be_loaded(name, said):
    with pytest.raises(ValueError, match=said):
        load(name)


def test_files_that_are_not_ours(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="no fewstep metadata"):
        load(tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="classifier, not a denoiser"):
        load(checkpoint.DATA / "digits-classifier.safetensors")
    with pytest.raises(ValueError, match="tarflow, not a denoiser; load_flow reads it"):
        load("digits-tarflow")
    with pytest.raises(ValueError, match="model_index.json"):
        load(tmp_path)


def test_bad_configs_are_named():
    for wrong, named in [
        ({"net": {"type": "gan"}}, "net.type"),
        ({"path": {"path": "line"}}, "path must be"),
        ({"predicts": "noise"}, "predicts"),
        ({"speed": 1}, "speed"),
    ]:
        with pytest.raises(ValueError, match=named):
            build({**CONFIG, **wrong})


def twin_of(**changes):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **changes,
    )


def save_pipeline(folder, twin, scheduler):
    """What DDPMPipeline.save_pretrained leaves, without the cost of importing pipelines."""
    twin.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')


def test_a_diffusers_folder_of_ddpm(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    twin = twin_of()
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=100, prediction_type="v_prediction", clip_sample=False
    )
    save_pipeline(tmp_path, twin, scheduler)
    d = load(tmp_path)
    assert d.predicts == "v" and d.shape == (1, 8, 8) and d.path.t_max == 99
    x, k = torch.randn(2, 1, 8, 8), 40
    with torch.no_grad():
        v, a = twin(x, k).sample, scheduler.alphas_cumprod[k]
    assert torch.allclose(d(x, float(k)), a.sqrt() * x - (1 - a).sqrt() * v, atol=1e-5)


def test_a_diffusers_folder_of_flow_matching(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    twin = twin_of(num_class_embeds=5)
    diffusers.DDPMPipeline(twin, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(
        tmp_path
    )
    d = load(tmp_path)
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 4])
    with torch.no_grad():
        v = twin(x, torch.full((2,), 250.0), class_labels=label).sample
    assert d.path.shift == 3.0 and torch.allclose(d(x, 0.25, label=label), x - 0.25 * v, atol=1e-5)
    with pytest.raises(ValueError, match="label is needed"):
        d(x, 0.25)


def test_a_diffusers_folder_of_edm(tmp_path):
    """One call against diffusers' own preconditioning."""
    diffusers = pytest.importorskip("diffusers")
    twin, scheduler = twin_of(), diffusers.EDMEulerScheduler(sigma_data=0.7)
    save_pipeline(tmp_path, twin, scheduler)
    d = load(tmp_path)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(2.5)
    with torch.no_grad():
        output = twin(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
    assert torch.allclose(d(x, 2.5), scheduler.precondition_outputs(x, output, sigma), atol=1e-5)


def test_other_schedulers_and_nets_are_named(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_pipeline(tmp_path, twin_of(), diffusers.KarrasVeScheduler())
    with pytest.raises(ValueError, match="KarrasVeScheduler.*what can be loaded is a UNet2DModel"):
        load(tmp_path)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet3DConditionModel"}')
    with pytest.raises(ValueError, match="UNet3DConditionModel.*what can be loaded is a UNet2DModel"):
        load(tmp_path)
