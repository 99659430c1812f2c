"""Lumina-Image 2.0: text and picture in one ragged sequence, time that runs from noise to data."""

from collections.abc import Mapping, Sequence

import diffusers
import torch
import transformers
from torch import Tensor, nn

from models.families.transformer import ATTENTION, Transformer, lora_of
from models.taps import TapError

TOKENS = 256  # of a prompt, in Gemma


class Lumina2(Transformer):
    """Lumina-Image 2.0."""

    name = "Lumina-Image 2.0"
    tags = ("lumina2", "repa")
    pipeline = "Lumina2Pipeline"
    default_base = "Alpha-VLLM/Lumina-Image-2.0"
    assumed_config = {
        "sample_size": 128,
        "in_channels": 16,
        "hidden_size": 2304,
        "num_layers": 26,
        "num_refiner_layers": 2,
        "num_attention_heads": 24,
        "num_kv_heads": 8,
        "axes_dim_rope": (32, 32, 32),
        "axes_lens": (300, 512, 512),
        "cap_feat_dim": 2304,
    }
    forecast_assumes = f"each prompt has {TOKENS} tokens"
    sign = -1
    trimmed_text = {"prompt_embeds": "prompt_attention_mask"}
    block_lists = ("layers",)
    lora_targets = {"attention": lora_of(ATTENTION)}
    parts = {
        "transformer": lambda: diffusers.Lumina2Transformer2DModel,
        "vae": lambda: diffusers.AutoencoderKL,
        "text_encoder": lambda: transformers.Gemma2Model,
        "tokenizer": lambda: transformers.GemmaTokenizer,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }

    def clock(self, network: nn.Module, t: Tensor) -> Tensor:
        return 1 - t.float()

    def picture(self, hidden: Tensor, count: int, text: Mapping[str, Tensor], tap: str) -> Tensor:
        """Behind the text of each prompt, whose length its mask has."""
        lengths = text["prompt_attention_mask"].sum(1)  # (B,)
        if not lengths.is_meta and int(lengths.max()) + count != hidden.shape[1]:
            raise TapError(
                f"tap {tap} has {hidden.shape[1]} tokens, {int(lengths.max())} of text and {count} of the picture were expected"
            )
        places = lengths[:, None] + torch.arange(count, device=hidden.device)  # (B, count)
        return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))

    def forecast(self, network: nn.Module) -> None:
        """Take all prompts for as long as they may be: how long they are is in the mask's values."""
        places = network.rope_embedder.forward
        network.rope_embedder.forward = lambda x, mask: places(
            x, torch.ones(mask.shape, dtype=torch.long, device="cpu")
        )

    def mu_of(self, shape: Sequence[int], steps: int) -> float:
        return self.shifted_mu(shape[0])  # the pipeline takes the number of channels for that of tokens

    def tap_channels(self, network: nn.Module, name: str) -> int:
        return network.config.hidden_size

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (TOKENS, network.config.cap_feat_dim),
            "prompt_attention_mask": (TOKENS,),
        }
