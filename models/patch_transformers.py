"""Fused forwards of transformer blocks for ``patch``: adaptive norms, gates and q/k norms with rotary embeddings.

Of diffusers' DiT, Stable Diffusion's (``BasicTransformerBlock``), SD3's and Flux's blocks, and of our own ``DiT``. Each
computes what the forward that it replaces does: that one's source is known by its hash.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..kernels.gate_residual import gate_residual, gate_residual_norm
from ..kernels.layer_norm_modulate import layer_norm_modulate
from ..kernels.rms_norm_rotary import rms_norm_rotary
from .attention import attention
from .patch import altered, replaces

NORMALIZATION = "diffusers.models.normalization"
ATTENTION = "diffusers.models.attention"
FLUX = "diffusers.models.transformers.transformer_flux"
SD3 = "diffusers.models.transformers.transformer_sd3"
LAYER = {"norm": nn.LayerNorm}


def of(norm: nn.LayerNorm) -> dict[str, Any]:
    """A LayerNorm's own arguments."""
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


def _one_axis(*names: str):
    """A check: these children are norms over the last axis."""

    def check(module: nn.Module) -> str | None:
        for name in names:
            norm = getattr(module, name)
            if norm is not None and len(norm.normalized_shape) != 1:
                return f"{name} is over {len(norm.normalized_shape)} axes"
        return None

    return check


# --- adaptive norms --------------------------------------------------------------------------------------------------


@replaces(
    "layer_norm_modulate",
    inner=LAYER,
    check=_one_axis("norm"),
    sources={f"{NORMALIZATION}:AdaLayerNormZero.forward": ("8114ae07da45573f",)},
)
def ada_layer_norm_zero(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
    return layer_norm_modulate(x, scale, shift, **of(self.norm)), *rest


@replaces(
    "layer_norm_modulate",
    inner=LAYER,
    check=_one_axis("norm"),
    sources={f"{NORMALIZATION}:AdaLayerNormZeroSingle.forward": ("29ec63238a94f888",)},
)
def ada_layer_norm_zero_single(self, x, emb=None):
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return layer_norm_modulate(x, scale, shift, **of(self.norm)), gate


@replaces(
    "layer_norm_modulate",
    inner=LAYER,
    check=_one_axis("norm"),
    sources={f"{NORMALIZATION}:SD35AdaLayerNormZeroX.forward": ("f4287c090991f9f6",)},
)
def sd35_ada_layer_norm_zero(self, hidden_states, emb=None):
    shift, scale, *rest, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
    one, two = (
        layer_norm_modulate(hidden_states, *pair, **of(self.norm))
        for pair in ((scale, shift), (scale2, shift2))
    )
    return one, *rest, two, gate2


@replaces(
    "layer_norm_modulate",
    inner=LAYER,
    check=_one_axis("norm"),
    sources={f"{NORMALIZATION}:AdaLayerNormContinuous.forward": ("74b27c9279e82cd8",)},
)
def ada_layer_norm_continuous(self, x, conditioning_embedding):
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return layer_norm_modulate(x, scale, shift, **of(self.norm))


# --- blocks ----------------------------------------------------------------------------------------------------------


@replaces(
    "gate_residual",
    inner={"norm2": nn.LayerNorm, "norm2_context": nn.LayerNorm},
    check=_one_axis("norm2", "norm2_context"),
    sources={f"{FLUX}:FluxTransformerBlock.forward": ("db0ff6a3b933ed93",)},
)
def flux_block(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    x, text = hidden_states, encoder_hidden_states
    n, gate, shift, scale, gate_mlp = self.norm1(x, emb=temb)
    text_n, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(text, emb=temb)
    h, text_h, *more = self.attn(
        hidden_states=n,
        encoder_hidden_states=text_n,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, n = gate_residual_norm(x, h, gate, scale, shift, **of(self.norm2))
    x = gate_residual(x, self.ff(n), gate_mlp)
    if more:  # of an IP adapter
        x = x + more[0]
    text, n = gate_residual_norm(text, text_h, text_gate, text_scale, text_shift, **of(self.norm2_context))
    text = gate_residual(text, self.ff_context(n), text_gate_mlp)
    if text.dtype == torch.float16:
        text = text.clip(-65504, 65504)
    return text, x


@replaces("gate_residual", sources={f"{FLUX}:FluxSingleTransformerBlock.forward": ("c5871d4786839380",)})
def flux_single_block(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    ahead = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    n, gate = self.norm(x, emb=temb)
    inner = self.act_mlp(self.proj_mlp(n))
    h = self.attn(hidden_states=n, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = gate_residual(x, self.proj_out(torch.cat([h, inner], dim=2)), gate)
    if x.dtype == torch.float16:
        x = x.clip(-65504, 65504)
    return x[:, :ahead], x[:, ahead:]


def _joint(module: nn.Module) -> str | None:
    if module._chunk_size is not None:
        return "its feed-forward is in chunks"
    return _one_axis("norm2", "norm2_context")(module)


@replaces(
    "gate_residual",
    inner={"norm2": nn.LayerNorm, "norm2_context": nn.LayerNorm},
    check=_joint,
    sources={f"{ATTENTION}:JointTransformerBlock.forward": ("37709ad5538f5beb",)},
)
def sd3_block(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
    x, text, options = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    n, gate, shift, scale, gate_mlp, *dual = self.norm1(x, emb=temb)
    if self.context_pre_only:
        text_n = self.norm1_context(text, temb)
    else:
        text_n, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(text, emb=temb)
    h, text_h = self.attn(hidden_states=n, encoder_hidden_states=text_n, **options)
    if self.use_dual_attention:
        n2, gate2 = dual
        x = gate_residual(x, h, gate)
        h, gate = self.attn2(hidden_states=n2, **options), gate2
    x, n = gate_residual_norm(x, h, gate, scale, shift, **of(self.norm2))
    x = gate_residual(x, self.ff(n), gate_mlp)
    if self.context_pre_only:
        return None, x
    text, n = gate_residual_norm(text, text_h, text_gate, text_scale, text_shift, **of(self.norm2_context))
    return gate_residual(text, self.ff_context(n), text_gate_mlp), x


@replaces(
    "gate_residual",
    inner={"norm2": nn.LayerNorm},
    check=_one_axis("norm2"),
    sources={f"{SD3}:SD3SingleTransformerBlock.forward": ("db79d3f45496544f",)},
)
def sd3_single_block(self, hidden_states, temb):
    n, gate, shift, scale, gate_mlp = self.norm1(hidden_states, emb=temb)
    h = self.attn(hidden_states=n, encoder_hidden_states=None)
    x, n = gate_residual_norm(hidden_states, h, gate, scale, shift, **of(self.norm2))
    return gate_residual(x, self.ff(n), gate_mlp)


def _basic(module: nn.Module) -> str | None:
    if module.norm_type not in ("ada_norm_zero", "layer_norm"):
        return f"its norms are {module.norm_type}"
    if module._chunk_size is not None:
        return "its feed-forward is in chunks"
    if module.pos_embed is not None or hasattr(module, "fuser"):
        return "it has positions or gates of its own"
    if (module.attn2 is None) != (module.norm_type == "ada_norm_zero"):
        return "it attends otherwise than DiT's and Stable Diffusion's"
    return _one_axis("norm3", *(["norm2"] if module.attn2 is not None else []))(module)


@replaces(
    "gate_residual",
    inner={"norm2": nn.LayerNorm, "norm3": nn.LayerNorm},
    check=_basic,
    sources={f"{ATTENTION}:BasicTransformerBlock.forward": ("92edc86d918d47bc",)},
)
def basic_block(
    self,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
    added_cond_kwargs=None,
):
    x, options = hidden_states, dict(cross_attention_kwargs or {})
    if x.ndim != 3 or options.pop("gligen", None) is not None:
        return NotImplemented
    context = encoder_hidden_states if self.only_cross_attention else None
    if self.norm_type == "ada_norm_zero":
        n, gate, shift, scale, gate_mlp = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        h = self.attn1(n, encoder_hidden_states=context, attention_mask=attention_mask, **options)
        x, n = gate_residual_norm(x, h, gate, scale, shift, **of(self.norm3))
        return gate_residual(x, self.ff(n), gate_mlp)
    h = self.attn1(self.norm1(x), encoder_hidden_states=context, attention_mask=attention_mask, **options)
    x, n = gate_residual_norm(x, h, **of(self.norm2))
    h = self.attn2(
        n, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **options
    )
    x, n = gate_residual_norm(x, h, **of(self.norm3))
    return self.ff(n) + x


@replaces("layer_norm_modulate", "gate_residual", inner={"norm1": nn.LayerNorm, "norm2": nn.LayerNorm})
def our_block(self, x, condition):
    modulation = self.modulation(functional.silu(condition))[:, None]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
    n = layer_norm_modulate(x, scale, shift, **of(self.norm1))
    q, k, v = self.qkv(n).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    h = self.proj(attention(q, k, v, self.impl).transpose(1, 2).flatten(2))
    x, n = gate_residual_norm(x, h, gate, scale_mlp, shift_mlp, **of(self.norm2))
    return gate_residual(x, self.mlp(n), gate_mlp)


# --- queries and keys ------------------------------------------------------------------------------------------------


def _flux_attention(module: nn.Module) -> str | None:
    if type(module.processor).__name__ != "FluxAttnProcessor" or type(module.processor).__module__ != FLUX:
        return f"its processor is a {type(module.processor).__name__}"
    names = ["norm_q", "norm_k"] + ["norm_added_q", "norm_added_k"] * (module.added_kv_proj_dim is not None)
    norms = [getattr(module, name) for name in names]
    for name, norm in zip(names, norms, strict=True):
        if reason := altered(norm, nn.RMSNorm):
            return f"{name} {reason}"
        if norm.eps is None or norm.eps != norms[0].eps or norm.normalized_shape != (module.head_dim,):
            return f"{name} is not over a head, or has an eps of its own"
    return None


@replaces(
    "rms_norm_rotary",
    check=_flux_attention,
    sources={
        f"{FLUX}:FluxAttention.forward": ("664291fb389a610e",),
        f"{FLUX}:FluxAttnProcessor.__call__": ("6146fedda8f5a31d", "7660c439d8a35f44", "40a0557dbc38e055"),
        "diffusers.models.embeddings:apply_rotary_emb": ("b2689889c60acc6c",),
    },
)
def flux_attention(
    self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **kwargs
):
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from diffusers.models.transformers.transformer_flux import _get_qkv_projections

    joint, turns = self.added_kv_proj_dim is not None, image_rotary_emb
    if kwargs or joint != (encoder_hidden_states is not None):
        return NotImplemented
    if turns is not None and (not isinstance(turns, (tuple, list)) or turns[0].ndim != 2):
        return NotImplemented
    cos, sin = (None, None) if turns is None else (v.to(hidden_states.device) for v in turns)

    def heads(v: torch.Tensor) -> torch.Tensor:
        return v.unflatten(-1, (-1, self.head_dim))

    q, k, v, *text = _get_qkv_projections(self, hidden_states, encoder_hidden_states)
    v = heads(v)
    text_q = text_k = text_gain_q = text_gain_k = None
    if joint:
        text_q, text_k, text_v = map(heads, text)
        text_gain_q, text_gain_k = self.norm_added_q.weight, self.norm_added_k.weight
        v = torch.cat([text_v, v], dim=1)
    eps = self.norm_q.eps
    q = rms_norm_rotary(heads(q), self.norm_q.weight, cos, sin, text_q, text_gain_q, eps=eps)
    k = rms_norm_rotary(heads(k), self.norm_k.weight, cos, sin, text_k, text_gain_k, eps=eps)
    out = dispatch_attention_fn(
        q,
        k,
        v,
        attn_mask=attention_mask,
        backend=self.processor._attention_backend,
        parallel_config=self.processor._parallel_config,
    )
    out = out.flatten(2, 3).to(q.dtype)
    if not joint:
        return out
    ahead = encoder_hidden_states.shape[1]
    text_out, out = out[:, :ahead].contiguous(), out[:, ahead:].contiguous()
    return self.to_out[1](self.to_out[0](out)), self.to_add_out(text_out)


def _of_heads(module: nn.Module) -> str | None:
    width = tuple(module.dim)
    if len(width) != 1 or width[0] % 2 or width[0] > 1024 or module.bias is not None:
        return "it is not over a head"
    return None


@replaces(
    "rms_norm_rotary",
    check=_of_heads,
    sources={f"{NORMALIZATION}:RMSNorm.forward": ("1d712b32032366c3", "2e9413e45956b438")},
)
def rms_norm(self, hidden_states):
    x, weight = hidden_states, self.weight
    if x.ndim != 4 or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    return rms_norm_rotary(x.transpose(1, 2), weight, eps=self.eps).transpose(1, 2)


RULES = {
    f"{NORMALIZATION}.AdaLayerNormZero": ada_layer_norm_zero,
    f"{NORMALIZATION}.AdaLayerNormZeroSingle": ada_layer_norm_zero_single,
    f"{NORMALIZATION}.AdaLayerNormContinuous": ada_layer_norm_continuous,
    f"{NORMALIZATION}.SD35AdaLayerNormZeroX": sd35_ada_layer_norm_zero,
    f"{NORMALIZATION}.RMSNorm": rms_norm,
    f"{FLUX}.FluxTransformerBlock": flux_block,
    f"{FLUX}.FluxSingleTransformerBlock": flux_single_block,
    f"{FLUX}.FluxAttention": flux_attention,
    f"{ATTENTION}.JointTransformerBlock": sd3_block,
    f"{ATTENTION}.BasicTransformerBlock": basic_block,
    f"{SD3}.SD3SingleTransformerBlock": sd3_single_block,
    f"{__package__}.dit.Block": our_block,
}
