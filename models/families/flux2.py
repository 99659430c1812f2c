"""FLUX.2: one large language model for the text, and latents that the VAE's batch norm normalises."""

from collections.abc import Mapping, Sequence

import diffusers
import torch
import transformers
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from models.families.flux import TOKENS, check_guidance
from models.families.transformer import ATTENTION, Transformer, behind, lora_of
from models.latents import LatentCodec


class Flux2(Transformer):
    """FLUX.2 dev. It has no guidance by a null prompt: the pipeline only tells the network a scale."""

    name = "FLUX.2"
    tags = ("flux-2", "repa")
    pipeline = "Flux2Pipeline"
    default_base = "black-forest-labs/FLUX.2-dev"
    assumed_config = {}
    text_fields = ("prompt_embeds", "")
    arguments = {"prompt_embeds": "encoder_hidden_states"}
    patch = (1, 1)  # the VAE's latents are patches already
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = {"attention": lora_of([*ATTENTION, "to_qkv_mlp_proj"])}
    guidance = 3.5
    default_cells = 64
    parts = {
        "transformer": lambda: diffusers.Flux2Transformer2DModel,
        "vae": lambda: diffusers.AutoencoderKLFlux2,
        "text_encoder": lambda: transformers.Mistral3ForConditionalGeneration,
        "tokenizer": lambda: transformers.PixtralProcessor,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }

    def check(self, network: nn.Module) -> None:
        super().check(network)
        check_guidance(self, network)

    def clock(self, network: nn.Module, t: Tensor) -> Tensor:
        return t.float()

    def pack(self, x: Tensor) -> Tensor:
        return diffusers.Flux2Pipeline._pack_latents(x)  # (B, hw, C)

    def unpack(self, output: Tensor, shape: Sequence[int]) -> Tensor:
        return output.transpose(1, 2).unflatten(2, shape[2:])

    def conditions(self, network: nn.Module, x: Tensor, text: Mapping[str, Tensor]) -> dict[str, object]:
        return {
            "img_ids": diffusers.Flux2Pipeline._prepare_latent_ids(x).to(x.device),
            "txt_ids": diffusers.Flux2Pipeline._prepare_text_ids(text["prompt_embeds"]).to(x.device),
            "guidance": torch.full((len(x),), self.guidance, device=x.device),
        }

    def picture(self, hidden: Tensor, count: int, text: Mapping[str, Tensor], tap: str) -> Tensor:
        return behind(hidden, count, tap, text["prompt_embeds"].shape[1])

    def mu_of(self, shape: Sequence[int], steps: int) -> float:
        h, w = self.cells(shape)
        return compute_empirical_mu(h * w, steps)

    def load_codec(self) -> LatentCodec:
        return PatchCodec(self.load("vae"), f"vae of {self.base}")

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, network.config.joint_attention_dim)}


class PatchCodec(LatentCodec):
    """FLUX.2's: latents of 2×2 patches, normalised by the mean and the variance that the VAE's batch norm has learnt."""

    def __init__(self, vae: nn.Module, what: str = "vae"):
        super().__init__(vae, what)
        norm = vae.bn
        self.channels, self.down = 4 * self.channels, 2 * self.down
        self.mean = norm.running_mean.tolist()
        self.std = (norm.running_var + vae.config.batch_norm_eps).sqrt().tolist()
        self.scaling = 1.0

    def to_cells(self, z: Tensor) -> Tensor:
        return diffusers.Flux2Pipeline._patchify_latents(z)

    def from_cells(self, z: Tensor) -> Tensor:
        return diffusers.Flux2Pipeline._unpatchify_latents(z)
