"""The material of a page about several runs, and the words in which its sections describe it."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from report.curves import points_under

SAMPLER_NAMES = {"ddim": "DDIM", "ddpm": "DDPM", "dpm++": "DPM-Solver++"}
MADE_BY = ("curve", "metrics")  # kinds of points that the results may come from


@dataclass(frozen=True)
class Pictures:
    """Images `(H, W, 3)` uint8 in rows {label: images} under `columns`; None where an image was not drawn."""

    rows: Mapping[str, Sequence[np.ndarray | None]]
    columns: Sequence[str]
    caption: str


@dataclass(frozen=True)
class RunFacts:
    """The records of one run.

    `points` are the lines of its points.jsonl, `log` those of its metrics.jsonl, `alignment` the contents of its align.json
    (None where `align` was not run) and `figures` the pictures beside that file.
    """

    is_base: bool
    settings: Mapping[str, object]
    commands: Sequence[str]
    log: Sequence[Mapping[str, float]]
    points: Sequence[Mapping]
    alignment: Mapping | None = None
    figures: Sequence[Path] = ()


@dataclass(frozen=True)
class Material:
    """Everything that the page shows.

    The runs by label; the label of the `baseline` that the others are compared with; the contents of curve.json and its
    figures; grids of samples; rows of pictures; stages with their `times`; the `command` that makes the page; the `folder` of
    its figures.
    """

    runs: Mapping[str, RunFacts]
    baseline: str | None
    curve: Mapping | None
    curve_figures: Sequence[Path]
    grids: Mapping[str, np.ndarray]
    grid_columns: Sequence[str]
    pictures: Sequence[Pictures]
    times: Sequence[Mapping]
    command: str
    folder: Path


def points_at(
    runs: Mapping[str, RunFacts], protocol: Mapping, kinds: Sequence[str] = MADE_BY
) -> dict[str, list[Mapping]]:
    """The points of each run under a protocol, by step and only the last of each step; runs without any are left out."""
    found = {name: points_under(run.points, protocol, kinds) for name, run in runs.items()}
    return {name: points for name, points in found.items() if points}


def last_points(
    runs: Mapping[str, RunFacts], protocol: Mapping, kinds: Sequence[str] = MADE_BY
) -> dict[str, Mapping]:
    """The point of each run's last step under a protocol; runs without any are left out."""
    return {name: points[-1] for name, points in points_at(runs, protocol, kinds).items()}


def describe_protocol(protocol: Mapping, scale: str | None = None) -> str:
    """Describe in words how images were drawn and measured; `scale`, if given, is written in place of the guidance scale."""
    p = protocol
    guided = "unguided"
    if p["cfg"] > 1:
        low, high = p["guidance_interval"]
        where = (
            "" if (low, high) == (0, 1) else f" at noise levels {low:g} to {high:g} ({p['guidance_space']})"
        )
        guided = f"guidance {scale or format(p['cfg'], 'g')}{where}"
    eta = f", η = {p['eta']:g}" if p["eta"] else ""
    judged = "; ".join(
        f"{name}: {judge['extractor']['network']} {judge['extractor']['weights_sha256'][:8]}, {judge['extractor']['resize']}, "
        f"against {judge['reference']['name']}"
        + (
            f" ({judge['reference']['num_images']:,} real images)"
            if "num_images" in judge["reference"]
            else ""
        )
        for name, judge in p["judges"].items()
    )
    return (
        f"{p['num_samples']:,} samples of {p['weights'].upper() if p['weights'] == 'ema' else 'raw'} weights, "
        f"{SAMPLER_NAMES[p['sampler']]} {p['steps']} steps{eta}, {guided}, {p['labels']} labels, seeds from {p['seed']}, "
        f"{p['dtype']}. {judged}."
    )


def fold_command(command: str) -> str:
    """Break a long command into lines that can still be pasted."""
    lines = textwrap.wrap(
        command, 96, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    return " \\\n".join(lines)
