"""The options of evaluate_sd15.py: which runs, and which settings of `eval` differ from a run's own."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from configs.loading import knobs_help
from metrics.similarity_rows import TIMESTEPS

FINAL = {"eval.sampling_steps": 250, "eval.cfg": 7.5, "eval.guidance_high": 0.7}  # the plan's final numbers
SWEEP = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 7.5)  # guidance scales


def add_runs(parser: argparse.ArgumentParser, which: str | None = "newest", more: str = "") -> None:
    """Add RUN…, and unless `which` is None the checkpoint (`which` is its default) and the device; `more` ends RUN's help."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder of train_sd15.py, a checkpoint's folder in it, or a config (.yaml) for the base model it names"
        + more,
    )
    if which is not None:
        parser.add_argument(
            "--checkpoint", default=which, metavar="STEP", help=f"a step, newest or all (default: {which})"
        )
        parser.add_argument(
            "--raw", action="store_true", help="the raw weights instead of their moving average"
        )
        parser.add_argument("--device", default="auto", help="auto (default) = cuda when present, else cpu")


def add_settings(parser: argparse.ArgumentParser, default: str = "the run's own") -> None:
    """Add the `key=value` settings of `eval` to usage and help; `split_settings` takes them out before argparse parses."""
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help=f"settings of eval, listed below (default: {default})",
    )
    parser.epilog = (
        f"settings (the values are the defaults of a config that does not set them):\n{knobs_help('eval')}"
    )


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into its `key=value` settings and all other arguments.

    An existing file or folder with a "=" in its name is a RUN, and what follows -o or --out is a file path.
    """
    settings, others = [], []
    for before, argument in zip(["", *argv], argv, strict=False):
        key_value = "=" in argument and not argument.startswith("-")
        is_setting = key_value and before not in ("-o", "--out") and not Path(argument).exists()
        (settings if is_setting else others).append(argument)
    return settings, others


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    add_settings(parser)
    parser.add_argument(
        "--npz", action="store_true", help="write the images as one .npz (arr_0) for ADM's evaluator too"
    )


def add_metrics_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, more="; also a folder of images, or an .npz of them")
    parser.add_argument(
        "--out", type=Path, help="JSON file for the numbers of such images and their protocol"
    )
    add_settings(parser)


def add_reference_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, help="CSV of script 1, or a folder of images")
    parser.add_argument(
        "--size", type=int, default=512, help="side of the central square that is compared (512)"
    )
    parser.add_argument("--out", type=Path, required=True, help="OUT.PROTOCOL.npz are written")
    parser.add_argument("--device", default="auto", help="auto (default) = cuda when present, else cpu")
    add_settings(parser, "those of a config that sets none")


def add_curve_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, which="all")
    parser.add_argument("--out", type=Path, help="folder of the figures (runs/curve)")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="compare with it (the run whose λ is 0)")
    add_settings(parser)


def add_final_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument(
        "--sweep", type=float, nargs="*", default=SWEEP, metavar="SCALE",
        help=f"guidance scales (default: {' '.join(f'{s:g}' for s in SWEEP)})",
    )  # fmt: skip
    add_settings(
        parser,
        f"{' '.join(f'{key}={value}' for key, value in FINAL.items())}; the rest, and all of the sweep, the run's own",
    )


def add_align_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    add_settings(parser)
    parser.add_argument(
        "--timesteps", type=int, nargs="+", default=TIMESTEPS, metavar="T",
        help=f"noise levels, 0 (clean) to 999 (default: {' '.join(map(str, TIMESTEPS))})",
    )  # fmt: skip
    parser.add_argument(
        "--num-images",
        type=int,
        help="held-out images, in eval.csv's order (default: 1000, or all there are)",
    )
    parser.add_argument("--no-base", action="store_true", help="leave the bare base model out")
    parser.add_argument(
        "--embedding", choices=["tsne", "umap"], default="tsne",
        help="umap also draws align_umap.png (pip install umap-learn)",
    )  # fmt: skip


def add_pictures_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG file")
    parser.add_argument(
        "--classes", type=int, nargs="+", help="classes to show (default: eight, evenly spread)"
    )
    add_settings(parser)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, which=None)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the page, an .html file")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="compare with it (the run whose λ is 0)")
    parser.add_argument(
        "--times",
        type=Path,
        help="JSON list of {stage, seconds, command, group}; stages of one group ran side by side",
    )
