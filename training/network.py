"""The family and the base network that a config names."""

import torch
from torch import nn

from cache.manifest import MANIFEST, read_manifest
from common.errors import UserError
from configs.schema import Config
from configs.sections import Model
from models.backbone import Backbone
from models.families.table import family_of


def family_for(config: Config) -> Backbone:
    """Return the family of the config's base model, whose network is told `diffusion.guidance` and the rate of the clips.

    Raises `UserError` where it is set for a family whose networks are told none.
    """
    family, guidance = family_of(config.model.base, config.model.revision), config.diffusion.guidance
    if guidance is not None:
        if family.guidance is None:
            raise UserError(
                f"diffusion.guidance is for networks that are told a guidance scale; {family.name} is told none: leave it out"
            )
        family.guidance = guidance
    if family.frame_rate is not None and (data := config.data.latents / MANIFEST).exists():
        family.frame_rate = read_manifest(data.parent, "latents")["view"].get("fps", family.frame_rate)
    return family


def load_network(settings: Model, family: Backbone, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the base model's network: frozen weights at once in the `dtype` of the forward, those that are trained in fp32."""
    if settings.train != "lora":
        return family.load_network()
    return family.load_network(dtype, settings.quantize, device)


def output_of(config: Config) -> str:
    """Return what the network of a run outputs, "epsilon" or "v"."""
    return family_for(config).output_of(config.diffusion.parameterization)
