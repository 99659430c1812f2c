"""The material of a page about several runs, and the words in which its sections describe it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import TextWrapper

import numpy as np

from common.stages import StageEntry
from report.records import Alignment, Point, points_under

SAMPLER_NAMES = {
    "ddim": "DDIM", "ddpm": "DDPM", "dpm++": "DPM-Solver++", "euler": "Euler", "heun": "Heun", "unipc": "UniPC",
}  # fmt: skip
WEIGHT_WORDS = {"ema": "EMA", "raw": "raw"}
RESULT_KINDS = ("curve", "metrics")  # kinds of points that the results may come from


@dataclass(frozen=True)
class Pictures:
    """Images `(H, W, 3)` uint8 in rows {label: images} under `columns`; None where an image was not drawn."""

    rows: Mapping[str, Sequence[np.ndarray | None]]
    columns: Sequence[str]
    caption: str


@dataclass(frozen=True)
class RunFacts:
    """The records of one run."""

    folder: Path
    is_base: bool
    settings: Mapping[str, object]  # by dotted key
    commands: Sequence[str]
    log: Sequence[Mapping[str, float]]  # the lines of metrics.jsonl
    points: Sequence[Point]  # the lines of points.jsonl
    alignment: Alignment | None  # contents of align.json; None where `align` was not run
    figures: Sequence[Path]  # beside that file


Runs = Mapping[str, RunFacts]  # by label


@dataclass(frozen=True)
class Material:
    """Everything that the page shows."""

    runs: Runs
    baseline: str | None  # label of the run that the others are compared with
    curve: Mapping | None  # contents of curve.json
    curve_figures: Sequence[Path]
    grids: Mapping[str, np.ndarray]  # samples (N, H, W, 3) uint8 by label
    grid_columns: Sequence[str]
    pictures: Sequence[Pictures]
    films: Mapping[str, Path]  # samples of clips by their titles
    times: Sequence[StageEntry]
    command: str  # which makes the page
    folder: Path  # of its figures
    note: str | None = None  # a paragraph for its top


def points_at(runs: Runs, protocol: Mapping, kinds: Sequence[str] = RESULT_KINDS) -> dict[str, list[Mapping]]:
    """The points of each run under a protocol, by step and only the last of each step; runs without any are left out."""
    found = {name: points_under(run.points, protocol, kinds) for name, run in runs.items()}
    return {name: points for name, points in found.items() if points}


def last_points(runs: Runs, protocol: Mapping, kinds: Sequence[str] = RESULT_KINDS) -> dict[str, Mapping]:
    """The point of each run's last step under a protocol; runs without any are left out."""
    return {name: points[-1] for name, points in points_at(runs, protocol, kinds).items()}


def protocol_words(protocol: Mapping, scale: str | None = None) -> str:
    """Describe in words how images were drawn and measured; `scale`, if given, is written in place of the guidance scale."""
    p = protocol
    guided = "unguided"
    if p["cfg"] > 1:
        low, high = p["guidance_interval"]
        guided = f"guidance {scale or format(p['cfg'], 'g')}"
        if (low, high) != (0, 1):
            guided += f" at noise levels {low:g} to {high:g} ({p['guidance_space']})"
    eta = f", η = {p['eta']:g}" if p["eta"] else ""
    judged = []
    for name, judge in p["judges"].items():
        extractor, reference = judge["extractor"], judge["reference"]
        kind = "frames" if "frames" in reference else "images"
        images = f" ({reference['num_images']:,} real {kind})" if "num_images" in reference else ""
        judged.append(
            f"{name}: {extractor['network']} {extractor['weights_sha256'][:8]}, {extractor['resize']}, "
            f"against {reference['name']}{images}"
        )
    noun = f"clips of {p['frames']} frames at {p['fps']:g} a second," if "frames" in p else "samples"
    if real := p.get("real_clips"):
        network = f", {real['extractor']['network']}" if real["extractor"] else ""
        judged.append(f"video: beside {real['clips']:,} real clips of {real['source']}{network}")
    return (
        f"{p['num_samples']:,} {noun} of {WEIGHT_WORDS[p['weights']]} weights, {SAMPLER_NAMES[p['sampler']]} {p['steps']} "
        f"steps{eta}, {guided}, {p['labels']} labels, seeds from {p['seed']}, {p['dtype']}. {'; '.join(judged)}."
    )


def fold_commands(commands: Iterable[str]) -> str:
    """Commands, one below the other; a long one is broken into lines that can still be pasted."""
    fold = TextWrapper(96, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return "\n".join(" \\\n".join(fold.wrap(command)) for command in commands)
