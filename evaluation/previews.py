"""Sample grids of the moving average while a training goes on, from fixed seeds and without touching its random state."""

from pathlib import Path

import numpy as np
import torch

from cache.text import class_names
from method.sampler import rows_of, sample_latents
from models.latents import decode_images
from report.plot_grids import plot_sample_grids
from training.parts import Parts
from training.state import TrainingState

COLUMNS = 8


class Previews:
    """Draws `train.preview_images` images with the settings of `eval`, in rows of eight evenly spread classes.

    Image i starts from the noise of seed i at every step, so that the grids of a run show the same images improve.
    """

    def __init__(self, parts: Parts):
        self.parts, config = parts, parts.config
        self.codec = parts.family.load_codec().to(parts.device)
        self.scheduler = parts.family.sampling_scheduler(parts.loss.path.output, config.eval.sampler)
        self.text = parts.dataset.text.to(parts.device, torch.float32)
        count, classes = config.train.preview_images, len(parts.dataset.text)
        self.columns = min(COLUMNS, count, classes)
        self.labels = [i % self.columns * classes // self.columns for i in range(count)]

    def draw(self, folder: Path, state: TrainingState) -> Path:
        """Write `step-….png` of the moving average and return its file path. Weights, modes and random states stay."""
        settings, dataset = self.parts.config.eval, self.parts.dataset
        with self.parts.showing(state.ema.shadow_params):
            images = self._images()
        path = folder / f"step-{state.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"step {state.step:,} · EMA, {settings.sampler} {settings.sampling_steps} steps, guidance {settings.cfg:g}"
        names = class_names(dataset.text_manifest)
        columns = [names.get(label, f"class {label}") for label in self.labels[: self.columns]]
        plot_sample_grids(path, {title: images}, self.columns, columns)
        return path

    def _images(self) -> np.ndarray:
        """The images `(n, H, W, 3)`, uint8, of the U-Net's present weights."""
        parts, settings, dataset = self.parts, self.parts.config.eval, self.parts.dataset
        latents = sample_latents(
            parts.model.predict,
            self.scheduler,
            self.text.rows(self.labels),
            self.text.null,
            list(range(len(self.labels))),
            shape=dataset.latent_shape,
            steps=settings.sampling_steps,
            cfg=settings.cfg,
            guidance_low=settings.guidance_low,
            guidance_high=settings.guidance_high,
            guidance_space=settings.guidance_space,
            eta=settings.eta,
            rows=rows_of(parts.device, settings.batch_size),
        )
        return decode_images(self.codec, latents)
