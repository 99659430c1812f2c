"""HiDream-I1: double- and single-stream blocks with experts, and the states of all layers of a language model as text."""

from collections.abc import Mapping, Sequence
from functools import partial

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor, nn

from models.families.transformer import Transformer, lora_of
from models.taps import TapError

TOKENS = 128  # of a prompt, in T5 and in Llama


class HiDream(Transformer):
    """HiDream-I1 full, dev and fast. Its experts get gradients only in train mode, whose output has another shape."""

    name = "HiDream-I1"
    tags = ("hidream", "repa")
    pipeline = "HiDreamImagePipeline"
    default_base = "HiDream-ai/HiDream-I1-Full"
    assumed_config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 16,
        "num_single_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 20,
        "caption_channels": (4096, 4096),
        "text_emb_dim": 2048,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (64, 32, 32),
        "max_resolution": (128, 128),
        "llama_layers": (*range(32), *[31] * 16),
    }
    text_fields = tuple(
        prefix + name
        for name in ("prompt_embeds_t5", "prompt_embeds_llama3", "pooled_prompt_embeds")
        for prefix in ("", "negative_")
    )
    text_batch_dim = {"prompt_embeds_llama3": 1}
    arguments = {
        "prompt_embeds_t5": "encoder_hidden_states_t5",
        "prompt_embeds_llama3": "encoder_hidden_states_llama3",
        "pooled_prompt_embeds": "pooled_embeds",
    }
    time_argument = "timesteps"
    sign = -1
    block_lists, stream = ("double_stream_blocks", "single_stream_blocks"), 0
    own_sigmas = False
    lora_targets = {"attention": lora_of(["to_q", "to_k", "to_v", "to_out"])}
    default_cells = 128
    forecast_assumes = "each expert gets as many tokens as the others"
    parts = {
        "transformer": lambda: diffusers.HiDreamImageTransformer2DModel,
        "vae": lambda: diffusers.AutoencoderKL,
        "text_encoder": lambda: transformers.CLIPTextModelWithProjection,
        "tokenizer": lambda: transformers.CLIPTokenizer,
        "text_encoder_2": lambda: transformers.CLIPTextModelWithProjection,
        "tokenizer_2": lambda: transformers.CLIPTokenizer,
        "text_encoder_3": lambda: transformers.T5EncoderModel,
        "tokenizer_3": lambda: transformers.T5TokenizerFast,
        "text_encoder_4": lambda: transformers.LlamaForCausalLM,
        "tokenizer_4": lambda: transformers.PreTrainedTokenizerFast,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }

    def unpack(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        if output.shape == shape:
            return output
        h, w = self.cells(shape)
        patches = output[:, :, : h * w].unflatten(3, self.patch).unflatten(2, (h, w))  # (B, C, h, w, 2, 2)
        return patches.transpose(3, 4).reshape(shape)

    def picture(self, hidden: Tensor, count: int, text: Mapping[str, Tensor], tap: str) -> Tensor:
        """In front of the text; an image that is not square is padded to the longest sequence."""
        if hidden.shape[1] < count:
            raise TapError(f"tap {tap} has {hidden.shape[1]} tokens, fewer than the {count} of the picture")
        return hidden[:, :count]

    def forecast(self, network: nn.Module) -> None:
        """Share the tokens out evenly: which expert gets which depends on values."""
        for module in network.modules():
            if isinstance(module, MOEFeedForwardSwiGLU):
                module.forward = partial(even_experts, module)

    def mu_of(self, shape: Sequence[int], steps: int) -> float:
        return self.shifted_mu(self.longest)

    longest = 4096  # tokens of the picture

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        t5, llama = network.config.caption_channels[:2]
        return {
            "prompt_embeds_t5": (TOKENS, t5),
            "prompt_embeds_llama3": (max(network.config.llama_layers) + 1, TOKENS, llama),
            "pooled_prompt_embeds": (network.config.text_emb_dim,),
        }


def even_experts(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer of experts does to tokens `(B, N, D)` in train mode, but that each expert gets as many as the others."""
    scores = F.linear(x.flatten(0, 1), layer.gate.weight).softmax(-1)  # (BN, experts)
    chosen = scores.topk(layer.num_activated_experts).values  # (BN, k)
    rows = x.flatten(0, 1).repeat_interleave(layer.num_activated_experts, 0)  # (BNk, D)
    shares = rows.tensor_split(len(layer.experts))
    y = torch.cat([expert(share) for expert, share in zip(layer.experts, shares, strict=True)])
    y = (y.view(*chosen.shape, -1) * chosen[..., None]).sum(1)  # (BN, D)
    return y.view(x.shape) + layer.shared_experts(x)
