"""Pictures of the same seeds from several runs: rows are runs, columns are classes or steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cache.manifest import read_manifest
from cache.text import class_names
from common.errors import UserError
from evaluation.image_files import load_images
from evaluation.sample import draw_samples, image_settings, labels_of
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

    def images(target: Target, wanted: Sequence[int]) -> np.ndarray:
        folder, _ = draw_samples(target, device, wanted, ranks)
        return load_images(folder, wanted)

    if all(len(targets) == 1 for targets in groups.values()):
        columns = [names.get(label, f"class {label}") for label in shown]
        rows = {label: list(images(targets[0], indices)) for label, targets in groups.items()}
    else:
        steps = sorted({target.step for targets in groups.values() for target in targets})
        columns = [f"step {step:,}" for step in steps]
        rows = {}
        for label, targets in groups.items():
            drawn = {target.step: images(target, indices) for target in targets}
            for i, index in enumerate(indices if classes else indices[:3]):
                name = names.get(shown[i], f"class {shown[i]}")
                rows[f"{label}\n{name}, seed {settings['seed'] + index}"] = [
                    drawn[step][i] if step in drawn else None for step in steps
                ]
    note = f"{settings['sampler']} {settings['steps']} steps, guidance {settings['cfg']:g}, seeds from {settings['seed']}"
    plot_rows(file, rows, columns, note)
    return file


def choose_classes(wanted: Sequence[int] | None, count: int) -> list[int]:
    """The wanted classes, by default eight evenly spread ones of all `count`; raises `UserError` for an unknown class."""
    if not wanted:
        few = min(COLUMNS, count)
        return [i * count // few for i in range(few)]
    if foreign := [label for label in wanted if not 0 <= label < count]:
        raise UserError(f"--classes {foreign[0]}: classes are 0 to {count - 1}")
    return list(wanted)


def first_of_class(settings: dict, label: int) -> int:
    """The index of the first image that shows a class."""
    bound = 100 * settings["classes"]  # random labels: more than enough
    return labels_of(settings, range(bound)).index(label) if settings["labels"] == "random" else label
