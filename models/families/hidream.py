"""HiDream-I1: double- and single-stream blocks with experts, and the states of all layers of a language model as text."""

from collections.abc import Mapping, Sequence

import diffusers
import transformers
from torch import Tensor, nn

from models.taps import TapError
from models.transformer import Transformer, lora_of

TOKENS = 128  # of a prompt, in T5 and in Llama


class HiDream(Transformer):
    """HiDream-I1 full, dev and fast. Its experts get gradients only in train mode, whose output has another shape."""

    name = "HiDream-I1"
    tags = ("hidream", "repa")
    pipeline = "HiDreamImagePipeline"
    default_base = "HiDream-ai/HiDream-I1-Full"
    assumed_config = {}  # noqa: RUF012 (never written to)
    text_fields = tuple(
        prefix + name
        for name in ("prompt_embeds_t5", "prompt_embeds_llama3", "pooled_prompt_embeds")
        for prefix in ("", "negative_")
    )
    text_batch_dim = {"prompt_embeds_llama3": 1}  # noqa: RUF012
    arguments = {  # noqa: RUF012
        "prompt_embeds_t5": "encoder_hidden_states_t5",
        "prompt_embeds_llama3": "encoder_hidden_states_llama3",
        "pooled_prompt_embeds": "pooled_embeds",
    }
    time_argument = "timesteps"
    sign = -1
    block_lists, stream = ("double_stream_blocks", "single_stream_blocks"), 0
    own_sigmas = False
    lora_targets = {"attention": lora_of(["to_q", "to_k", "to_v", "to_out"])}  # noqa: RUF012
    default_cells = 128
    parts = {  # noqa: RUF012
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
