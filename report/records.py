"""The records that an evaluation leaves and the page reads: points.jsonl (one JSON line a point), and align.json."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from common.reading import JsonLines, JsonRecord, read_record

HEADLINES = ("fid", "fd")
DISTANCES = ("fid", "sfid", "fd", "kid")
ARROWS = dict.fromkeys((*DISTANCES, "flicker", "warping_error"), "↓") | {"motion": "", "difference": ""}


class Metric(JsonRecord):
    """One metric's value, with its standard error and how that was found."""

    value: float
    error: float | None
    error_kind: str | None
    notes: list[str]
    real: NotRequired[float | None]  # of clips: the same of real ones


@with_config(ConfigDict(strict=True, extra="allow"))
class Protocol(TypedDict):
    """The settings that two points must share to be compared: these, which the page tells, and others."""

    sampler: str
    steps: int
    eta: float | None
    cfg: float
    guidance_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    guidance_space: str | None
    dtype: str
    labels: str
    classes: int
    seed: int
    weights: str
    num_samples: int
    judges: dict[str, dict[str, dict[str, Any]]]


def _has_a_distance(metrics: dict[str, Metric]) -> dict[str, Metric]:
    if not any(kind_of(name) in HEADLINES for name in metrics):
        raise ValueError("it has no Fréchet distance")
    return metrics


class Point(JsonRecord):
    """The metrics of one checkpoint under one protocol: a line of points.jsonl."""

    target: str
    step: int
    images_seen: int
    model: dict[str, Any]
    protocol: Protocol
    metrics: Annotated[dict[str, Metric], AfterValidator(_has_a_distance)]
    distance_of_halves: dict[str, float | None]
    samples: str
    command: str
    date: str
    seconds: dict[str, float]
    kind: str


def points_file(file: Path) -> JsonLines[Point]:
    """A run's points.jsonl, which several commands may write at once."""
    return JsonLines(file, Point, allow_nan=False)


def points_under(points: Sequence[Mapping], protocol: Mapping, kinds: Sequence[str]) -> list[Mapping]:
    """Those of a run's points that were made for these purposes under a protocol, by step; the last of each step."""
    found = {p["step"]: p for p in points if p["protocol"] == protocol and p["kind"] in kinds}
    return [found[step] for step in sorted(found)]


def protocols(points: Sequence[Mapping]) -> list[Mapping]:
    """The protocols of points, each once, in the order in which they appear."""
    found = [point["protocol"] for point in points]
    return [protocol for i, protocol in enumerate(found) if protocol not in found[:i]]


def kind_of(metric: str) -> str:
    """What a metric's name measures: "fid" of adm_fid10k."""
    return re.sub(r"\d+k?$", "", metric.partition("_")[2])


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a distance."""
    return kind_of(metric) in DISTANCES


def arrow(metric: str) -> str:
    """Where better values of a metric lie: "↓", "↑", or "" of what describes a clip and is best near that of real ones."""
    return ARROWS.get(kind_of(metric), "↑")


def format_value(found: Mapping) -> str:
    """A metric's value, its error where it has one, and the value of real clips."""
    error = "" if found["error"] is None else f" ± {found['error']:.2g}"
    real = "" if found.get("real") is None else f" (real {found['real']:.4g})"
    return f"{found['value']:.4g}{error}{real}"


def format_grid(grid: Sequence[int]) -> str:
    """A grid of cells in words: "4 × 4", of a clip "5 frames of 4 × 4"."""
    *frames, height, width = grid
    return "".join(f"{count} frames of " for count in frames) + f"{height} × {width}"


def headline(metrics: Sequence[str]) -> str:
    """Of a point's metrics the Fréchet distance that is named first."""
    return next(name for name in metrics if kind_of(name) in HEADLINES)


def _only_a_reason_is_text(metrics: dict[str, dict]) -> dict[str, dict]:
    """`reason` says why a metric has no value, such as features that have collapsed."""
    for name, found in metrics.items():
        if text := [key for key, value in found.items() if isinstance(value, str) and key != "reason"]:
            raise ValueError(f"{name}.{text[0]} is no number")
    return metrics


class AlignmentRow(JsonRecord):
    """The metrics {name: {value, null, …}} of one model's features at one tap and timestep, before or after the head."""

    model: str
    tap: str
    timestep: int
    features: str
    metrics: Annotated[dict[str, dict[str, float | int | str | None]], AfterValidator(_only_a_reason_is_text)]


class Alignment(JsonRecord):
    """align.json, which `measure_alignment` makes."""

    step: int
    command: str
    num_images: int
    num_available: int
    images_sha256: str
    teacher_sha256: str
    n_fit: int
    n_test: int
    seed: int
    noise: str
    timesteps: list[int]
    num_timesteps: int  # of the noise schedule
    taps: list[str]
    main_tap: str
    tap_grids: dict[str, list[int]]
    teacher_grid: list[int]
    prompt: str
    weights: str
    cca_k: int
    cknna_k: int
    spatial_distances: dict[str, dict[str, int | float | None]]
    heldout_loss_diff: float | None
    heldout_loss_diff_base: float | None
    rows: list[AlignmentRow]
    teacher: dict[str, dict[str, dict[str, float | int | None]]]  # its own metrics at each tap's grid


def read_alignment(folder: Path) -> Alignment:
    """What `align` left in RUN/eval; raises `UserError` where it is damaged."""
    return read_record(folder / "align.json", Alignment, f"run `align {folder.parent}` again")
