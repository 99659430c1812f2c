"""FLUX.1: a transformer of double- and single-stream blocks on packed latents, told a guidance scale."""

from collections.abc import Mapping, Sequence

import diffusers
import torch
import transformers
from torch import Tensor, nn

from common.errors import UserError
from models.families.transformer import JOINT, Transformer, behind, checkpoint_blocks, lora_of

TOKENS = 512  # of a prompt, in T5


class Flux(Transformer):
    """FLUX.1 dev and schnell."""

    name = "FLUX.1"
    tags = ("flux", "repa")
    pipeline = "FluxPipeline"
    default_base = "black-forest-labs/FLUX.1-dev"
    assumed_config = {"guidance_embeds": True}
    text_fields = ("prompt_embeds", "pooled_prompt_embeds", "")
    arguments = {
        "prompt_embeds": "encoder_hidden_states",
        "pooled_prompt_embeds": "pooled_projections",
    }
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = {"attention": lora_of([rf"attn\.{name}" for name in JOINT])}
    guidance = 3.5  # as in diffusers' own training examples
    default_cells = 128
    parts = {
        "transformer": lambda: diffusers.FluxTransformer2DModel,
        "vae": lambda: diffusers.AutoencoderKL,
        "text_encoder": lambda: transformers.CLIPTextModel,
        "tokenizer": lambda: transformers.CLIPTokenizer,
        "text_encoder_2": lambda: transformers.T5EncoderModel,
        "tokenizer_2": lambda: transformers.T5TokenizerFast,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }

    def check(self, network: nn.Module) -> None:
        super().check(network)
        check_guidance(self, network)

    def clock(self, network: nn.Module, t: Tensor) -> Tensor:
        return t.float()

    def pack(self, x: Tensor) -> Tensor:
        return diffusers.FluxPipeline._pack_latents(x, *x.shape)  # (B, h/2 · w/2, 4C)

    def unpack(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return diffusers.FluxPipeline._unpack_latents(output, *shape[2:], vae_scale_factor=1)

    def conditions(self, network: nn.Module, x: Tensor, text: Mapping[str, Tensor]) -> dict[str, object]:
        places = diffusers.FluxPipeline._prepare_latent_image_ids(
            len(x), *self.cells(x.shape), x.device, x.dtype
        )
        found = {"txt_ids": x.new_zeros(text["prompt_embeds"].shape[1], 3), "img_ids": places}
        if network.config.get("guidance_embeds"):
            found["guidance"] = torch.full((len(x),), self.guidance, device=x.device)
        return found

    def mu_of(self, shape: Sequence[int], steps: int) -> float:
        h, w = self.cells(shape)
        return self.shifted_mu(h * w)

    def latent_channels(self, network: nn.Module) -> int:
        return network.config.in_channels // 4

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        config = network.config
        return {
            "prompt_embeds": (TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }


def check_guidance(family: Transformer, network: nn.Module) -> None:
    """Raise `UserError` where diffusion.guidance is set for a network without an embedding of it, such as FLUX.1 schnell."""
    if family.guidance != type(family).guidance and not network.config.get("guidance_embeds"):
        raise UserError(
            f"diffusion.guidance = {family.guidance:g}, but the {family.part} of {family.base} is told none: leave "
            "it out"
        )


class Chroma(Flux):
    """Chroma: FLUX.1 schnell without CLIP and guidance, with a mask of the text."""

    name = "Chroma"
    tags = ("chroma", "repa")
    pipeline = "ChromaPipeline"
    default_base = "lodestones/Chroma1-HD"
    assumed_config = {}
    text_fields = (
        "prompt_embeds", "", "prompt_attention_mask", "negative_prompt_embeds", "", "negative_prompt_attention_mask",
    )  # fmt: skip
    arguments = {"prompt_embeds": "encoder_hidden_states"}
    guidance = None
    parts = {
        "transformer": lambda: diffusers.ChromaTransformer2DModel,
        "vae": lambda: diffusers.AutoencoderKL,
        "text_encoder": lambda: transformers.T5EncoderModel,
        "tokenizer": lambda: transformers.T5TokenizerFast,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }

    def conditions(self, network: nn.Module, x: Tensor, text: Mapping[str, Tensor]) -> dict[str, object]:
        h, w = self.cells(x.shape)
        # In floating point, which attention adds instead of masking by it: so the pipeline does, and so it was trained.
        mask = torch.cat([text["prompt_attention_mask"].to(x), x.new_ones(len(x), h * w)], 1)
        return super().conditions(network, x, text) | {"attention_mask": mask}

    def picture(self, hidden: Tensor, count: int, text: Mapping[str, Tensor], tap: str) -> Tensor:
        return behind(hidden, count, tap, text["prompt_embeds"].shape[1])

    def checkpoint(self, network: nn.Module, on: bool = True) -> None:
        """Block by block: the class itself forgets the mask of the single-stream blocks where it recomputes them."""
        checkpoint_blocks(network, self.blocks(network).values(), on)

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (TOKENS, network.config.joint_attention_dim),
            "prompt_attention_mask": (TOKENS,),
        }
