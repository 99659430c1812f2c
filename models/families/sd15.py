"""Stable Diffusion 1.5: the facts of its U-Net, its text and its LoRA."""

from collections.abc import Mapping, Sequence

import diffusers
import transformers
from torch import Tensor, nn

from common.errors import UserError
from models.backbone import Backbone
from models.taps import Tap

# The blocks around the bottleneck: what LoRA and partial fine-tuning touch.
ALIGNED_BLOCKS = r"(mid_block|down_blocks\.3|up_blocks\.0)"
TOKENS = 77  # of a prompt, in CLIP's text encoder


class SD15(Backbone):
    """Stable Diffusion 1.5, a U-Net of four levels at any width.

    The plan's LoRA wraps 22 modules with 7,462,912 parameters at rank 32 on the full-size network.
    """

    name = "Stable Diffusion 1.5"
    method, tags = "U-REPA", ("stable-diffusion", "u-repa")
    pipeline, part, noun = "StableDiffusionPipeline", "unet", "U-Net"
    text_fields = ("prompt_embeds", "negative_prompt_embeds")
    default_base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assumed_config = {"sample_size": 64, "cross_attention_dim": 768}
    down_blocks = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_blocks = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    # All at the lowest resolution: (B, 1280, 8, 8) for a 64×64 latent. dec_first is read before the upsampler of up_blocks.0,
    # whose own output is already 16×16.
    blocks = {"enc_last": "down_blocks.3", "mid": "mid_block", "dec_first": "up_blocks.0"}
    # Anchored regular expressions: a list of suffixes would match the whole U-Net. down_blocks.3 and up_blocks.0 hold no
    # attention.
    lora_targets = {
        "attention+conv": rf"^{ALIGNED_BLOCKS}\..*\.(to_q|to_k|to_v|to_out\.0|conv1|conv2)$",
        "attention": rf"^{ALIGNED_BLOCKS}\..*\.(to_q|to_k|to_v|to_out\.0)$",
    }
    load_options = {"safety_checker": None, "requires_safety_checker": False}
    kohya_base = "sd_v1"
    # The plan's final numbers.
    final_settings = {"eval.sampling_steps": 250, "eval.cfg": 7.5, "eval.guidance_high": 0.7}
    parts = {
        "unet": lambda: diffusers.UNet2DConditionModel,
        "vae": lambda: diffusers.AutoencoderKL,
        "text_encoder": lambda: transformers.CLIPTextModel,
        "tokenizer": lambda: transformers.CLIPTokenizer,
        "scheduler": lambda: diffusers.DDPMScheduler,  # reads any scheduler of the same noise schedule
    }

    def check(self, network: nn.Module) -> None:
        found = tuple(network.config.down_block_types), tuple(network.config.up_block_types)
        if found != (self.down_blocks, self.up_blocks):
            raise UserError(
                f"the base model's U-Net has {len(found[0])} levels ({', '.join(found[0])}), not those of {self.name}: check "
                "model.base"
            )

    def check_trained(self, taps: Sequence[str], train: str, lora_targets: str) -> None:
        if train == "lora" and lora_targets == "attention" and "enc_last" in taps:
            raise UserError(
                "nothing before enc_last is trained by attention-only LoRA: drop it from align.taps"
            )

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        return network(x_t, t, text["prompt_embeds"], return_dict=False)[0]

    def tap_names(self, network: nn.Module) -> tuple[str, ...]:
        return tuple(self.blocks)

    def main_tap(self, network: nn.Module) -> str:
        return "mid"

    def partial_blocks(self, network: nn.Module) -> tuple[str, ...]:
        return tuple(self.blocks.values())

    def checkpointed(self, network: nn.Module) -> set[type[nn.Module]]:
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        return {ResnetBlock2D, BasicTransformerBlock}

    def tap(self, network: nn.Module, name: str) -> Tap:
        """Of the last ResNet or transformer of the block, before any upsampler."""
        path = self.blocks[name]
        block = network.get_submodule(path)
        if name == "mid" or not getattr(block, "attentions", None):
            return Tap(f"{path}.resnets.{len(block.resnets) - 1}")
        return Tap(
            f"{path}.attentions.{len(block.attentions) - 1}", read=lambda output, _args, _kwargs: output[0]
        )

    def tap_channels(self, network: nn.Module, name: str) -> int:
        return network.config.block_out_channels[-1]

    def latent_shape(self, network: nn.Module) -> tuple[int, ...]:
        side = network.config.sample_size
        if not isinstance(side, int) or side < 1:
            raise UserError(f"unet of {self.base} has sample_size = {side!r:.60}: mend its config.json")
        return network.config.in_channels, side, side

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, network.config.cross_attention_dim)}

    def check_text(self, parts: Mapping[str, object]) -> None:
        for name, tokenizer in parts.items():
            if name.startswith("tokenizer"):
                check_clip(tokenizer, parts[name.replace("tokenizer", "text_encoder")], name, self.base)


def check_clip(tokenizer, encoder: nn.Module, name: str, base: str) -> None:
    """Raise `UserError` unless a CLIP tokenizer cuts prompts as CLIP's do, and its text encoder takes its tokens."""
    if tokenizer.model_max_length != TOKENS:
        raise UserError(
            f"{name} of {base} has model_max_length = {tokenizer.model_max_length!r:.60}; CLIP's is {TOKENS}: give the "
            f"{name}/ folder of the base model, whole"
        )
    config, part = encoder.config, name.replace("tokenizer", "text_encoder")
    if config.max_position_embeddings < TOKENS or config.vocab_size < len(tokenizer):
        raise UserError(
            f"{part} of {base} takes {config.max_position_embeddings} tokens of {config.vocab_size} kinds, the tokenizer gives "
            f"{TOKENS} of {len(tokenizer)}: give a whole pipeline folder"
        )
