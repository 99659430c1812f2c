"""Pictures of the same seeds from several runs: rows are runs, columns are classes or steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cache.manifest import read_manifest
from cache.text import class_names
from common.errors import UserError
from evaluation.image_files import load_images
from evaluation.sample import draw_samples, evenly_spread, image_settings, labels_of
from evaluation.targets import Target
from report.plot_grids import plot_rows
from training.ranks import Ranks

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
    names = class_names(read_manifest(first.run.config.data.text, "text"))
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
    plot_rows(file, rows, columns, note)
    return file


def choose_classes(wanted: Sequence[int] | None, count: int) -> list[int]:
    """The wanted classes, by default eight evenly spread ones of all `count`; raises `UserError` for an unknown class."""
    if foreign := [label for label in wanted or () if not 0 <= label < count]:
        raise UserError(f"--classes {foreign[0]}: classes are 0 to {count - 1}")
    return list(wanted or evenly_spread(count, COLUMNS))


def first_of_class(settings: dict, label: int) -> int:
    """The index of the first image that shows a class."""
    bound = 100 * settings["classes"]  # random labels: more than enough
    return labels_of(settings, range(bound)).index(label) if settings["labels"] == "random" else label
