"""Curves of a metric over a training: the steps to reach a value, and the figures."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.files import write_json
from report.plots import plot_metric_curves, plot_panels
from report.records import headline, lower_is_better


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
    out: Path, points: Mapping[str, Sequence[Mapping]], baseline: str | None, base_models: Collection[str]
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
    series = {
        m: {run: found for run, points in curves.items() if (found := series_of(points, m))} for m in metrics
    }
    levels = {m: {label: found[m]["value"] for label, found in last.items() if m in found} for m in metrics}
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
    found = dict(result["steps_to_baseline"][metric])
    goal, parts = found.pop(baseline)["goal"], []
    for run, row in found.items():
        steps, factor = row["reached"], row["factor"]
        said = "never reached it" if steps is None else f"after {steps:.0f} steps ({factor:.2f}×)"
        parts.append(f"{run} {said}")
    return f"{baseline}'s final {metric}, {goal:.4g}: {', '.join(parts)}"
