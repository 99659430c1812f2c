"""The options of evaluate.py: which runs, and which settings of `eval` differ from a run's own."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from common.arguments import SIDE, sides
from configs.loading import knobs_help
from metrics.similarity_rows import TIMESTEPS

SWEEP = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 7.5)  # guidance scales

Option = tuple[tuple[str, ...], dict]


def option(*names: str, **details) -> Option:
    """An option or argument, by what `add_argument` is given."""
    return names, details


def runs(which: str = "newest", more: str = "") -> list[Option]:
    """RUN…, the checkpoint (`which` is its default) and the device; `more` ends RUN's help."""
    what = "run folder of train.py, a checkpoint's folder in it, or a config (.yaml): the base model it names"
    steps = f"a step, newest or all (default: {which})"
    return [
        option("runs", type=Path, nargs="+", metavar="RUN", help=what + more),
        option("--checkpoint", default=which, metavar="STEP", help=steps),
        option("--raw", action="store_true", help="the raw weights instead of their moving average"),
        DEVICE,
    ]


def settings(default: str = "the run's own") -> Option:
    """The `key=value` settings of `eval`, for usage and help; `split_settings` takes them out before argparse parses."""
    meaning = f"settings of eval, listed below (default: {default})"
    return option("settings", nargs="*", metavar="key=value", help=meaning)


DEVICE = option("--device", default="auto", help="auto (default) = cuda when present, else cpu")
BASELINE = option("--baseline", type=Path, metavar="RUN", help="compare with it (the run whose λ is 0)")
OPTIONS = {
    "sample": [
        *runs(),
        settings(),
        option("--npz", action="store_true", help="write the images as one .npz (arr_0) for ADM's evaluator too"),
    ],
    "metrics": [
        *runs(more="; also a folder of images, or an .npz of them"),
        settings(),
        option("--out", type=Path, help="JSON file for the numbers of such images and their protocol"),
    ],
    "reference": [
        option("images", type=Path, help="CSV of script 1, or a folder of images"),
        option(
            "--size", type=sides(8, SIDE), default=512,
            help="side of the central square that is compared (512), or WIDTHxHEIGHT of the central crop",
        ),
        option("--out", type=Path, required=True, help="OUT.PROTOCOL.npz are written"),
        DEVICE,
        settings("those of a config that sets none"),
    ],
    "curve": [
        *runs("all"), settings(), option("--out", type=Path, help="folder of the figures (runs/curve)"), BASELINE,
    ],
    "final": [
        *runs(),
        settings("what the family has for final numbers, and the run's own; those of the sweep: the run's own"),
        option(
            "--sweep", type=float, nargs="*", default=SWEEP, metavar="SCALE",
            help=f"guidance scales (default: {' '.join(f'{s:g}' for s in SWEEP)})",
        ),
    ],
    "align": [
        *runs(),
        settings(),
        option(
            "--timesteps", type=int, nargs="+", default=TIMESTEPS, metavar="T",
            help=f"noise levels, from 0 (clean) up (default: {' '.join(map(str, TIMESTEPS))})",
        ),
        option("--num-images", type=int, help="held-out images, in eval.csv's order (default: 1000, or all there are)"),
        option("--no-base", action="store_true", help="leave the bare base model out"),
        option(
            "--embedding", choices=["tsne", "umap"], default="tsne",
            help="umap also draws align_umap.png (pip install umap-learn)",
        ),
    ],
    "pictures": [
        *runs(),
        settings(),
        option("-o", "--out", type=Path, required=True, help="PNG file"),
        option(
            "--prompts", "--classes", nargs="+", metavar="PROMPT",
            help="classes or prompts to show, each by its number or as the prompt's text (default: eight, evenly spread)",
        ),
    ],
    "report": [
        runs()[0],
        option("-o", "--out", type=Path, required=True, help="the page, an .html file"),
        BASELINE,
        option(
            "--times", type=Path,
            help="JSON list of {stage, seconds, command, group}; stages of one group ran side by side",
        ),
        option("--note", metavar="TEXT", help="a paragraph for the top of the page"),
    ],
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of a subcommand, and where it takes settings their list below."""
    for names, details in OPTIONS[command]:
        parser.add_argument(*names, **details)
        if names == ("settings",):
            parser.epilog = f"settings (the values are the defaults of a config that does not set them):\n{knobs_help('eval')}"


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into its `key=value` settings and all other arguments.

    An existing file or folder with a "=" in its name is a RUN, and what follows -o or --out is a file path.
    """
    settings, others = [], []
    for before, argument in zip(["", *argv], argv, strict=False):
        key_value = "=" in argument and not argument.startswith("-")
        is_setting = key_value and before not in ("-o", "--out") and not os.path.exists(argument)
        (settings if is_setting else others).append(argument)
    return settings, others
