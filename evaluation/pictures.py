"""Pictures of the same seeds from several runs: rows are runs, columns are classes or steps."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cache.manifest import class_names, read_manifest
from common.errors import UserError
from evaluation.image_files import load_images
from evaluation.options import chosen_of
from evaluation.sample import draw_samples, labels_of, settings_of
from evaluation.targets import Target
from report.plot_grids import plot_rows
from training.ranks import Ranks

COLUMNS = 8


def draw_pictures(
    groups: Mapping[str, Sequence[Target]], args: argparse.Namespace, device: torch.device
) -> Path:
    """Draw what is missing and write the picture: a column for each class, or for each step where runs have several targets."""
    ranks = Ranks(cpu=device.type == "cpu")
    first = next(iter(groups.values()))[0]
    chosen = chosen_of(first.run.config, args.changes)
    names = class_names(read_manifest(first.run.config.data.text, "text"))
    classes = picked(args.classes, len(names))
    settings = settings_of(first, chosen, device)
    indices = [first_of_class(settings, label) for label in classes]

    def images(target: Target, wanted: Sequence[int]) -> np.ndarray:
        folder, _ = draw_samples(target, chosen, device, wanted, ranks)
        return load_images(folder, wanted)

    if all(len(targets) == 1 for targets in groups.values()):
        columns = [names.get(label, f"class {label}") for label in classes]
        rows = {label: list(images(targets[0], indices)) for label, targets in groups.items()}
    else:
        steps = sorted({target.step for targets in groups.values() for target in targets})
        columns = [f"step {step:,}" for step in steps]
        rows = {}
        for label, targets in groups.items():
            drawn = {target.step: images(target, indices) for target in targets}
            for i, index in enumerate(indices if args.classes else indices[:3]):
                name = names.get(classes[i], f"class {classes[i]}")
                rows[f"{label}\n{name}, seed {settings['seed'] + index}"] = [
                    drawn[step][i] if step in drawn else None for step in steps
                ]
    note = f"{settings['sampler']} {settings['steps']} steps, guidance {settings['cfg']:g}, seeds from {settings['seed']}"
    plot_rows(args.out, rows, columns, note)
    return args.out


def picked(wanted: Sequence[int] | None, count: int) -> list[int]:
    """The classes that are asked for, else eight of all, evenly spread; raises `UserError` for one that is not there."""
    if not wanted:
        few = min(COLUMNS, count)
        return [i * count // few for i in range(few)]
    if foreign := [label for label in wanted if not 0 <= label < count]:
        raise UserError(f"--classes {foreign[0]}: classes are 0 to {count - 1}")
    return list(wanted)


def first_of_class(settings: dict, label: int) -> int:
    """The first image that shows a class."""
    bound = 100 * settings["classes"]  # random labels: more than enough
    return labels_of(settings, range(bound)).index(label) if settings["labels"] == "random" else label
