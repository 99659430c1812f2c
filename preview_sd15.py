"""Sample grids of the moving average while a training goes on, from fixed seeds and without touching its random state."""

from pathlib import Path

import numpy as np
import torch

from build_sd15 import Parts, sampling_scheduler
from evaluation.plots import plot_sample_grids
from evaluation.sampling import decode_latents, sample_latents
from models.base_model import load_part
from preprocessing.manifest import class_names
from training.masters import Masters
from training.state import TrainingState

COLUMNS = 8


class Previews:
    """Draws `train.preview_images` images with the settings of `eval`, in rows of eight classes, evenly spread; image i starts
    from the noise of seed i at every step, so that the grids of a run show the same pictures growing."""

    def __init__(self, parts: Parts, masters: Masters):
        self.parts, self.masters = parts, masters
        config = parts.config
        self.vae = load_part(config.model.base, "vae", config.model.revision).to(parts.device).eval()
        self.scheduler = sampling_scheduler(config, parts.loss.parameterization)
        count, classes = config.train.preview_images, len(parts.dataset.text)
        self.columns = min(COLUMNS, count, classes)
        self.labels = [i % self.columns * classes // self.columns for i in range(count)]

    def draw(self, folder: Path, state: TrainingState) -> Path:
        """Write `step-….png` of the moving average; returns its path. Weights, modes and random states are as before."""
        unet, settings, dataset = self.parts.model.unet, self.parts.config.eval, self.parts.dataset
        was_training = unet.training
        unet.eval()
        try:
            # Compiled for another batch, the U-Net would be compiled again.
            with self.masters.showing(state.ema.shadow_params), torch.compiler.set_stance("force_eager"):
                images = self._images()
        finally:
            unet.train(was_training)
        path = folder / f"step-{state.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        title = (
            f"step {state.step:,} · EMA, {settings.sampling_steps} steps of DDIM, guidance {settings.cfg:g}"
        )
        names = class_names(dataset.text_manifest)
        columns = [names.get(label, f"class {label}") for label in self.labels[: self.columns]]
        plot_sample_grids(path, {title: images}, self.columns, columns)
        return path

    def _images(self) -> np.ndarray:
        """The pictures `(n, H, W, 3)`, uint8, of the weights that the U-Net has."""
        parts, settings, dataset = self.parts, self.parts.config.eval, self.parts.dataset
        text = dataset.text[self.labels].to(parts.device, torch.float32)  # (n, 77, 768)
        null = dataset.null_text.to(parts.device, torch.float32)
        images = []
        for start in range(0, len(self.labels), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            latents = sample_latents(
                self._network,
                self.scheduler,
                text[part],
                null,
                list(range(len(self.labels)))[part],
                shape=(dataset.latent_channels, *dataset.latents.spec.shape[1:]),
                steps=settings.sampling_steps,
                cfg=settings.cfg,
                guidance_high=settings.guidance_high,
                guidance_space=settings.guidance_space,
            )
            images.append(decode_latents(self.vae, latents))
        return np.concatenate(images)

    def _network(self, latents, timestep, *, encoder_hidden_states, return_dict):
        """The U-Net in its own precision, for a sampler that keeps its latents in fp32."""
        unet, dtype = self.parts.model.unet, self.parts.model.dtype
        text = encoder_hidden_states.to(dtype)
        return tuple(x.float() for x in unet(latents.to(dtype), timestep, text, return_dict=return_dict))
