"""Tiny pipelines of the families of image transformers, beside those of U-Nets in `families.py`."""

import diffusers
import transformers

from miniature.parts import CELLS, HEADS, WIDTH, autoencoder, clip_encoder, flow, gemma_encoder, t5_encoder
from miniature.tokenizers import (
    clip_tokenizer,
    gemma_tokenizer,
    llama_tokenizer,
    mistral_processor,
    t5_tokenizer,
)

FLUX_VAE = {"shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}


def dynamic_flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def flux() -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, joint_attention_dim=24, pooled_projection_dim=WIDTH,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6), **HEADS,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=dynamic_flow(), vae=autoencoder(**FLUX_VAE), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


def chroma() -> diffusers.ChromaPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **HEADS,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=flow(), vae=autoencoder(**FLUX_VAE), text_encoder=t5_encoder(), tokenizer=t5_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def flux2() -> diffusers.Flux2Pipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), **HEADS,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=8 * CELLS,
    )  # fmt: skip
    text = {
        "model_type": "mistral", "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 31, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=8)
    return diffusers.Flux2Pipeline(
        scheduler=dynamic_flow(), vae=vae, text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=mistral_processor(), transformer=transformer,
    )  # fmt: skip


def sd3() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=CELLS, patch_size=2, in_channels=4, out_channels=4, num_layers=4, joint_attention_dim=48,
        caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16, **HEADS,
    )  # fmt: skip
    clip = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(shift=3.0), vae=autoencoder(**FLUX_VAE), text_encoder=clip_encoder(clip),
        tokenizer=clip_tokenizer(), text_encoder_2=clip_encoder(clip), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(width=48), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def sana() -> diffusers.SanaPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=WIDTH, sample_size=CELLS, patch_size=1, timestep_scale=0.5,
        **HEADS,
    )  # fmt: skip
    facts = {"block_types": "ResBlock", "block_out_channels": 8, "qkv_multiscales": (), "layers_per_block": 1}
    blocks = {
        f"{side}_{what}": (value,) * 4 for side in ("encoder", "decoder") for what, value in facts.items()
    }
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, downsample_block_type="conv", decoder_act_fns="silu",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", **blocks,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def pixart() -> diffusers.PixArtSigmaPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=32, sample_size=CELLS, patch_size=2,
        caption_channels=24, use_additional_conditions=False, **HEADS,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, solver_order=2)
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=scheduler,
    )


def hidream() -> diffusers.HiDreamImagePipeline:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_single_layers=3, caption_channels=[24, WIDTH],
        text_emb_dim=2 * WIDTH, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(8, 8),
        llama_layers=(0, 1, 2, 3, 3, 3), **HEADS,
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    clip = transformers.CLIPTextModelWithProjection
    return diffusers.HiDreamImagePipeline(
        scheduler=flow(shift=3.0), vae=autoencoder(**FLUX_VAE), text_encoder=clip_encoder(clip, 248),
        tokenizer=clip_tokenizer(218), text_encoder_2=clip_encoder(clip, 248), tokenizer_2=clip_tokenizer(218),
        text_encoder_3=t5_encoder(), tokenizer_3=t5_tokenizer(), text_encoder_4=transformers.LlamaForCausalLM(config),
        tokenizer_4=llama_tokenizer(), transformer=transformer,
    )  # fmt: skip


def auraflow() -> diffusers.AuraFlowPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=CELLS, patch_size=2, in_channels=4, num_mmdit_layers=3, num_single_dit_layers=3, joint_attention_dim=24,
        caption_projection_dim=32, out_channels=4, pos_embed_max_size=64, **HEADS,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(transformers.UMT5EncoderModel), vae=autoencoder(),
        transformer=transformer, scheduler=flow(shift=1.73),
    )  # fmt: skip


def lumina2() -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=CELLS, patch_size=2, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=flow(shift=6.0), vae=autoencoder(**FLUX_VAE), text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
    )  # fmt: skip


PIPELINES = {
    "flux": flux,
    "flux2": flux2,
    "sd3": sd3,
    "chroma": chroma,
    "sana": sana,
    "pixart": pixart,
    "hidream": hidream,
    "auraflow": auraflow,
    "lumina2": lumina2,
}
