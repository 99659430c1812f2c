"""A tiny pipeline of every family, of the real classes with random weights, in the layout of the official folders.

    make_pipeline("sdxl", Path("data/demo/models/sdxl-mini"))

It takes seconds, a few megabytes and no network. All networks take latents of 8×8 cells, of 8 pixels each: images of 64 px.
"""

import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch import nn

from miniature import image_transformers, unets, video_transformers
from miniature.models import reproducible
from miniature.parts import CELLS

PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = (
    unets.PIPELINES | image_transformers.PIPELINES | video_transformers.PIPELINES
)
IMAGES, FRAMES = 8, 9  # noise images or clips from which the scale of latents is measured
VIDEO_AUTOENCODERS = (
    diffusers.AutoencoderKLWan, diffusers.AutoencoderKLLTXVideo, diffusers.AutoencoderKLHunyuanVideo,
)  # fmt: skip


def make_pipeline(family: str, folder: Path, seed: int = 0) -> None:
    """Write the tiny pipeline of a family into a folder; equal seeds give equal files."""
    with reproducible(seed):
        pipeline = PIPELINES[family]()
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                fill(part.eval(), gates=name in ("unet", "transformer"))
        normalise(pipeline.vae)
    pipeline.save_pretrained(folder)


@torch.no_grad()
def fill(module: nn.Module, *, gates: bool) -> None:
    """Draw every matrix of a network anew, so that none is 0 as at the start of a training or uninitialised."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and (gates or not parameter.isfinite().all()):
            parameter.normal_(std=0.7 / math.sqrt(parameter[0].numel()))


@torch.no_grad()
def normalise(vae: nn.Module) -> None:
    """Let the normalisation of the VAE's latents give them a standard deviation of 1."""
    clips = isinstance(vae, VIDEO_AUTOENCODERS)
    pixels = torch.rand(IMAGES, 3, *[FRAMES] * clips, 8 * CELLS, 8 * CELLS) * 2 - 1
    found = vae.encode(pixels)
    latents = found.latent if hasattr(found, "latent") else found.latent_dist.mode()
    if isinstance(vae, diffusers.AutoencoderKLLTXVideo):
        vae.latents_mean.normal_(std=latents.std().item())
        vae.latents_std.fill_(latents.std().item())
    elif isinstance(vae, diffusers.AutoencoderKLWan):
        mean = latents.mean((0, 2, 3, 4)).tolist()
        vae.register_to_config(latents_mean=mean, latents_std=[latents.std().item()] * len(mean))
    elif hasattr(vae, "bn"):
        vae.bn.running_mean.normal_(std=latents.std().item())
        vae.bn.running_var.fill_(latents.var().item())
    else:
        vae.register_to_config(scaling_factor=1 / latents.std().item())
