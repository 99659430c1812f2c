"""Pictures of the same seeds: of several runs side by side, and of one training's moving average while it goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cache.text import shown_prompts
from common.errors import UserError
from evaluation.image_files import load_images
from evaluation.sample import ImageSampler, draw_samples, evenly_spread, image_settings, labels_of
from evaluation.targets import Target
from report.plot_grids import plot_rows, plot_sample_grids
from training.parts import Parts
from training.ranks import Ranks
from training.state import TrainingState

COLUMNS = 8


def draw_pictures(
    file: Path,
    groups: Mapping[str, Sequence[Target]],
    device: torch.device,
    classes: Sequence[int] | None = None,
) -> Path:
    """Draw the images that are missing, write the picture to `file` and return its path.

    `groups` are the targets of each run by its label. A column is a class (`classes`, by default eight evenly spread ones), or
    a step where a run has several targets.
    """
    ranks = Ranks(cpu=device.type == "cpu")
    first = next(iter(groups.values()))[0]
    names = shown_prompts(first.run.config.data.text)
    shown = choose_classes(classes, len(names))
    settings = image_settings(first, device)
    indices = [first_of_class(settings, label) for label in shown]

    def images(target: Target) -> list[np.ndarray]:
        folder, _ = draw_samples(target, device, indices, ranks)
        return list(load_images(folder, indices))

    if all(len(targets) == 1 for targets in groups.values()):
        columns = [names[label] for label in shown]
        rows = {label: images(targets[0]) for label, targets in groups.items()}
    else:
        steps = sorted({target.step for targets in groups.values() for target in targets})
        columns = [f"step {step:,}" for step in steps]
        rows = {}
        for label, targets in groups.items():
            drawn = {target.step: images(target) for target in targets}
            for i, index in enumerate(indices if classes else indices[:3]):
                name = f"{label}\n{names[shown[i]]}, seed {settings['seed'] + index}"
                rows[name] = [drawn[step][i] if step in drawn else None for step in steps]
    note = f"{settings['sampler']} {settings['steps']} steps, guidance {settings['cfg']:g}, seeds from {settings['seed']}"
    return plot_rows(file, rows, columns, note)


def choose_classes(wanted: Sequence[int] | None, count: int) -> list[int]:
    """The wanted classes, by default eight evenly spread ones of all `count`; raises `UserError` for an unknown class."""
    if foreign := [label for label in wanted or () if not 0 <= label < count]:
        raise UserError(f"--classes {foreign[0]}: classes are 0 to {count - 1}")
    return list(wanted or evenly_spread(count, COLUMNS))


def first_of_class(settings: dict, label: int) -> int:
    """The index of the first image that shows a class."""
    bound = 100 * settings["classes"]  # random labels: more than enough
    return labels_of(settings, range(bound)).index(label) if settings["labels"] == "random" else label


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
        names = shown_prompts(self.parts.config.data.text)
        return plot_sample_grids(path, {title: images}, [names[label] for label in self.columns])
