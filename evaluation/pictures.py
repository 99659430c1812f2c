"""Pictures of the same seeds: of several runs side by side, and of one training's moving average while it goes on."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from cache.films import spread_frames
from cache.text import find_prompts, shown_prompts
from evaluation.image_files import clips_of, load_images
from evaluation.sample import ImageSampler, draw_samples, evenly_spread, image_recipe, labels_of
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
    wanted: Sequence[str] | None = None,
) -> Path:
    """Draw the images that are missing, write the picture to `file` and return its path.

    `groups` are the targets of each run by its label. A column is a class or prompt (those `wanted`, each by its number or
    its prompt, by default eight evenly spread ones), or a step where a run has several targets. Of clips a row is a clip and
    a column one of its frames.
    """
    ranks = Ranks(cpu=device.type == "cpu")
    first = next(iter(groups.values()))[0]
    folder = first.run.config.data.text
    names = shown_prompts(folder)
    shown = find_prompts(folder, wanted, "--prompts") if wanted else evenly_spread(len(names), COLUMNS)
    recipe = image_recipe(first, device)
    indices = [first_of_class(recipe, label) for label in shown]

    def images(target: Target) -> list[np.ndarray]:
        folder, _ = draw_samples(target, device, indices, ranks)
        return list(load_images(folder, indices))

    if frames := recipe.get("frames"):
        clips = {
            label if len(targets) == 1 else f"{label}, step {target.step:,}": clips_of(
                np.stack(images(target)), frames
            )
            for label, targets in groups.items()
            for target in targets
        }
        columns, rows = frame_names(frames), {}
        for i, index in enumerate(indices):
            for label, found in clips.items():
                name = f"{label}\n{names[shown[i]]}, seed {recipe['seed'] + index}"
                rows[name] = list(found[i][spread_frames(frames, COLUMNS)])
    elif all(len(targets) == 1 for targets in groups.values()):
        columns = [names[label] for label in shown]
        rows = {label: images(targets[0]) for label, targets in groups.items()}
    else:
        steps = sorted({target.step for targets in groups.values() for target in targets})
        columns = [f"step {step:,}" for step in steps]
        rows = {}
        for label, targets in groups.items():
            drawn = {target.step: images(target) for target in targets}
            for i, index in enumerate(indices if wanted else indices[:3]):
                name = f"{label}\n{names[shown[i]]}, seed {recipe['seed'] + index}"
                rows[name] = [drawn[step][i] if step in drawn else None for step in steps]
    note = f"{recipe['sampler']} {recipe['steps']} steps, guidance {recipe['cfg']:g}, seeds from {recipe['seed']}"
    return plot_rows(file, rows, columns, note)


def frame_names(frames: int) -> list[str]:
    """The names of the columns in which frames of a clip are shown."""
    return [f"frame {number + 1}" for number in spread_frames(frames, COLUMNS)]


def first_of_class(recipe: dict, label: int) -> int:
    """The index of the first image that shows a class."""
    bound = 100 * recipe["classes"]  # random labels: more than enough
    return labels_of(recipe, range(bound)).index(label) if recipe["labels"] == "random" else label


class Previews:
    """Draws `train.preview_images` images with the settings of `eval`, in rows of `train.preview_prompts`.

    Where there are none, of eight evenly spread classes or prompts. Image i starts from the noise of seed i at every step, so
    that the grids of a run show the same images improve. A clip is a row of its frames.
    """

    def __init__(self, parts: Parts):
        self.parts, config = parts, parts.config
        self.image_sampler = ImageSampler(parts.model, config, parts.dataset.text)
        count = config.train.preview_images
        given, folder = config.train.preview_prompts, config.data.text
        self.columns = (
            find_prompts(folder, given, "train.preview_prompts")
            if given
            else evenly_spread(len(parts.dataset.text), min(COLUMNS, count))
        )
        names = shown_prompts(folder)
        self.names = [names[label] for label in self.columns]
        self.labels = [self.columns[i % len(self.columns)] for i in range(count)]

    def draw(self, folder: Path, state: TrainingState) -> Path:
        """Write `step-….png` of the moving average and return its file path. Weights, modes and random states stay."""
        settings = self.parts.config.eval
        with self.parts.showing(state.ema.shadow_params):
            images = self.image_sampler.draw(self.labels, range(len(self.labels)))
        path = folder / f"step-{state.step:07d}.png"
        title = f"step {state.step:,} · EMA, {settings.sampler} {settings.sampling_steps} steps, guidance {settings.cfg:g}"
        if images.ndim == 5:
            frames, shown = images.shape[1], zip(cycle(self.names), images, strict=False)
            rows = {f"{name}, seed {i}": clip for i, (name, clip) in enumerate(shown)}
            rows = {name: list(clip[spread_frames(frames, COLUMNS)]) for name, clip in rows.items()}
            return plot_rows(path, rows, frame_names(frames), title)
        return plot_sample_grids(path, {title: images}, self.names)
