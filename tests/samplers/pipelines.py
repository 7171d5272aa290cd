"""Tiny diffusers pipelines with random weights, built from configs alone: every line of a pipeline around its
scheduler is real, and a call takes a tenth of a second."""

from __future__ import annotations

import string

import diffusers
import numpy as np
import torch
import transformers

WIDTH, LENGTH = 32, 16  # of every text encoder: its states, and its longest prompt
PIXELS, LATENT = 16, 8
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LETTERS = string.ascii_lowercase


def clip_tokenizer():
    """A token a letter."""
    words = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=LENGTH
    )


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in LETTERS)]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def clip(tokenizer, projection=False):
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def t5(tokenizer, width=WIDTH, kind="T5"):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def vae(**config):
    """16 pixels, 8 latents a side."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=PIXELS,
        **config,
    ).eval()  # fmt: skip


def flow_vae():
    return vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)


def text_unet(**config):
    base = {
        "sample_size": LATENT, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 4, "cross_attention_dim": WIDTH,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**base, **config}).eval()


def ddpm():
    unet = diffusers.UNet2DModel(
        sample_size=LATENT, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(clip_sample=False))


def dit():
    """Class-conditional; it answers with a variance beside the noise."""
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=LATENT, patch_size=2, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    return diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=diffusers.DDIMScheduler())


def sd(**scheduler):
    tokenizer = clip_tokenizer()
    config = {**SD_BETAS, "clip_sample": False, "steps_offset": 1, **scheduler}
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(tokenizer), tokenizer=tokenizer, unet=text_unet(),
        scheduler=diffusers.DDIMScheduler(**config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    tokenizer, second = clip_tokenizer(), clip_tokenizer()
    unet = text_unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(tokenizer), text_encoder_2=clip(second, projection=True), tokenizer=tokenizer,
        tokenizer_2=second, unet=unet, add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
    )  # fmt: skip


def sd3():
    tokenizers = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENT, patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=flow_vae(),
        text_encoder=clip(tokenizers[0], True), tokenizer=tokenizers[0],
        text_encoder_2=clip(tokenizers[1], True), tokenizer_2=tokenizers[1],
        text_encoder_3=t5(tokenizers[2], 2 * WIDTH), tokenizer_3=tokenizers[2],
    )  # fmt: skip


def flux():
    tokenizer, second = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=flow_vae(),
        text_encoder=clip(tokenizer), tokenizer=tokenizer, text_encoder_2=t5(second), tokenizer_2=second,
        transformer=transformer,
    )  # fmt: skip


def wan():
    """Five frames of video."""
    tokenizer = t5_tokenizer()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).eval()  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight *= 10  # a fresh one all but answers 0
    video_vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer, kind="UMT5"), vae=video_vae, scheduler=scheduler,
        transformer=transformer,
    )  # fmt: skip


BUILDERS = {
    "ddpm": ddpm, "dit": dit, "sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux, "wan": wan
}  # fmt: skip
FLOWS = {"sd3", "flux", "wan"}


def build(name, **options):
    torch.manual_seed(0)
    pipe = BUILDERS[name](**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name, pipe, steps=4, seed=0, **overrides) -> np.ndarray:
    """Two images (one video) as float32, channels last."""
    call = {
        "num_inference_steps": steps,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(seed),
    }
    if name == "ddpm":
        call["batch_size"] = 2
    elif name == "dit":
        call |= {"class_labels": [1, 7], "guidance_scale": 2.0}
    elif name == "wan":
        embeds = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
        call |= {"prompt_embeds": embeds, "negative_prompt_embeds": 0 * embeds, "height": 16, "width": 16,
                 "num_frames": 5, "guidance_scale": 2.0}  # fmt: skip
    else:
        call |= {"prompt": ["a b", "c d"], "height": PIXELS, "width": PIXELS, "guidance_scale": 3.0}
        if name in FLOWS:
            call["max_sequence_length"] = LENGTH
    result = pipe(**{**call, **overrides})
    return np.asarray(result.frames if name == "wan" else result.images, dtype=np.float32)
