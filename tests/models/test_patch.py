"""patch: the same numbers, the same objects, and everything that must be refused or left alone."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.models import patch, patch_convolutions, patch_transformers


def _load():
    spec = importlib.util.spec_from_file_location("patchable", Path(__file__).with_name("patchable.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _load()


@pytest.fixture
def exact(monkeypatch):
    """diffusers casts some of what it computes by .float(): in these tests to float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def own_forwards(net):
    """The modules whose forward is not simply their class's."""
    return [name for name, m in net.named_modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("factory", [*zoo.OURS, *zoo.THEIRS], ids=lambda f: f.__name__)
def test_the_same_numbers_in_float64(factory, exact):
    if factory in zoo.THEIRS:
        pytest.importorskip("diffusers")
    net, call = zoo.made(factory)
    before = zoo.gradients(net, call)
    with patch(net) as handle:
        assert handle.patched and not handle.skipped, handle.report()
        after = zoo.gradients(net, call)
    # SD3.5's RMSNorm takes its variance in float32 whatever it is given, ours does not
    bounds = (1e-7, 1e-6) if factory is zoo.sd35 else (1e-13, 1e-13)
    assert all(found <= bound for found, bound in zip(zoo.apart(after, before), bounds, strict=True))
    again = zoo.gradients(net, call)
    assert torch.equal(again[0], before[0])


EXPECTED = {
    zoo.dit: {"BasicTransformerBlock", "AdaLayerNormZero"},
    zoo.flux: {
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "FluxAttention",
        "AdaLayerNormZero",
        "AdaLayerNormZeroSingle",
        "AdaLayerNormContinuous",
    },
    zoo.sd35: {
        "JointTransformerBlock",
        "SD35AdaLayerNormZeroX",
        "AdaLayerNormZero",
        "AdaLayerNormContinuous",
        "RMSNorm",
    },
    zoo.conditional_unet: {"ResnetBlock2D", "BasicTransformerBlock", "GroupNorm"},
    zoo.unet: {"ResnetBlock2D", "GroupNorm"},
    zoo.autoencoder: {"ResnetBlock2D", "GroupNorm"},
}


@pytest.mark.parametrize("factory", list(EXPECTED), ids=lambda f: f.__name__)
def test_what_is_patched(factory):
    pytest.importorskip("diffusers")
    net, call = zoo.made(factory)
    with patch(net) as handle:
        assert {e.kind for e in handle.patched} == EXPECTED[factory]
        assert len(own_forwards(net)) == len(handle.patched)


def test_the_fused_forwards_are_what_runs(monkeypatch):
    """Break the ops: every family must notice."""
    pytest.importorskip("diffusers")
    names = ("layer_norm_modulate", "gate_residual", "gate_residual_norm", "rms_norm_rotary")
    for module, op in [(patch_transformers, name) for name in names] + [
        (patch_convolutions, "group_norm_silu")
    ]:
        factory = zoo.unet if op == "group_norm_silu" else zoo.flux
        net, call = zoo.made(factory)
        with monkeypatch.context() as m, patch(net):
            m.setattr(module, op, lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call(net)


def test_the_same_objects_before_during_and_after():
    net, call = zoo.made(zoo.our_dit)
    modules, tensors = list(net.modules()), dict(net.state_dict(keep_vars=True))
    plain = {id(m): dict(m.__dict__) for m in modules}
    handle = patch(net)
    assert list(net.modules()) == modules and [type(m) for m in net.modules()] == [type(m) for m in modules]
    during = net.state_dict(keep_vars=True)
    assert list(during) == list(tensors) and all(during[k] is tensors[k] for k in tensors)
    handle.undo()
    for m in modules:
        assert m.__dict__.keys() == plain[id(m)].keys()
        assert all(m.__dict__[k] is plain[id(m)][k] for k in m.__dict__)
    handle.undo()  # nothing is left to undo
    assert own_forwards(net) == []


def test_twice_is_refused():
    net, _ = zoo.made(zoo.our_dit)
    with patch(net):
        with pytest.raises(ValueError, match=r"blocks.0 \(Block\) is patched already: undo that first"):
            patch(net)
        with pytest.raises(ValueError, match="is patched already"):
            patch(nn.Sequential(net))
    with patch(net):
        pass


def test_copies_are_patched_copies():
    """EMA and student copies run their own weights."""
    net, call = zoo.made(zoo.our_dit)
    with patch(net):
        twin = copy.deepcopy(net)
        assert own_forwards(twin) == own_forwards(net) and torch.equal(call(twin), call(net))
        with torch.no_grad():
            twin.blocks[0].qkv.weight.add_(0.1)
        assert not torch.equal(call(twin), call(net))


def test_weights_go_to_disk_and_back(tmp_path):
    pytest.importorskip("diffusers")
    net, call = zoo.made(zoo.dit, torch.float32)
    expected = call(net)
    with patch(net):
        net.save_pretrained(tmp_path)
        back = type(net).from_pretrained(tmp_path).eval()
        assert own_forwards(back) == [] and torch.equal(call(back), expected)
        net.load_state_dict(back.state_dict())


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(order):
    """Adapters on projections, modulations and convolutions, put in before or after: the same numbers as unpatched."""
    pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    targets = {
        zoo.flux: ["to_q", "to_k", "add_k_proj", "to_out.0", "linear", "proj_out", "proj_mlp"],
        zoo.conditional_unet: ["conv1", "time_emb_proj", "to_v", "ff.net.2"],
    }
    for factory, names in targets.items():
        found = {}
        for way in ("plain", order):
            torch.manual_seed(0)
            net, call = zoo.made(factory, torch.float32)
            handle = patch(net) if way == "after" else None
            net.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
            handle = patch(net) if way == "before" else handle
            assert way == "plain" or (handle.patched and not handle.skipped)
            found[way] = call(net).detach()
            net.disable_adapters()
            off = call(net).detach()
            assert float((off - found[way]).abs().max()) > 1e-3 * float(off.abs().max())
        gap = (found[order] - found["plain"]).abs().max() / found["plain"].abs().max()
        assert float(gap) < 1e-5


def test_hooked_modules_are_left_and_reported():
    net, call = zoo.made(zoo.our_dit)
    seen, first, second = [], *net.blocks
    first.norm2.register_forward_hook(lambda *a: seen.append("norm"))
    old = second.forward
    second.forward = lambda *a: seen.append("block") or old(*a)  # as offloading does
    with pytest.raises(ValueError, match="nothing in Linear can be patched"):
        patch(nn.Linear(2, 2))
    with patch(net) as handle:
        assert not handle.patched
        assert handle.report() == (
            "not patched: 1 Block: norm2 is hooked\nnot patched: 1 Block: is hooked: its forward was replaced"
        )
        call(net)
    assert seen == ["norm", "block"]


def test_what_changes_later_is_noticed():
    """A norm that is hooked or exchanged after patch() runs; a patched module that gets another forward keeps it."""
    net, call = zoo.made(zoo.our_dit)
    expected, seen = call(net), []
    handle = patch(net)
    remove = net.blocks[0].norm2.register_forward_hook(lambda *a: seen.append(1)).remove
    assert torch.allclose(call(net), expected, atol=1e-12) and seen == [1]
    remove()
    net.blocks[1].norm1 = nn.Identity()
    changed = call(net)
    ours = net.blocks[0].forward
    net.blocks[0].forward = lambda *a: ours(*a)
    with pytest.raises(
        RuntimeError, match=r"Block got another forward after patch\(\): remove that hook first"
    ):
        handle.undo()
    net.blocks[0].forward = ours
    handle.undo()
    assert own_forwards(net) == [] and torch.allclose(call(net), changed, atol=1e-12)


def test_another_diffusers_is_refused(monkeypatch):
    """A forward, or what it calls, that is not the source known here is left alone and reported."""
    pytest.importorskip("diffusers")
    from diffusers.models import embeddings, normalization

    rules = importlib.import_module("fewstep.models.patch")._hash
    net, call = zoo.made(zoo.flux, torch.float32)

    def forward(self, x, emb=None):
        return x, emb

    monkeypatch.setattr(normalization.AdaLayerNormZeroSingle, "forward", forward)
    monkeypatch.setattr(embeddings, "apply_rotary_emb", lambda *a, **k: None)
    rules.cache_clear()
    try:
        handle = patch(net)
        said = {e.kind: e.said for e in handle.skipped}
        assert set(said) == {"AdaLayerNormZeroSingle", "FluxAttention"}
        assert said["AdaLayerNormZeroSingle"].startswith("signature changed: AdaLayerNormZeroSingle.forward")
        assert "not patched: 2 FluxAttention: signature changed: apply_rotary_emb" in handle.report()
        handle.undo()
    finally:
        rules.cache_clear()


def test_subclasses_are_not_their_classes():
    net, _ = zoo.made(zoo.our_dit)

    class Other(type(net.blocks[0])):
        pass

    net.blocks[0].__class__ = Other
    with patch(net) as handle:
        assert [e.name for e in handle.patched] == ["blocks.1"]


def test_a_model_that_is_compiled_is_refused_and_a_patched_one_compiles():
    net, call = zoo.made(zoo.our_dit)
    expected = call(net)
    for compiled in (torch.compile(net, backend="eager"), copy.deepcopy(net)):
        if not hasattr(compiled, "_orig_mod"):
            compiled.blocks[0].compile(backend="eager")
        with pytest.raises(ValueError, match="is compiled: patch before torch.compile"):
            patch(compiled)
    with patch(net):
        fast = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert torch.allclose(call(fast), expected, atol=1e-12)


def test_sharding_comes_after(tmp_path):
    """FSDP2 on one rank: sharded modules are refused, patched ones shard and give the same numbers."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    from torch.distributed.fsdp import fully_shard

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        net, call = zoo.made(zoo.our_dit, torch.float32)
        expected, twin = zoo.gradients(net, call), copy.deepcopy(net)
        fully_shard(twin.blocks[0], mesh=mesh)
        with pytest.raises(ValueError, match=r"blocks.0.qkv \(Linear\) is sharded: patch before sharding"):
            patch(twin)
        handle = patch(net)
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        assert own_forwards(net) == [e.name for e in handle.patched]
        y = call(net)
        y.sin().sum().backward()
        found = y.detach(), [p.grad.full_tensor() for p in net.parameters()]
        assert max(zoo.apart(found, expected)) < 1e-5
    finally:
        distributed.destroy_process_group()


def test_gradient_checkpointing():
    pytest.importorskip("diffusers")
    net, call = zoo.made(zoo.dit)
    expected = zoo.gradients(net, call)
    net.enable_gradient_checkpointing()
    with patch(net.train()):
        assert max(zoo.apart(zoo.gradients(net, call), expected)) < 1e-12


def test_options_that_a_fused_forward_does_not_have():
    """Chunked feed-forwards, gated text and other processors run their own forward."""
    pytest.importorskip("diffusers")
    net, call = zoo.made(zoo.conditional_unet)
    expected = call(net)
    block = next(m for m in net.modules() if type(m).__name__ == "BasicTransformerBlock")
    with patch(net):
        block.set_chunk_feed_forward(4, dim=1)
        assert torch.allclose(call(net), expected, atol=1e-12)
    with patch(net) as handle:
        assert [e.said for e in handle.skipped] == ["its feed-forward is in chunks"]


def test_not_a_module():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        patch("model")
    pipeline = type("Pipeline", (), {"components": {}})()
    with pytest.raises(TypeError, match="got Pipeline: its unet, transformer or vae is"):
        patch(pipeline)
