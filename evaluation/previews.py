"""Sample grids of the moving average while a training goes on, from fixed seeds and without touching its random state."""

from pathlib import Path

from cache.text import class_names
from evaluation.sample import ImageSampler, evenly_spread
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
        self.image_sampler = ImageSampler(parts.model, config, parts.dataset.text)
        count = config.train.preview_images
        self.columns = evenly_spread(len(parts.dataset.text), min(COLUMNS, count))
        self.labels = [self.columns[i % len(self.columns)] for i in range(count)]

    def draw(self, folder: Path, state: TrainingState) -> Path:
        """Write `step-….png` of the moving average and return its file path. Weights, modes and random states stay."""
        settings = self.parts.config.eval
        with self.parts.showing(state.ema.shadow_params):
            images = self.image_sampler.draw(self.labels, range(len(self.labels)))
        path = folder / f"step-{state.step:07d}.png"
        title = f"step {state.step:,} · EMA, {settings.sampler} {settings.sampling_steps} steps, guidance {settings.cfg:g}"
        names = class_names(self.parts.dataset.text_manifest)
        named = [names.get(label, f"class {label}") for label in self.columns]
        plot_sample_grids(path, {title: images}, len(named), named)
        return path
