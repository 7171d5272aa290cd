"""EDM's and EDM2's checkpoints: pickles in their layout, hostile ones, and the networks beside the original code's."""

from __future__ import annotations

import io
import math
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.models import checkpoint, inert_pickle
from fewstep.models.edm2_unet import EDM2UNet, MPConv, mp_cat, mp_silu, mp_sum, unit
from fewstep.models.edm_unet import Conv, EDMUNet, Resample
from fewstep.models.load import build, convert, load, save_checkpoint

SONG = dict(
    img_resolution=8, in_channels=3, out_channels=3, label_dim=4, model_channels=8, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[4],
)  # fmt: skip
NCSN = dict(
    embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1]
)
SKIPS = dict(encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1])
NETS = {
    "ddpmpp": {"type": "edm", "kind": "song", **SONG},
    "ncsnpp": {"type": "edm", "kind": "song", **SONG, **NCSN, "label_dim": 0},
    "skips": {"type": "edm", "kind": "song", **SONG, **SKIPS, "label_dim": 0},
    "adm": {"type": "edm", "kind": "dhariwal", **SONG, "model_channels": 32},
    "edm2": {"type": "edm2", **{k: v for k, v in SONG.items() if "_channels" not in k}, "img_channels": 4,
             "model_channels": 8, "channels_per_head": 8},
}  # fmt: skip
# What the repositories' own networks answered, with the weights and inputs of ``fill`` and ``images``.
ORIGINAL = {
    "ddpmpp": ([0.180209, -0.284644, 1.240167, 1.990831], 1.312835),
    "ncsnpp": ([-0.096353, -0.108077, 1.287939, 1.942485], 1.299592),
    "skips": ([-0.080721, -0.289005, 1.140704, 1.956051], 1.341973),
    "adm": ([0.150798, -0.135278, 1.191717, 1.981735], 1.288766),
    "edm2": ([-0.011392, -0.080837, 0.042076, 1.960641, -2.071735, -0.969303], 1.299198),
}


def fill(state):
    """Weights that any machine makes alike: waves, and ones for the norms."""
    for k, (name, p) in enumerate(sorted(state.items())):
        wave = torch.sin(0.7 * k + 1.3 * torch.arange(p.numel(), dtype=torch.float64)).reshape(p.shape)
        start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.copy_(start + (1.2 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2) * wave)


def images(channels):
    return (
        torch.sin(0.37 * torch.arange(2 * channels * 64, dtype=torch.float64))
        .float()
        .reshape(2, channels, 8, 8)
    )


def denoiser(net, **changes):
    shape = [net.get("img_channels", 3), 8, 8]
    config = {
        "path": {"path": "edm"},
        "predicts": "x0",
        "precond": "edm",
        "net": net,
        "shape": shape,
        **changes,
    }
    return build(config), config


def waved(net):
    """A net whose names, for ``fill``, are in the order of the original's: filters and all."""
    state = {**net.state_dict()}
    for name, module in net.named_modules():
        if isinstance(module, Conv) and isinstance(module.resample, Resample):
            state[f"{name}.resample_filter"] = torch.zeros(1)
        if isinstance(module, Resample) and not name.endswith(".resample"):
            state[f"{name}.resample_filter"] = torch.zeros(1)
    if isinstance(net, EDMUNet) and net.config.label_dim:
        state["map_augment.weight"] = torch.zeros(1, 1)
    with torch.no_grad():
        fill(state)
    return net


@pytest.mark.parametrize("name", NETS)
def test_the_networks_are_the_originals(name):
    d, _ = denoiser(NETS[name])
    waved(d.net.eval())
    label = torch.tensor([2, 4]) if NETS[name]["label_dim"] else None
    with torch.no_grad():
        y = d(3 * images(d.shape[0]), torch.tensor([3.0, 0.2]), label=label)
    some, spread = ORIGINAL[name]
    assert y.flatten()[::97][: len(some)].tolist() == pytest.approx(some, abs=2e-5)
    assert float(y.std()) == pytest.approx(spread, abs=2e-5)


# --- pickles in the layout of the repositories ------------------------------------------------------------------------

HOSTILE = "raise SystemExit('this source was run')"


class Persistent:
    """What ``torch_utils.persistence`` leaves of an object: a call of its reader with a name, a source and a state."""

    def __init__(self, class_name, state, module_src=HOSTILE):
        self.meta = {
            "type": "class", "version": 6, "module_src": module_src, "class_name": class_name, "state": state
        }  # fmt: skip

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture
def foreign(monkeypatch):
    """The names that EDM's pickles use, importable while one is written, and armed while one is read."""

    def arm(*_args, **_kwargs):
        raise SystemExit("the foreign code was called")

    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    arm.__name__ = arm.__qualname__ = "_reconstruct_persistent_obj"
    arm.__module__ = "torch_utils.persistence"
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = arm
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    sys.modules["dnnlib.util"].EasyDict = easy
    return easy


def record(module, name, **state):
    """A module of ours as the pickle of theirs has it."""
    parameters, buffers = OrderedDict(module._parameters), OrderedDict(module._buffers)
    return Persistent(name, {
        "training": False, "_parameters": parameters, "_buffers": buffers, "_backward_hooks": OrderedDict(),
        "_non_persistent_buffers_set": set(), "_modules": OrderedDict(), **state,
    })  # fmt: skip


def layer(module):
    """One layer of ours, and what is in it, as theirs."""
    filters = {}
    if isinstance(module, Conv):
        taps = module.resample.filter if isinstance(module.resample, Resample) else None
        filters = {"_buffers": OrderedDict(resample_filter=taps)}
        return record(module, "Conv2d", **filters)
    if isinstance(module, Resample):
        return record(module, "Conv2d", _parameters=OrderedDict(weight=None, bias=None),
                      _buffers=OrderedDict(resample_filter=module.filter))  # fmt: skip
    names = {nn.GroupNorm: "GroupNorm", nn.Conv2d: "Conv2d", nn.Linear: "Linear", MPConv: "MPConv"}
    kept = {k: layer(m) for k, m in module.named_children()
            if not isinstance(m, nn.Identity) and not (k == "resample")}  # fmt: skip
    if isinstance(module, nn.ModuleDict):
        made = nn.ModuleDict()
        made._modules = OrderedDict(kept)
        return made
    said = {}
    if isinstance(module, nn.GroupNorm):
        said = {"num_groups": module.num_groups, "eps": module.eps}
    if hasattr(module, "style"):
        names[type(module)] = "UNetBlock"
        said = {"num_heads": module.heads, "skip_scale": np.float64(module.style.skip_scale),
                "adaptive_scale": module.style.modulates}  # fmt: skip
    if hasattr(module, "flavor"):
        names[type(module)] = "Block"
        said = {"num_heads": module.heads, "flavor": module.flavor, "res_balance": 0.3, "clip_act": 256}
    return record(module, names.get(type(module), type(module).__name__), _modules=OrderedDict(kept), **said)


def snapshot(net, precond, more=None, half=False, **said):
    """The content of a pickle: {ema: preconditioner, ..}."""
    net = net.half() if half else net
    kind = {"EDM2UNet": "UNet"}.get(
        type(net).__name__, "SongUNet" if getattr(net.config, "kind", "") == "song" else "DhariwalUNet"
    )
    given = {k: v for k, v in net.config.to_dict().items() if k != "kind"}
    song = {"embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter"}
    if kind == "DhariwalUNet":
        given = {k: v for k, v in given.items() if k not in song}
    inner = layer(net)
    inner.meta["class_name"] = kind
    inner.meta["state"] |= {"_init_args": (), "_init_kwargs": {**given, "label_dropout": np.float64(0.1)}}
    if kind == "SongUNet":
        inner.meta["state"]["_init_kwargs"]["augment_dim"] = 9
        inner.meta["state"]["_modules"]["map_augment"] = Persistent(
            "Linear", {"_parameters": OrderedDict(weight=nn.Parameter(torch.ones(8, 9)), bias=None)}
        )
    size, channels = net.config.img_resolution, said.pop("img_channels", 3)
    state = {"img_resolution": size, "img_channels": channels, "label_dim": net.config.label_dim, "_buffers": {},
             "_parameters": OrderedDict(), "_modules": OrderedDict({more or "model": inner}), **said}  # fmt: skip
    return {"ema": Persistent(precond, state), "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}),
            "augment_pipe": None, "dataset_kwargs": {"path": "x.zip"}}  # fmt: skip


def written(tmp_path, content, name="net.pkl", protocol=4):
    file = tmp_path / name
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    return file


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "skips", "adm"])
@pytest.mark.parametrize("protocol", [4, 5])
def test_edm_pickles_are_read_and_nothing_in_them_is_run(tmp_path, foreign, name, protocol):
    d, _ = denoiser(NETS[name])
    waved(d.net.eval())
    file = written(tmp_path, snapshot(d.net, "EDMPrecond", sigma_data=0.5), protocol=protocol)
    read = load(file)
    x, label = images(3), torch.tensor([1, 4]) if NETS[name]["label_dim"] else None
    assert torch.equal(read(x, 2.0, label=label), d(x, 2.0, label=label))
    assert read.shape == (3, 8, 8) and read.path.name == "edm" and read.sigma_data == 0.5
    assert not read.net.training and not any(p.requires_grad for p in read.net.parameters())


def edm2_snapshot(foreign, **said):
    d, _ = denoiser(NETS["edm2"])
    waved(d.net.eval())
    content = snapshot(
        d.net, "Precond", "unet", half=True, img_channels=4, sigma_data=0.5, use_fp16=True, **said
    )
    encoder = {"vae_name": "some/vae", "scale": np.float32([1, 2, 3, 4]), "bias": np.float32([0, 0, 0, 1])}
    content = foreign(content, encoder=Persistent("StabilityVAEEncoder", encoder))
    d.net.float()  # the rounded weights
    return d, content


def test_edm2_pickles_are_read_and_converted(tmp_path, foreign, capsys):
    d, content = edm2_snapshot(foreign)
    file = written(tmp_path, content, "edm2.pkl")
    x, label = images(4), torch.tensor([1, 4])
    assert torch.equal(load(file)(x, 2.0, label=label), d(x, 2.0, label=label))

    from fewstep.cli import main

    assert main(["convert", str(file)]) == 0
    assert "EDM2UNet" in capsys.readouterr().out
    converted = tmp_path / "edm2.safetensors"
    assert torch.equal(load(converted)(x, 2.0, label=label), d(x, 2.0, label=label))
    tensors, meta = checkpoint.read(converted)
    assert {v.dtype for v in tensors.values()} == {torch.float16}
    assert meta["config"]["latents"] == {"name": "some/vae", "scale": [1, 2, 3, 4], "bias": [0, 0, 0, 1]}
    assert meta["training"] == {"class": "Precond", "source": "edm2.pkl", "use_fp16": True}
    assert main(["convert", str(file)]) == 2 and "exists already" in capsys.readouterr().err


def test_edm2_latents_have_a_codec(tmp_path, foreign):
    """By the formulas of the released encoder: y = scale z + bias of a VAE that sees images in 0 .. 1."""
    diffusers = pytest.importorskip("diffusers")
    d = load(written(tmp_path, edm2_snapshot(foreign)[1]))
    with pytest.raises(
        ValueError, match=r"codec.vae must be set first: AutoencoderKL.from_pretrained\('some/vae'\)"
    ):
        d.codec.decode(torch.zeros(1, 4, 8, 8))
    torch.manual_seed(0)
    d.codec.vae = vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=4
    ).eval()
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        z = vae.encode((image + 1) / 2).latent_dist.mean
        scale, bias = torch.tensor([1.0, 2, 3, 4])[:, None, None], torch.tensor([0.0, 0, 0, 1])[:, None, None]
        torch.testing.assert_close(d.codec.encode(image), scale * z + bias)
        torch.testing.assert_close(d.codec.decode(scale * z + bias), 2 * vae.decode(z).sample - 1)
    from fewstep.samplers import cfg

    x, label = images(4), torch.tensor([1, 2])  # and guidance finds the label that stands for none
    guided = 2 * d(x, 1.0, label=label) - d(x, 1.0, label=torch.tensor([4, 4]))
    torch.testing.assert_close(cfg(d, 2.0)(x, 1.0, label=label), guided, rtol=1e-4, atol=1e-5)
    bare = {"ema": edm2_snapshot(foreign)[1]["ema"]}  # pixels
    assert load(written(tmp_path, bare)).codec is None


def test_the_other_preconditioners_are_paths(tmp_path, foreign):
    """x0 by the printed formulas of each (table 1 of 2206.00364), on the same net."""
    x, label, sigma = images(3), torch.tensor([2, 4]), 1.7
    d, _ = denoiser(NETS["adm"])
    net = waved(d.net.eval())
    vp = snapshot(net, "VPPrecond", beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5)
    d = load(written(tmp_path, vp))
    t = (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2)) - 0.1) / 19.9
    with torch.no_grad():
        wanted = x - sigma * net(x / math.sqrt(1 + sigma**2), torch.tensor([999 * t] * 2), label)
    torch.testing.assert_close(d(x * d.path.alpha(t), t, label=label), wanted, rtol=0, atol=2e-5)

    steps = 20
    level = torch.zeros(steps + 1)
    level[:-1] = torch.logspace(2, -2, steps)
    content = snapshot(net, "iDDPMPrecond", M=steps, _buffers=OrderedDict(u=level))
    inner = content["ema"].meta["state"]["_modules"]["model"].meta["state"]
    out = inner["_modules"]["out_conv"].meta["state"]["_parameters"]
    inner["_init_kwargs"]["out_channels"] = 6  # a variance beside the noise
    out["weight"] = nn.Parameter(torch.cat([out["weight"], 7 + out["weight"]]))
    out["bias"] = nn.Parameter(torch.cat([out["bias"], 7 + out["bias"]]))
    d = load(written(tmp_path, content))
    k = 12
    sigma = float(level[steps - 1 - k])
    with torch.no_grad():
        wanted = x - sigma * net(x / math.sqrt(1 + sigma**2), torch.tensor([float(k)] * 2), label)
    assert d.path.rho(float(k)) == pytest.approx(sigma)
    torch.testing.assert_close(
        d(x * d.path.alpha(float(k)), float(k), label=label), wanted, rtol=1e-5, atol=2e-5
    )

    net = waved(denoiser(NETS["ncsnpp"])[0].net.eval())
    d = load(written(tmp_path, snapshot(net, "VEPrecond", sigma_min=0.02, sigma_max=100.0)))
    with torch.no_grad():
        wanted = x + 3.0 * net(x, torch.log(torch.tensor([1.5, 1.5])))
    torch.testing.assert_close(d(x, 3.0), wanted, rtol=0, atol=1e-4)
    assert (d.path.t_max, d.path.t_min) == (100.0, 0.02)


# --- what must not happen ------------------------------------------------------------------------------------------


class Calls:
    """Would call what it is given."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def test_hostile_globals_are_named_and_not_called(tmp_path):
    mark = tmp_path / "mark"
    import builtins
    import os

    for function, args, named in [
        (open, (str(mark), "w"), "open"),
        (os.system, (f"touch {mark}",), f"{os.system.__module__}.system"),
        (builtins.eval, (f"open({str(mark)!r}, 'w')",), "builtins.eval"),
        (builtins.getattr, ({}, "keys"), "builtins.getattr"),
        (torch.load, (str(mark),), "torch.serialization.load"),
        (torch.hub.load, ("x", "y"), "torch.hub.load"),
        (np.load, (str(mark),), "load"),
        (__import__, ("this",), "__import__"),
    ]:
        file = written(tmp_path, {"ema": [Calls(function, *args)]})
        with pytest.raises(ValueError, match=named) as caught:
            load(file)
        assert "nothing was called" in str(caught.value) and "net.pkl" in str(caught.value)
    assert not mark.exists()


def test_a_pickle_within_a_tensor_is_no_way_round(tmp_path):
    """The memory of a tensor is a pickle of its own; torch's reader of weights refuses what is not a storage."""
    mark = tmp_path / "mark"
    inner = pickle.dumps(Calls(open, str(mark), "w"), protocol=2)
    header = b"".join(
        pickle.dumps(v, protocol=2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    for content in (inner, header + inner, b"", b"PK\x03\x04"):
        file = written(tmp_path, {"ema": Calls(torch.storage._load_from_bytes, content)})
        with pytest.raises(ValueError):
            load(file)
    assert not mark.exists()


def opcodes(*pieces):
    return io.BytesIO(b"\x80\x04" + b"".join(pieces) + b".")


def test_known_names_are_not_to_be_changed():
    """BUILD sets attributes: of a function it would change what it does for everybody."""
    reader = b"ctorch._utils\n_rebuild_tensor_v2\n"
    state = b"}\x8c\x04_callK\x01s"  # {"_call": 1}
    for name in (
        reader,
        b"ccollections\nOrderedDict\n",
        b"cnumpy\ndtype\n",
        b"ctorch.nn.modules.container\nModuleDict\n",
    ):
        for content in (state, b"N" + state + b"\x86"):  # a dict, and (None, slots)
            with pytest.raises(ValueError, match="cannot be read"):
                inert_pickle.read(opcodes(name, content, b"b"))
    assert inert_pickle.read(io.BytesIO(pickle.dumps(torch.ones(2)))).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="outside of itself"):
        inert_pickle.read(opcodes(b"\x8c\x04fileQ"))


def test_tensors_stay_within_their_memory_and_arrays_hold_numbers():
    storage = torch.zeros(4)._typed_storage()
    for size, stride, offset in [((5,), (1,), 0), ((2,), (9,), 0), ((4,), (1,), 1), ((2,), (-1,), 3)]:
        hostile = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
        with pytest.raises(ValueError, match="does not fit"):
            inert_pickle.read(io.BytesIO(pickle.dumps(hostile)))
    with pytest.raises(ValueError, match="numbers alone"):
        inert_pickle.read(io.BytesIO(pickle.dumps(np.array([{}], dtype=object))))
    for order in "CF":
        array = np.asarray(np.arange(6.0).reshape(2, 3), order=order)
        for protocol in (4, 5):
            read = inert_pickle.read(io.BytesIO(pickle.dumps([array, np.float32(0.5)], protocol=protocol)))
            assert np.array_equal(inert_pickle.plain(read[0]), array) and read[1] == 0.5


def test_what_is_no_such_checkpoint_is_named(tmp_path, foreign):
    for content, said in [
        ({"ema": Persistent("Generator", {"z_dim": 512})}, "it holds a Generator"),
        ({"weights": torch.ones(1)}, "it holds a NoneType"),
        ([1, 2], "it holds a list"),
        ({"ema": Persistent("EDMPrecond", {"_modules": {}})}, "EDMPrecond without 'model'"),
        (
            {"ema": Calls(sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, 3)},
            "without a state",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            load(written(tmp_path, content))
    whole = pickle.dumps(edm2_snapshot(foreign)[1])
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "torn.pkl").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="torn.pkl"):
            load(tmp_path / "torn.pkl")
    with pytest.raises(ValueError, match="weights_only=True"):
        load("old.ckpt")
    with pytest.raises(ValueError, match="neither a name nor a path"):
        load("not-there.pkl")


def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path, foreign):
    """The shapes of the weights do not tell every number: what the layers say of themselves is compared."""

    def changed(change, name="ddpmpp"):
        content = snapshot(denoiser(NETS[name])[0].net, "EDMPrecond", sigma_data=0.5)
        inner = content["ema"].meta["state"]["_modules"]["model"].meta["state"]
        change(inner)
        with pytest.raises(ValueError) as caught:
            load(written(tmp_path, content))
        return str(caught.value)

    def block(inner):
        return inner["_modules"]["enc"]._modules["8x8_block0"].meta["state"]

    def scaled(inner):
        block(inner)["skip_scale"] = np.float64(1.0)

    def regrouped(inner):
        block(inner)["_modules"]["norm1"].meta["state"]["num_groups"] = 4

    def filtered(inner):
        inner["_init_kwargs"]["resample_filter"] = [1, 3, 3, 1]

    def lost(inner):
        del block(inner)["_modules"]["conv1"]

    assert "enc.8x8_block0 of the checkpoint has skip_scale = 1.0" in changed(scaled)
    assert "num_groups = 4" in changed(regrouped)
    assert "resample_filter" in changed(filtered)
    assert "8x8_block0.conv1.weight" in changed(lost)
    assert "unknown key width" in changed(lambda inner: inner["_init_kwargs"].update(width=3))
    assert "unnamed arguments" in changed(lambda inner: inner.update(_init_args=(8, 3)))


# --- the networks as networks -------------------------------------------------------------------------------------


def test_edm2_preserves_magnitudes():
    """Unit normals keep their size through every operation, to the error of 65536 of them (0.3 %, taken five times)."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 64, 8, 8), torch.randn(16, 64, 8, 8)

    def size(x):
        return float(x.detach().square().mean().sqrt())

    conv = MPConv(64, 64, 3).eval()
    inside = conv(torch.randn(16, 64, 10, 10))[:, :, 1:-1, 1:-1]  # the border sees zeros
    for made in (mp_silu(a), mp_sum(a, b, 0.3), mp_cat(a, b[:, :16], 0.3), unit(3 * a, (1,)), inside):
        assert size(made) == pytest.approx(1, abs=0.015), made.shape
    halves = mp_cat(a, b[:, :16], 0.5)
    ratio = size(halves[:, :64]) * 8 / (size(halves[:, 64:]) * 4)
    assert ratio == pytest.approx(1, abs=0.02)  # as much of each, though there are four times as many of a


def test_edm2_weights_are_directions():
    """What they are multiplied by changes nothing, and training puts them back to unit size."""
    torch.manual_seed(0)
    net = EDM2UNet({k: v for k, v in NETS["edm2"].items() if k != "type"}).eval()
    x, t, label = torch.randn(8, 4, 8, 8), torch.linspace(-1, 1, 8), torch.arange(8) % 5
    with torch.no_grad():
        net.out_gain.fill_(1.0)
        before = net(x, t, label)
        for p in net.parameters():
            if p.ndim > 1:
                p.mul_(3.0)
        torch.testing.assert_close(net(x, t, label), before, rtol=0, atol=2e-3)  # eps = 1e-4 in every norm
        net.train()(x, t)
    sizes = [p.square().mean().sqrt() for p in net.parameters() if p.ndim > 1]
    assert all(abs(float(size) - 1) < 1e-3 for size in sizes)


@pytest.mark.parametrize("name", ["ddpmpp", "adm", "edm2"])
def test_no_label_is_a_row_of_zeros(name):
    d, _ = denoiser(NETS[name])
    net, x, t = waved(d.net.eval()), images(d.shape[0]), torch.tensor([0.1, 0.1])
    none = net(x, t, torch.tensor([4, 4]))
    assert net.null_label == 4 and torch.equal(net(x, t), none)
    assert not torch.allclose(net(x, t, torch.tensor([3, 3])), none, atol=1e-3)
    with pytest.raises(ValueError, match="label must be integers"):
        net(x, t, torch.eye(2, 4))
    with pytest.raises(ValueError, match="x must be"):
        net(x[:, :, :4], t)
    bare = build(denoiser({**NETS[name], "label_dim": 0})[1]).net
    with pytest.raises(ValueError, match="unconditional net"):
        bare(x, t, torch.tensor([1, 1]))


def test_bad_configs_are_named():
    for wrong, named in [
        ({"kind": "unet"}, "kind must be one of song, dhariwal"),
        ({"encoder_type": "none"}, "encoder_type"),
        ({"img_resolution": 7}, "img_resolution"),
        ({"width": 3}, "unknown key width"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter"),
    ]:
        with pytest.raises(ValueError, match=named):
            denoiser({**NETS["ddpmpp"], **wrong})
    for wrong, named in [({"res_balance": 1.5}, "res_balance"), ({"img_resolution": 7}, "img_resolution")]:
        with pytest.raises(ValueError, match=named):
            denoiser({**NETS["edm2"], **wrong})
    with pytest.raises(ValueError, match="time must be"):
        denoiser(NETS["edm2"], time="sigma")


def test_fresh_nets_train_and_are_saved(tmp_path):
    """A step of gradient descent through each, and the way to a file and back."""
    torch.manual_seed(0)
    for name in ("ncsnpp", "adm", "edm2"):
        d, config = denoiser(NETS[name])
        x = torch.randn(2, *d.shape)
        d(x, 1.0).square().mean().backward()
        assert all(p.grad is not None for n, p in d.net.named_parameters() if "map_label" not in n)
        with torch.no_grad():
            for p in d.net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        save_checkpoint(tmp_path / f"{name}.safetensors", d, config)
        d.net.eval()
        assert torch.equal(load(tmp_path / f"{name}.safetensors")(x, 1.0), d(x, 1.0))


def test_convert_returns_what_it_wrote(tmp_path, foreign):
    d, _ = denoiser(NETS["ddpmpp"])
    file = written(tmp_path, snapshot(waved(d.net.eval()), "EDMPrecond", sigma_data=0.5))
    out = convert(file, tmp_path / "out.safetensors")
    assert torch.equal(out(images(3), 1.0), d(images(3), 1.0))
    assert checkpoint.read(tmp_path / "out.safetensors")[1]["training"] == {
        "class": "EDMPrecond",
        "source": "net.pkl",
    }
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none.pkl", tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["ddpmpp", "edm2"])
def test_a_converted_checkpoint_teaches_a_student(name, tmp_path, foreign):
    """What `fewstep convert` wrote is a teacher.path, and the student is a network of the same kind that has learnt."""
    from fewstep.distill.run import run

    if name == "edm2":
        d, content = edm2_snapshot(foreign)
    else:
        d, _ = denoiser(NETS[name])
        content = snapshot(waved(d.net.eval()), "EDMPrecond", sigma_data=0.5)
    convert(written(tmp_path, content), tmp_path / "teacher.safetensors")
    folder = run("dmd2-digits", [
        f"teacher.path={tmp_path / 'teacher.safetensors'}", "data.path=labels", "train.iters=2", "train.batch=4",
        "train.critic_steps=1", "report.exam=8", "report.validate=2", "report.grid=2", "threads=1", f"out={tmp_path}",
    ])  # fmt: skip
    student = load(folder / "student.safetensors")
    assert type(student.net) is type(d.net) and student.net.config == d.net.config
    moved = [not torch.equal(p, q) for p, q in zip(student.net.parameters(), d.net.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert (folder / "grids/00000002.png").is_file() == (
        name == "ddpmpp"
    )  # edm2's autoencoder is known by name only
