"""Kandinsky 5 video lite: latents with channels last, and text that is as long as the longest prompt of a call."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import diffusers
import torch
import transformers
from torch import Tensor, nn

from models.families.transformer import VideoTransformer, lora_of

TOKENS = 512  # of a prompt at most, in Qwen2.5-VL
ATTENTION = ("to_query", "to_key", "to_value", r"self_attention\.out_layer", r"cross_attention\.out_layer")


class Kandinsky5Video(VideoTransformer):
    """Kandinsky 5 text-to-video, of five seconds; those of ten seconds attend in blocks and have another order of tokens.

    No mask of the text reaches the network, so how far a prompt is padded matters. The pipeline pads to the longest prompt of a
    call; here all prompts of a cache are padded to its longest.
    """

    name = "Kandinsky 5 video"
    tags = ("kandinsky5", "crepa")
    pipeline = "Kandinsky5T2VPipeline"
    default_base = "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"
    assumed_config = {"in_visual_dim": 16, "out_visual_dim": 16, "visual_cond": True}
    text_fields = ("prompt_embeds_qwen", "prompt_embeds_clip", "")
    variable_text = ("prompt_embeds_qwen",)
    arguments = {
        "prompt_embeds_qwen": "encoder_hidden_states",
        "prompt_embeds_clip": "pooled_projections",
    }
    block_lists = ("visual_transformer_blocks",)
    default_cells = (31, 64, 96)  # 121 frames of 512 × 768 px
    lora_targets = {"attention": lora_of(ATTENTION)}
    parts = {
        "transformer": lambda: diffusers.Kandinsky5Transformer3DModel,
        "vae": lambda: diffusers.AutoencoderKLHunyuanVideo,
        "text_encoder": lambda: transformers.Qwen2_5_VLForConditionalGeneration,
        "tokenizer": lambda: transformers.Qwen2VLProcessor,
        "text_encoder_2": lambda: transformers.CLIPTextModel,
        "tokenizer_2": lambda: transformers.CLIPTokenizer,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }
    longest: tuple[str, ...] = ()  # what every call encodes too

    def prepare_text(self, prompts: Sequence[str], device: torch.device) -> None:
        tokenizer = self.prompt_encoder(device).parts["tokenizer"].tokenizer
        self.longest = (max(prompts, key=lambda prompt: len(tokenizer(prompt).input_ids)),)

    def encode_text(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        found = super().encode_text([*prompts, *self.longest], device)
        return {name: rows[: len(prompts)] for name, rows in found.items()}

    def null_text(self, device: torch.device) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in self.encode_text([""], device).items()}

    def pack(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)

    def unpack(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output[..., : shape[1]].movedim(-1, 1)

    def conditions(self, network: nn.Module, x: Tensor, text: Mapping[str, Tensor]) -> dict[str, object]:
        latents = self.pack(x)  # (B, f, h, w, C)
        if network.visual_cond:  # channels for a first frame, which text-to-video leaves empty
            latents = torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[..., :1])], -1)
        pipeline, length = diffusers.Kandinsky5T2VPipeline, text["prompt_embeds_qwen"].shape[1]
        places = [torch.arange(n, device=x.device) for n in (*self.cells(x.shape), length)]
        pixels = [8 * n for n in x.shape[3:]]
        return {
            "hidden_states": latents,
            "visual_rope_pos": places[:3],
            "text_rope_pos": places[3],
            "scale_factor": pipeline._get_scale_factor(None, *pixels),
            "sparse_params": pipeline.get_sparse_params(
                SimpleNamespace(transformer=network), latents, x.device
            ),
        }

    def tap_channels(self, network: nn.Module, name: str) -> int:
        return network.config.model_dim

    def latent_channels(self, network: nn.Module) -> int:
        return network.config.in_visual_dim

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        config = network.config
        return {
            "prompt_embeds_qwen": (TOKENS, config.in_text_dim),
            "prompt_embeds_clip": (config.in_text_dim2,),
        }
