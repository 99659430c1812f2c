"""Tiny pipelines of the families of video transformers, beside those of images in `families.py`."""

import diffusers
import transformers

from miniature.parts import CELLS, HEADS, WIDTH, clip_encoder, flow, gemma_encoder, t5_encoder
from miniature.tokenizers import clip_tokenizer, gemma_tokenizer, qwen_processor, t5_tokenizer


def wan_autoencoder() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan() -> diffusers.WanPipeline:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=24,
        freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(transformers.UMT5EncoderModel), vae=wan_autoencoder(),
        transformer=transformer, scheduler=scheduler,
    )  # fmt: skip


def sanavideo() -> diffusers.SanaVideoPipeline:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH,
        sample_size=CELLS, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return diffusers.SanaVideoPipeline(
        tokenizer=gemma_tokenizer(), text_encoder=gemma_encoder(), vae=wan_autoencoder(), transformer=transformer,
        scheduler=scheduler,
    )  # fmt: skip


def ltxvideo() -> diffusers.LTXPipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=3, caption_channels=24, **HEADS
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1, patch_size_t=1,
        encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    scheduler = flow(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        shift_terminal=0.1,
        base_image_seq_len=1024,
    )
    return diffusers.LTXPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(128),
        transformer=transformer,
    )


def kandinsky5_video() -> diffusers.Kandinsky5T2VPipeline:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=16, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=64, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6), visual_cond=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8,) * 4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, layers_per_block=1, norm_num_groups=4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, latent_channels=16, mid_block_add_attention=False,
    )  # fmt: skip
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {
        "vocab_size": 2100, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_scaling": rope,
    }  # fmt: skip
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    return diffusers.Kandinsky5T2VPipeline(
        transformer=transformer, vae=vae, text_encoder=encoder, tokenizer=qwen_processor(), text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(), scheduler=flow(shift=5.0),
    )  # fmt: skip


PIPELINES = {"wan": wan, "ltxvideo": ltxvideo, "sanavideo": sanavideo, "kandinsky5_video": kandinsky5_video}
