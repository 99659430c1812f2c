"""Curves of several runs: their points under one protocol, drawn, and the steps to the baseline's final value."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from common.files import write_json
from report.curves import headline, lower_is_better, series_of, speedup
from report.plots import plot_metric_curves, plot_panels
from training.run_folder import RunFolder

FINAL = {"eval.sampling_steps": 250, "eval.cfg": 7.5, "eval.guidance_high": 0.7}  # the plan's
SWEEP = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 7.5)


def draw_curves(
    out: Path, runs: Mapping[str, RunFolder], points: Mapping[str, Sequence[Mapping]], baseline: str | None
) -> dict:
    """Write OUT/curve.png (the Fréchet distance against steps and images seen), curve_all.png (every metric) and curve.json, of
    {label: points of one protocol}; returns what curve.json holds."""
    order = list(runs)
    first = next(iter(points.values()))[0]
    curves = {label: found for label, found in points.items() if not runs[label].is_base_model}
    bare = {label: found[-1] for label, found in points.items() if runs[label].is_base_model}
    metrics = list(first["metrics"])
    series = {
        metric: {label: series_of(found, metric) for label, found in curves.items()} for metric in metrics
    }
    main = headline(metrics)
    result = {"metric": main, "protocol": first["protocol"], "series": series, "baseline": baseline}
    result["levels"] = {
        m: {label: point["metrics"][m]["value"] for label, point in bare.items()} for m in metrics
    }
    if curves:
        levels = result["levels"][main]
        plot_metric_curves(out / "curve.png", series[main], main, levels=levels, run_order=order)
        plot_panels(out / "curve_all.png", series, run_order=[label for label in order if label in curves])
    if baseline in curves:
        result["steps_to_baseline"] = {m: speedup(series[m], baseline) for m in metrics if lower_is_better(m)}
    write_json(out / "curve.json", result)
    return result


def told(result: Mapping) -> str:
    """How soon each run had the baseline's final value, in words."""
    if "steps_to_baseline" not in result:
        return ""
    found = result["steps_to_baseline"][result["metric"]]
    parts = [
        f"{run} never had it"
        if row["reached"] is None
        else f"{run} after {row['reached']:.0f} steps ({row['factor']:.2f}×)"
        for run, row in found.items()
        if run != result["baseline"]
    ]
    goal = found[result["baseline"]]["goal"]
    return f"{result['baseline']}'s final {result['metric']}, {goal:.4g}: {', '.join(parts)}"


def baseline_of(runs: Mapping[str, RunFolder], named: Path | None) -> str | None:
    """The label of the run that the others are compared with: the one named, else the only one without alignment, else none."""
    if named is not None:
        found = [label for label, run in runs.items() if run.path.resolve() == named.resolve()]
        if not found:
            raise UserError(f"--baseline {named} is none of the runs")
        return found[0]
    without = [label for label, run in runs.items() if run.config.align.coeff == 0 and not run.is_base_model]
    return without[0] if len(without) == 1 and len(runs) > 1 else None
