"""The page's sections of numbers: results, curves, final numbers and guidance."""

from collections.abc import Iterable, Mapping, Sequence

from report.curves import headline, kind_of, lower_is_better, protocols
from report.material import MADE_BY, Material, RunFacts, describe_protocol, fold_command, last_points
from report.page import Block, Command, Figure, Heading, Paragraph, Table
from report.plots import plot_sweep

GUIDANCE = ("cfg", "guidance_interval", "guidance_space")  # the settings that differ within a sweep


def results_section(material: Material) -> list[Block]:
    """The table of the runs' last checkpoints by the shared protocol."""
    blocks: list[Block] = [Heading("Results")]
    if material.curve is None:
        how = f"python evaluate_sd15.py curve {' '.join(material.runs)}"
        return [*blocks, Paragraph(f"No protocol was used for these runs: `{how}` measures them.")]
    last = last_points(material.runs, material.curve["protocol"])
    blocks += [_table(last), Paragraph(_reading_note(last)), _commands(last.values())]
    absent = [name for name in material.runs if name not in last]
    if absent:
        blocks.append(Paragraph(f"Not measured by this protocol: {', '.join(absent)}."))
    return blocks


def _table(points: Mapping[str, Mapping]) -> Table:
    """A table of one point of each run: a row is a metric, a column is a run, and the caption describes the protocol."""
    names = list(dict.fromkeys(name for point in points.values() for name in point["metrics"]))
    rows = [
        [
            f"{name} {'↓' if lower_is_better(name) else '↑'}",
            *(_value(points[run]["metrics"].get(name)) for run in points),
        ]
        for name in names
    ]
    rows.append(["optimiser steps", *(f"{point['step']:,}" for point in points.values())])
    rows.append(["images seen", *(f"{point['images_seen']:,}" for point in points.values())])
    first = next(iter(points.values()))
    notes = dict.fromkeys(
        f"{name}: {note}" for name, found in first["metrics"].items() for note in found["notes"]
    )
    errors = sorted({found["error_kind"] for found in first["metrics"].values() if found["error_kind"]})
    kinds = {
        "bootstrap": "of a bootstrap over images",
        "splits": "over splits (IS)",
        "subsets": "over subsets (KID)",
    }
    spread = f" ± is the deviation {', '.join(kinds[kind] for kind in errors)}." if errors else ""
    more = f" Notes: {'; '.join(notes)}." if notes else ""
    return Table(["metric", *points], rows, describe_protocol(first["protocol"]) + spread + more)


def _value(found: Mapping | None) -> str | float | None:
    if found is None:
        return None
    if found["error"] is None:
        return found["value"]
    return f"{found['value']:.4g} ± {found['error']:.2g}"


def _reading_note(points: Mapping[str, Mapping]) -> str:
    """How to read a table of metrics, and how far apart two halves of the real images are."""
    first = next(iter(points.values()))
    scale = "".join(
        f" For scale: two random halves of the real images are {value:.3g} apart ({name})."
        for name, value in first["distance_of_halves"].items()
        if value is not None
    )
    warning = (
        " `dinov2_…` favours models that were trained towards DINO: it is read beside the others, never alone."
        if "dinov2" in first["protocol"]["judges"]
        else ""
    )
    return (
        "A metric's name says its protocol and the number of images: only equal names, against one reference, compare. "
        f"Distances of fewer images read higher, by about 1 / N.{scale}{warning}"
    )


def _commands(points: Iterable[Mapping]) -> Command:
    return Command("\n".join(dict.fromkeys(fold_command(point["command"]) for point in points)))


def curve_section(material: Material) -> list[Block]:
    """Curves against steps and images seen, and the steps to the baseline's final values."""
    if material.curve is None or not material.curve_figures:
        return []
    metric = material.curve["metric"]
    blocks: list[Block] = [
        Heading("Curves"),
        Figure(
            material.curve_figures[0],
            f"{metric} (lower is better) of the moving average, against optimiser steps and against images seen; bars are "
            "± one bootstrap error. The same seeds and labels for every run and checkpoint, the protocol of the table above.",
        ),
        *(
            Figure(path, "All metrics of the same samples, without the bare base model.")
            for path in material.curve_figures[1:]
        ),
    ]
    reached = material.curve.get("steps_to_baseline")
    if reached:
        runs = [run for run in reached[metric] if run != material.baseline]
        rows = [
            [name, found[material.baseline]["goal"], *(_reached(found[run]) for run in runs)]
            for name, found in reached.items()
        ]
        caption = (
            "Linear between two measured checkpoints; the factor compares with the baseline's own steps to that value. With "
            "few checkpoints, or errors as large as the difference, this is a rough number."
        )
        header = ["metric", f"final value of {material.baseline}", *(f"steps of {run} to it" for run in runs)]
        blocks.append(Table(header, rows, caption))
    return blocks


def _reached(found: Mapping) -> str:
    if found["reached"] is None:
        return "never"
    return f"{found['reached']:,.0f} ({found['factor']:.2f}×)"


def final_section(material: Material) -> list[Block]:
    """Tables of final numbers, a figure for each sweep of guidance scales, and tables of whatever else was measured."""
    runs, blocks = material.runs, []
    for protocol in _protocols_of(runs, ("final",)):
        last = last_points(runs, protocol, ("final",))
        blocks += [_table(last), _commands(last.values())]
    for number, sweep in enumerate(sweeps(runs)):
        x, y = sweep["metrics"]
        file = material.folder / f"sweep_{kind_of(y)}{f'_{number}' if number else ''}.png"
        plot_sweep(
            file, sweep["series"], f"{x} (higher is better)", f"{y} (lower is better)", run_order=list(runs)
        )
        caption = (
            f"{y} against {x} over guidance scales (the numbers at the points). Strong guidance buys {kind_of(x).upper()} with "
            f"diversity: compare curves, not points. {describe_protocol(sweep['protocol'], scale='these scales')}"
        )
        blocks += [Figure(file, caption), _commands(sweep["points"])]
    blocks = [Heading("Final numbers and guidance"), *blocks] if blocks else []
    shown = None if material.curve is None else material.curve["protocol"]
    others = [protocol for protocol in _protocols_of(runs, MADE_BY) if protocol != shown]
    if others:
        blocks.append(Heading("Other measurements"))
    for protocol in others:
        last = last_points(runs, protocol)
        blocks += [_table(last), _commands(last.values())]
    return blocks


def _protocols_of(runs: Mapping[str, RunFacts], kinds: Sequence[str]) -> list[Mapping]:
    return protocols([p for run in runs.values() for p in run.points if p["kind"] in kinds])


def sweeps(runs: Mapping[str, RunFacts]) -> list[dict]:
    """The sweeps of guidance scales of these runs, each run at its last step.

    Points of one sweep have protocols that differ in their guidance alone. A sweep has `protocol` (of one of its points),
    `points`, `metrics` (the Inception Score and the distance that are drawn) and `series` {run: {scales, x, y}}.
    """
    groups: list[dict] = []
    for name, run in runs.items():
        for point in run.points:
            if point["kind"] != "sweep":
                continue
            rest = {key: value for key, value in point["protocol"].items() if key not in GUIDANCE}
            interval = point["protocol"]["guidance_interval"]
            found = next(
                (g for g in groups if g["rest"] == rest and interval in (None, g["interval"] or interval)),
                None,
            )
            if found is None:
                groups.append(found := {"rest": rest, "interval": interval, "runs": {}})
            found["interval"] = found["interval"] or interval
            steps = found["runs"].setdefault(name, {})
            steps.setdefault(point["step"], {})[point["protocol"]["cfg"]] = point
    made = []
    for group in groups:
        last = {name: dict(sorted(steps[max(steps)].items())) for name, steps in group["runs"].items()}
        points = [point for scales in last.values() for point in scales.values()]
        names = list(points[0]["metrics"])
        scores = [name for name in names if kind_of(name) == "is"]
        if not scores:
            continue
        x, y = scores[0], headline(names)
        series = {
            name: {
                "scales": list(scales),
                "x": [point["metrics"][x]["value"] for point in scales.values()],
                "y": [point["metrics"][y]["value"] for point in scales.values()],
            }
            for name, scales in last.items()
        }
        made.append(
            {"protocol": points[-1]["protocol"], "points": points, "metrics": (x, y), "series": series}
        )
    return made
