"""AuraFlow: double- and single-stream blocks, with eight registers in front of the text."""

from collections.abc import Mapping

import diffusers
import transformers
from torch import Tensor, nn

from models.families.transformer import JOINT, Transformer, behind, lora_of

TOKENS = 256  # of a prompt, in UMT5
REGISTERS = 8


class AuraFlow(Transformer):
    """AuraFlow 0.3."""

    name = "AuraFlow"
    tags = ("auraflow", "repa")
    pipeline = "AuraFlowPipeline"
    default_base = "fal/AuraFlow-v0.3"
    # Its pipeline draws images of 1024 px, whatever the sample_size.
    assumed_config = {"sample_size": 128, "pos_embed_max_size": 9216}
    text_fields = ("prompt_embeds", "", "negative_prompt_embeds", "")
    arguments = {"prompt_embeds": "encoder_hidden_states"}
    block_lists = ("joint_transformer_blocks", "single_transformer_blocks")
    lora_targets = {"attention": lora_of([rf"attn\.{name}" for name in JOINT])}
    parts = {
        "transformer": lambda: diffusers.AuraFlowTransformer2DModel,
        "vae": lambda: diffusers.AutoencoderKL,
        "text_encoder": lambda: transformers.UMT5EncoderModel,
        "tokenizer": lambda: transformers.T5TokenizerFast,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }

    def clock(self, network: nn.Module, t: Tensor) -> Tensor:
        return t.float()

    def picture(self, hidden: Tensor, count: int, text: Mapping[str, Tensor], tap: str) -> Tensor:
        return behind(hidden, count, tap, REGISTERS + text["prompt_embeds"].shape[1])

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, network.config.joint_attention_dim)}
