"""LTX-Video: packed latents of a deep video autoencoder, whose places in time are seconds."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import diffusers
import torch
import transformers
from torch import Tensor, nn

from common.errors import UserError
from models.families.transformer import ATTENTION, VideoTransformer, lora_of
from models.latents import LatentCodec, frames_of_cell, pixels_of_cell
from models.pipeline_parts import shapes_of_part

TOKENS = 128  # of a prompt, in T5


class LTXVideo(VideoTransformer):
    """LTX-Video 0.9 and after."""

    name = "LTX-Video"
    tags = ("ltx-video", "crepa")
    pipeline = "LTXPipeline"
    default_base = "Lightricks/LTX-Video"
    assumed_config = {}
    patch = (1, 1, 1)
    trimmed_text = {"prompt_embeds": "prompt_attention_mask"}
    frame_rate = 25.0  # as the pipeline's call has it by default; a training takes that of its clips
    default_cells = (21, 16, 22)  # 161 frames of 512 × 704 px
    lora_targets = {"attention": lora_of(ATTENTION)}
    parts = {
        "transformer": lambda: diffusers.LTXVideoTransformer3DModel,
        "vae": lambda: diffusers.AutoencoderKLLTXVideo,
        "text_encoder": lambda: transformers.T5EncoderModel,
        "tokenizer": lambda: transformers.T5TokenizerFast,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }

    def pack(self, x: Tensor) -> Tensor:
        return diffusers.LTXPipeline._pack_latents(x)  # (B, f·h·w, C)

    def unpack(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return diffusers.LTXPipeline._unpack_latents(output, *shape[2:])

    @cached_property
    def compression(self) -> tuple[int, int]:
        """Frames and pixels, on a side, of one cell of the latents."""
        try:
            vae = shapes_of_part(self.base, "vae", self.parts["vae"](), self.revision, local=True)
        except UserError:  # not at hand
            return 8, 32
        return frames_of_cell(vae), pixels_of_cell(vae)

    def conditions(self, network: nn.Module, x: Tensor, text: Mapping[str, Tensor]) -> dict[str, object]:
        (frames, pixels), places = (
            self.compression,
            zip(("num_frames", "height", "width"), x.shape[2:], strict=True),
        )
        return dict(places) | {"rope_interpolation_scale": (frames / self.frame_rate, pixels, pixels)}

    def mu_of(self, shape: Sequence[int], steps: int) -> float:
        f, h, w = self.cells(shape)
        return self.shifted_mu(f * h * w)

    def load_codec(self) -> LatentCodec:
        return LTXCodec(self.load("vae"), f"vae of {self.base}")

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (TOKENS, network.config.caption_channels),
            "prompt_attention_mask": (TOKENS,),
        }


class LTXCodec(LatentCodec):
    """LTX-Video's, some of whose decoders are told a noise level: 0, as by default in the pipeline."""

    def decode_cells(self, z: Tensor) -> Tensor:
        timestep = (
            torch.zeros(1, device=z.device, dtype=z.dtype) if self.vae.config.timestep_conditioning else None
        )
        return self.vae.decode(z, timestep, return_dict=False)[0]
