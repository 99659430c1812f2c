"""Small parts that tiny pipelines of several families share: text encoders, an autoencoder, a scheduler."""

import diffusers
import transformers
from torch import nn

from miniature.tokenizers import clip_tokenizer

CELLS, WIDTH = 8, 16  # cells on a side of the latents; width of most text encoders
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def clip_encoder(kind: type = transformers.CLIPTextModel, length: int = 77) -> nn.Module:
    tokenizer = clip_tokenizer(length)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config)


def t5_encoder(kind: type = transformers.T5EncoderModel, width: int = 24) -> nn.Module:
    config = (transformers.UMT5Config if kind is transformers.UMT5EncoderModel else transformers.T5Config)(
        vocab_size=128,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return kind(config)


def gemma_encoder() -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=128, head_dim=8, hidden_size=WIDTH, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def autoencoder(channels: int = 4, **config) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, sample_size=8 * CELLS, **config,
    )  # fmt: skip


def flow(**config) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
