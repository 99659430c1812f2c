"""Curves of a metric over a training: its points (one JSON line each), the steps to reach a value, and the figures."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from common.files import write_json
from common.reading import RECORD, JsonLines
from report.plots import plot_metric_curves, plot_panels

DISTANCES = ("fid", "sfid", "fd", "kid")


@with_config(RECORD)
class Metric(TypedDict):
    """One metric's value, with its standard error and how that was found."""

    value: float
    error: float | None
    error_kind: str | None
    notes: list[str]


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


@with_config(RECORD)
class Point(TypedDict):
    """The metrics of one checkpoint under one protocol: a line of points.jsonl."""

    target: str
    step: int
    images_seen: int
    model: dict[str, Any]
    protocol: Protocol
    metrics: dict[str, Metric]
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
    return re.sub(r"\d+k?$", "", metric.split("_", 1)[1])


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a distance."""
    return kind_of(metric) in DISTANCES


def format_value(found: Mapping) -> str:
    """A metric's value, and its error where it has one."""
    error = "" if found["error"] is None else f" ± {found['error']:.2g}"
    return f"{found['value']:.4g}{error}"


def headline(metrics: Sequence[str]) -> str:
    """Of a point's metrics the Fréchet distance that is named first."""
    return next(name for name in metrics if kind_of(name) in ("fid", "fd"))


def steps_to_reach(steps: Sequence[float], values: Sequence[float], goal: float) -> float | None:
    """The first step at which a metric, lower is better, is at most `goal`: linear between two measured steps.

    None where it never is. Where the first measured value is there already, its step: it may have been earlier.
    """
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if steps.shape != values.shape or steps.ndim != 1 or len(steps) == 0 or (np.diff(steps) <= 0).any():
        raise ValueError(f"steps must rise and be as many as values, got {steps} and {values}")
    there = np.flatnonzero(values <= goal)
    if not len(there):
        return None
    i = int(there[0])
    if i == 0:
        return float(steps[0])
    share = (values[i - 1] - goal) / (values[i - 1] - values[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def series_of(points: Sequence[Mapping], metric: str) -> dict[str, list]:
    """{steps, images, values, errors} of one metric over a run's points, by step; of several of a step the last counts."""
    found = {point["step"]: point for point in points if metric in point["metrics"]}
    rows = [
        (step, point["images_seen"], point["metrics"][metric]["value"], point["metrics"][metric]["error"])
        for step, point in sorted(found.items())
    ]
    columns = zip(*rows, strict=True)
    return dict(zip(("steps", "images", "values", "errors"), map(list, columns), strict=False))


def speedup(series: Mapping[str, Mapping], baseline: str) -> dict[str, dict[str, float | None]]:
    """How soon each run of {run: `series_of`} had the baseline's final value of a metric, lower is better.

    `goal`, that value; `reached`, the steps to it; `factor`, how many times fewer than the baseline's own steps to it these
    are (above 1 = faster). None where it is never reached.
    """
    goal = float(series[baseline]["values"][-1])
    reached = {run: steps_to_reach(found["steps"], found["values"], goal) for run, found in series.items()}
    own = reached[baseline]
    return {
        run: {"goal": goal, "reached": steps, "factor": own / steps if steps else None}
        for run, steps in reached.items()
    }


def draw_curves(
    out: Path,
    points: Mapping[str, Sequence[Mapping]],
    baseline: str | None,
    base_models: Collection[str],
) -> dict:
    """Write OUT/curve.png (the Fréchet distance against steps and images seen), curve_all.png (every metric) and curve.json.

    `points` {label: points of one protocol, by step} are of all runs, also of those without points, so that a run has one
    colour in all figures of a page. The others are compared with `baseline`, if there is one; `base_models` are the labels of
    bare base models, which have a level and no curve. Returns the contents of curve.json.
    """
    measured = {label: found for label, found in points.items() if found}
    curves = {label: found for label, found in measured.items() if label not in base_models}
    last = {label: found[-1]["metrics"] for label, found in measured.items() if label in base_models}
    first = next(iter(measured.values()))[0]
    metrics = list(first["metrics"])
    main = headline(metrics)
    series = {m: {label: series_of(found, m) for label, found in curves.items()} for m in metrics}
    levels = {m: {label: found[m]["value"] for label, found in last.items()} for m in metrics}
    result = {"metric": main, "protocol": first["protocol"], "series": series, "baseline": baseline}
    result["levels"] = levels
    if curves:
        plot_metric_curves(out / "curve.png", series[main], main, levels=levels[main], run_order=list(points))
        plot_panels(out / "curve_all.png", series)
    if baseline in curves:
        result["steps_to_baseline"] = {m: speedup(series[m], baseline) for m in metrics if lower_is_better(m)}
    write_json(out / "curve.json", result)
    return result


def format_speedup(result: Mapping) -> str:
    """A line that says after how many steps each run of curve.json reached the baseline's final value; empty without one."""
    if "steps_to_baseline" not in result:
        return ""
    metric, baseline = result["metric"], result["baseline"]
    found = result["steps_to_baseline"][metric]
    parts = []
    for run, row in found.items():
        if run != baseline and row["reached"] is None:
            parts.append(f"{run} never reached it")
        elif run != baseline:
            parts.append(f"{run} after {row['reached']:.0f} steps ({row['factor']:.2f}×)")
    return f"{baseline}'s final {metric}, {found[baseline]['goal']:.4g}: {', '.join(parts)}"
