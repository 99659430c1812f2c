"""The page's sections of numbers: results, curves, final numbers and guidance."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from common.plain_text import code
from report.material import (
    RESULT_KINDS,
    WEIGHT_WORDS,
    Material,
    Runs,
    fold_commands,
    last_points,
    protocol_words,
)
from report.page import Block, Command, Figure, Paragraph, Table
from report.plots import plot_sweep
from report.records import arrow, format_value, headline, kind_of, protocols

GUIDANCE = ("cfg", "guidance_interval", "guidance_space")  # the settings that differ within a sweep
ERRORS = {
    "bootstrap": "of a bootstrap over images",
    "splits": "over splits (IS)",
    "subsets": "over subsets (KID)",
    "clips": "of the mean over clips",
}


def results_section(material: Material) -> Iterator[Block]:
    """The table of the runs' last checkpoints by the shared protocol."""
    if material.curve is None:
        how = code(f"python evaluate.py curve {' '.join(material.runs)}")
        yield Paragraph(f"No protocol was used for these runs: {how} measures them.")
        return
    last = last_points(material.runs, material.curve["protocol"])
    yield _table(last)
    yield Paragraph(_reading_note(next(iter(last.values()))))
    yield _commands(last.values())
    if absent := [name for name in material.runs if name not in last]:
        yield Paragraph(f"Not measured by this protocol: {', '.join(absent)}.")


def _table(points: Mapping[str, Mapping]) -> Table:
    """A table of one point of each run: a row is a metric, a column is a run, and the caption describes the protocol."""
    names = dict.fromkeys(name for point in points.values() for name in point["metrics"])
    rows = []
    for name in names:
        values = [_value(point["metrics"].get(name)) for point in points.values()]
        rows.append([f"{name} {arrow(name)}".rstrip(), *values])
    for title, key in (("optimiser steps", "step"), ("images seen", "images_seen")):
        rows.append([title, *(f"{point[key]:,}" for point in points.values())])
    first = next(iter(points.values()))
    metrics = first["metrics"]
    caption = protocol_words(first["protocol"])
    if kinds := sorted({found["error_kind"] for found in metrics.values() if found["error_kind"]}):
        caption += f" ± is the deviation {', '.join(ERRORS[kind] for kind in kinds)}."
    if notes := dict.fromkeys(f"{name}: {note}" for name in metrics for note in metrics[name]["notes"]):
        caption += f" Notes: {'; '.join(notes)}."
    return Table(["metric", *points], rows, caption)


def _value(found: Mapping | None) -> str | float | None:
    if found is None:
        return None
    bare = found["error"] is None and found.get("real") is None
    return found["value"] if bare else format_value(found)


def _reading_note(point: Mapping) -> str:
    """How to read a table of metrics, and how far apart two halves of the real images are."""
    note = (
        "A metric's name says its protocol and the number of images: only equal names, against one reference, compare. "
        "Distances of fewer images read higher, by about 1 / N."
    )
    for name, value in point["distance_of_halves"].items():
        if value is not None:
            note += f" For scale: two random halves of the real images are {value:.3g} apart ({name})."
    if "dinov2" in point["protocol"]["judges"]:
        note += " `dinov2_…` favours models that were trained towards DINO: it is read beside the others, never alone."
    if "real_clips" in point["protocol"]:
        note += (
            " Metrics of images are of all frames of the clips. Those of `video_…` are of whole clips, beside real ones: "
            "flicker of what stands still and difference in grey levels of 255, motion in pixels a frame. A still picture has "
            "the least flicker and warping error, so both are read with motion."
        )
    return note


def _commands(points: Iterable[Mapping]) -> Command:
    return Command(fold_commands(dict.fromkeys(point["command"] for point in points)))


def curve_section(material: Material) -> Iterator[Block]:
    """Curves against steps and images seen, and the steps to the baseline's final values."""
    if not material.curve_figures:
        return
    curve, baseline = material.curve, material.baseline
    metric = curve["metric"]
    main, *others = material.curve_figures
    weights = WEIGHT_WORDS[curve["protocol"]["weights"]]
    yield Figure(
        main,
        f"{metric} (lower is better) of {weights} weights, against optimiser steps and against images seen; bars are "
        "± one bootstrap error. The same seeds and labels for every run and checkpoint, the protocol of the table above.",
    )
    for path in others:
        yield Figure(path, "All metrics of the same samples, without the bare base model.")
    if reached := curve.get("steps_to_baseline"):
        runs = [run for run in reached[metric] if run != baseline]
        rows = []
        for name, found in reached.items():
            rows.append([name, found[baseline]["goal"], *(_reached(found[run]) for run in runs)])
        yield Table(
            ["metric", f"final value of {baseline}", *(f"steps of {run} to it" for run in runs)],
            rows,
            "Linear between two measured checkpoints; the factor compares with the baseline's own steps to that value. With "
            "few checkpoints, or errors as large as the difference, this is a rough number.",
        )


def _reached(found: Mapping) -> str:
    return "never" if found["reached"] is None else f"{found['reached']:,.0f} ({found['factor']:.2f}×)"


def final_section(material: Material) -> Iterator[Block]:
    """Tables of final numbers, and a figure for each sweep of guidance scales."""
    runs = material.runs
    yield from _tables(runs, _protocols_of(runs, ("final",)), ("final",))
    for number, sweep in enumerate(sweeps(runs)):
        x, y = sweep["metrics"]
        file = material.folder / f"sweep_{kind_of(y)}{f'_{number}' if number else ''}.png"
        axes = f"{x} (higher is better)", f"{y} (lower is better)"
        yield Figure(
            plot_sweep(file, sweep["series"], *axes, run_order=list(runs)),
            f"{y} against {x} over guidance scales (the numbers at the points). Strong guidance buys {kind_of(x).upper()} with "
            f"diversity: compare curves, not points. {protocol_words(sweep['protocol'], scale='these scales')}",
        )
        yield _commands(sweep["points"])


def other_section(material: Material) -> Iterator[Block]:
    """Tables of whatever else was measured."""
    shown = None if material.curve is None else material.curve["protocol"]
    others = [protocol for protocol in _protocols_of(material.runs, RESULT_KINDS) if protocol != shown]
    yield from _tables(material.runs, others, RESULT_KINDS)


def _tables(runs: Runs, found: Sequence[Mapping], kinds: Sequence[str]) -> Iterator[Block]:
    """For each of these protocols the table of the runs' last points, and the commands that made them."""
    for protocol in found:
        last = last_points(runs, protocol, kinds)
        yield _table(last)
        yield _commands(last.values())


def _protocols_of(runs: Runs, kinds: Sequence[str]) -> list[Mapping]:
    return protocols([p for run in runs.values() for p in run.points if p["kind"] in kinds])


def sweeps(runs: Runs) -> Iterator[dict]:
    """The sweeps of guidance scales of these runs, each run at its last step.

    Points of one sweep have protocols that differ in their guidance alone. A sweep has `protocol` (of one of its points),
    `points`, `metrics` (the Inception Score and the distance that are drawn) and `series` {run: {scales, x, y}}.
    """
    groups: list[dict] = []
    for name, run in runs.items():
        for point in (point for point in run.points if point["kind"] == "sweep"):
            protocol = point["protocol"]
            rest = {key: value for key, value in protocol.items() if key not in GUIDANCE}
            interval = protocol["guidance_interval"]  # None where the scale is 1
            fits = (g for g in groups if g["rest"] == rest and interval in (None, g["interval"] or interval))
            if (group := next(fits, None)) is None:
                groups.append(group := {"rest": rest, "interval": None, "runs": {}})
            group["interval"] = group["interval"] or interval
            group["runs"].setdefault(name, {}).setdefault(point["step"], {})[protocol["cfg"]] = point
    for group in groups:
        last = {name: dict(sorted(steps[max(steps)].items())) for name, steps in group["runs"].items()}
        points = [point for scales in last.values() for point in scales.values()]
        names = list(points[0]["metrics"])
        x, y = next((name for name in names if kind_of(name) == "is"), None), headline(names)
        if x is None:
            continue
        series = {}
        for name, scales in last.items():
            both = [[point["metrics"][m]["value"] for point in scales.values()] for m in (x, y)]
            series[name] = {"scales": list(scales), "x": both[0], "y": both[1]}
        yield {"protocol": points[-1]["protocol"], "points": points, "metrics": (x, y), "series": series}
