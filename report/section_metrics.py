"""What a page about several runs is made of, and its sections of numbers: results, curves, final numbers and guidance."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from report.curves import headline, kind_of, lower_is_better, points_under, protocols
from report.page import Block, Command, Figure, Heading, Paragraph, Table
from report.plots import plot_sweep

SAMPLER_NAMES = {"ddim": "DDIM", "ddpm": "DDPM", "dpm++": "DPM-Solver++"}
GUIDANCE = ("cfg", "guidance_interval", "guidance_space")  # what differs within a sweep
MADE_BY = ("curve", "metrics")  # kinds of points that the results may come from


@dataclass(frozen=True)
class Pictures:
    """Images `(H, W, 3)` uint8 that were drawn before: {row: images} under `columns`; None where there is none."""

    rows: Mapping[str, Sequence[np.ndarray | None]]
    columns: Sequence[str]
    caption: str


@dataclass(frozen=True)
class RunFacts:
    """What one run recorded. `points` are the lines of its points.jsonl, `log` those of its metrics.jsonl, `alignment` its
    align.json (None where `align` was not run) and `figures` the pictures beside that."""

    is_base: bool
    settings: Mapping[str, object]
    commands: Sequence[str]
    log: Sequence[Mapping[str, float]]
    points: Sequence[Mapping]
    alignment: Mapping | None = None
    figures: Sequence[Path] = ()


@dataclass(frozen=True)
class Material:
    """All that the page shows: the runs by label, the one that others are compared with, `curve.json`'s content and figures,
    grids of samples, rows of pictures, stages with their times, and the command that makes the page."""

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


def results_section(material: Material) -> list[Block]:
    blocks: list[Block] = [Heading("Results")]
    if material.curve is None:
        how = f"python evaluate_sd15.py curve {' '.join(material.runs)}"
        return [*blocks, Paragraph(f"No protocol was used for these runs: `{how}` measures them.")]
    last = {name: points[-1] for name, points in points_at(material.runs, material.curve["protocol"]).items()}
    blocks += [_table(last, material.runs), Paragraph(_scale(last)), _commands(last.values())]
    absent = [name for name in material.runs if name not in last]
    if absent:
        blocks.append(Paragraph(f"Not measured by this protocol: {', '.join(absent)}."))
    return blocks


def points_at(
    runs: Mapping[str, RunFacts], protocol: Mapping, kinds: Sequence[str] = MADE_BY
) -> dict[str, list[Mapping]]:
    """The points of each run under a protocol by step, the last one of each step; runs without any are left out."""
    found = {name: points_under(run.points, protocol, kinds) for name, run in runs.items()}
    return {name: points for name, points in found.items() if points}


def _table(points: Mapping[str, Mapping], runs: Mapping[str, RunFacts]) -> Table:
    """One row a metric, one column a run, the protocol below."""
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
    said = f" ± is the deviation {', '.join(kinds[kind] for kind in errors)}." if errors else ""
    more = f" Notes: {'; '.join(notes)}." if notes else ""
    return Table(["metric", *points], rows, sentence(first["protocol"]) + said + more)


def _value(found: Mapping | None) -> str | float | None:
    if found is None:
        return None
    if found["error"] is None:
        return found["value"]
    return f"{found['value']:.4g} ± {found['error']:.2g}"


def _scale(points: Mapping[str, Mapping]) -> str:
    """What a reader must know before reading a table of metrics."""
    first = next(iter(points.values()))
    said = "".join(
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
        f"Distances of fewer images read higher, by about 1 / N.{said}{warning}"
    )


def _commands(points) -> Command:
    return Command("\n".join(dict.fromkeys(folded(point["command"]) for point in points)))


def curve_section(material: Material) -> list[Block]:
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
        last = {name: points[-1] for name, points in points_at(runs, protocol, ("final",)).items()}
        blocks += [_table(last, runs), _commands(last.values())]
    for number, sweep in enumerate(sweeps(runs)):
        x, y = sweep["metrics"]
        file = material.folder / f"sweep_{kind_of(y)}{f'_{number}' if number else ''}.png"
        plot_sweep(
            file, sweep["series"], f"{x} (higher is better)", f"{y} (lower is better)", run_order=list(runs)
        )
        said = (
            f"{y} against {x} over guidance scales (the numbers at the points). Strong guidance buys {kind_of(x).upper()} with "
            f"diversity: compare curves, not points. {sentence(sweep['protocol'], scale='these scales')}"
        )
        blocks += [Figure(file, said), _commands(sweep["points"])]
    blocks = [Heading("Final numbers and guidance"), *blocks] if blocks else []
    shown = None if material.curve is None else material.curve["protocol"]
    others = [protocol for protocol in _protocols_of(runs, MADE_BY) if protocol != shown]
    if others:
        blocks.append(Heading("Other measurements"))
    for protocol in others:
        last = {name: points[-1] for name, points in points_at(runs, protocol).items()}
        blocks += [_table(last, runs), _commands(last.values())]
    return blocks


def _protocols_of(runs: Mapping[str, RunFacts], kinds: Sequence[str]) -> list[Mapping]:
    return protocols([p for run in runs.values() for p in run.points if p["kind"] in kinds])


def sweeps(runs: Mapping[str, RunFacts]) -> list[dict]:
    """The sweeps of these runs, one for each protocol but for its guidance: `protocol` (of one point), `points`, `metrics`
    (the IS and the distance that are drawn) and `series` {run: {scales, x, y}}, at each run's last step."""
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


def sentence(protocol: Mapping, scale: str | None = None) -> str:
    """How images were made and measured, in words; `scale` stands for the guidance scale."""
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


def folded(command: str) -> str:
    """A long command over several lines that can be pasted as they are."""
    lines = textwrap.wrap(
        command, 96, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    return " \\\n".join(lines)
