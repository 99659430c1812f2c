"""The page that compares runs: figures and text made from what the runs recorded, nothing computed anew."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError
from evaluation.alignment_rows import nearest_timestep, value_of
from evaluation.page import Block, Command, Figure, Heading, Paragraph, Table, write_page
from evaluation.plots import plot_bars, plot_curves, plot_sample_grids
from files import write_json

IRRELEVANT = (
    "run",
    "eval.",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "data.workers",
)


@dataclass(frozen=True)
class RunFacts:
    """What one run recorded: the settings that decide its result, its command, its metrics by step, the results
    of `fid` (one or more checkpoints) and of `align`, the t-SNE picture, and its first samples `(N, H, W, 3)` uint8."""

    settings: Mapping[str, object]
    command: str
    metrics: Sequence[Mapping[str, float]]
    distances: Sequence[Mapping]
    alignment: Mapping
    tsne: Path
    samples: np.ndarray

    @property
    def final(self) -> Mapping:
        """The distance at the last evaluated step."""
        return max(self.distances, key=lambda result: result["step"])


def comparable(results: Mapping[str, Sequence[Mapping]]) -> dict[str, list[Mapping]]:
    """Of each run's results of `fid`, those under one and the same protocol: two are never mixed in a figure.

    Results agree when all of their `conditions` do, that is everything but the step. Of several protocols that all runs share,
    the one with most checkpoints evaluated is taken, then the one with most samples. Raises `UserError` when there is none.
    """
    by_conditions: dict[str, dict[str, list[Mapping]]] = {}
    for name, found in results.items():
        for result in found:
            key = json.dumps(result["conditions"], sort_keys=True)
            by_conditions.setdefault(key, {}).setdefault(name, []).append(result)
    shared = [runs for runs in by_conditions.values() if len(runs) == len(results)]
    if not shared:
        raise UserError(
            "no protocol was used for all of these runs: run `evaluate_sd15.py fid` on each with the same options"
        )
    return max(
        shared, key=lambda runs: (sum(map(len, runs.values())), next(iter(runs.values()))[0]["num_samples"])
    )


def write_report(
    out: Path,
    runs: Mapping[str, RunFacts],
    *,
    class_names: Mapping[int, str],
    times: Sequence[Mapping],
    command: str,
) -> Path:
    """Write `out/index.html`, its figures, and `out/compare.json` with the numbers of its table; returns the page's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table = result_table(runs)
    write_json(out / "compare.json", table)
    sections = [
        *_results(out, runs, table),
        *_samples(out, runs, class_names),
        *_training(out, runs),
        *_alignment(runs),
        *_reading(runs, table),
        *_making(runs, times, command),
    ]
    first = next(iter(runs.values()))
    said = [f"`{name}` (λ = {run.settings['align.coeff']:g})" for name, run in runs.items()]
    lead = (
        f"{' and '.join(said)}, measured on these very runs: {first.final['num_samples']} samples of each, "
        f"{first.final['conditions']['num_real']} real images to compare them with, "
        f"{first.alignment['num_images']} held-out images."
    )
    return write_page(out / "index.html", title=f"U-REPA: {', '.join(runs)}", lead=lead, sections=sections)


def result_table(runs: Mapping[str, RunFacts]) -> dict[str, dict[str, float | None]]:
    """{quantity: {run: value}}, the numbers that the page's first table shows."""
    metric = next(iter(runs.values())).final["conditions"]["metric"]
    rows = {
        f"{metric} (Fréchet distance, lower is better)": lambda run: run.final["value"],
        "class accuracy of samples (higher is better)": lambda run: run.final["class_accuracy"],
        "held-out diffusion loss (lower is better)": lambda run: run.alignment["heldout_loss_diff"],
        "mid-block CCA with the teacher": lambda run: _at_mid(run, "cca"),
        "CCA with images paired at random": lambda run: _at_mid(run, "cca", "null"),
        "mid-block CKNNA with the teacher": lambda run: _at_mid(run, "cknna"),
        "CKNNA with images paired at random": lambda run: _at_mid(run, "cknna", "null"),
        "cosine of the head's tokens with the teacher's": lambda run: _at_mid(run, "cosine", features="head"),
    }
    return {quantity: {name: value(run) for name, run in runs.items()} for quantity, value in rows.items()}


def _at_mid(run: RunFacts, metric: str, which: str = "value", *, features: str = "tap") -> float | None:
    """A number of `align` of the run's mid-block, at the one timestep that the page shows."""
    timestep = nearest_timestep(run.alignment["timesteps"])
    return value_of(run.alignment, metric, which, timestep=timestep, features=features)


def _results(out: Path, runs, table) -> list[Block]:
    shown = dict(list(table.items())[:3])
    plot_bars(out / "results.png", shown, run_order=list(runs))
    rows = [[quantity, *(values[name] for name in runs)] for quantity, values in table.items()]
    final = next(iter(runs.values())).final
    halves, real = final["value_of_real_halves"], final["conditions"]["num_real"]
    return [
        Heading("Results"),
        Figure(out / "results.png", "The figures that matter first."),
        Table(["quantity", *runs], rows, "A dash: the run has no head, so there is nothing to measure."),
        Paragraph(
            f"For scale: two random halves of the {real} real images are {halves:.2f} apart. Fewer images read higher, so "
            "distances compare with each other only in the features of one extractor, at one number of images. CCA, CKNNA "
            "and cosine rise with the likeness of the two sides, up to 1."
        ),
    ]


def _samples(out: Path, runs, class_names) -> list[Block]:
    columns = min(len(class_names), 10)
    count = min(6 * columns, *(len(run.samples) // columns * columns for run in runs.values()))
    grids = {name: run.samples[:count] for name, run in runs.items()}
    plot_sample_grids(out / "samples.png", grids, columns, [class_names[i] for i in range(columns)])
    p = next(iter(runs.values())).final["conditions"]
    only = (
        ""
        if p["guidance_high"] == 1
        else f" up to noise level {p['guidance_high']:g} ({p['guidance_space']})"
    )
    weights = "EMA" if p["weights"] == "ema" else "raw"
    return [
        Heading("Samples"),
        Figure(
            out / "samples.png",
            f"The first {count} samples of each run, not chosen: the same noise and the same class at the same place. "
            f"{weights} weights, {p['sampling_steps']} DDIM steps, guidance {p['cfg']:g}{only}.",
        ),
    ]


def _training(out: Path, runs) -> list[Block]:
    order, blocks = list(runs), [Heading("Training")]
    for key, title, ylabel in (
        ("loss_diff", "Diffusion loss", "diffusion loss"),
        ("loss_token", "Token loss", "1 − cosine to the teacher"),
        ("loss_manifold", "Manifold loss", "Gram difference"),
    ):
        series = {
            name: ([line["step"] for line in run.metrics], [line[key] for line in run.metrics])
            for name, run in runs.items()
            if key == "loss_diff" or any(line["coeff"] > 0 for line in run.metrics)
        }
        if series:
            file = out / f"{key}.png"
            plot_curves(file, series, "step", ylabel, title, log_y=True, smooth=9, run_order=order)
            note = "" if len(series) == len(runs) else " Runs with λ = 0 compute none."
            blocks.append(
                Figure(
                    file,
                    f"{title} on the training data: means between two logged steps, and their running mean.{note}",
                )
            )
    curves = {
        name: tuple(zip(*sorted((r["step"], r["value"]) for r in run.distances), strict=True))
        for name, run in runs.items()
    }
    if any(len(steps) > 1 for steps, _ in curves.values()):
        metric = next(iter(runs.values())).final["conditions"]["metric"]
        plot_curves(
            out / "distance.png",
            curves,
            "step",
            f"{metric} (lower is better)",
            "Fréchet distance of samples",
            run_order=order,
        )
        blocks.append(Figure(out / "distance.png", "The same seeds and labels at every checkpoint."))
    return blocks


def _alignment(runs) -> list[Block]:
    first = next(iter(runs.values())).alignment
    h, w = first["tap_grids"]["mid"]
    return [
        Heading("Alignment on held-out images"),
        Paragraph(
            f"Read at timestep {nearest_timestep(first['timesteps'])} with fixed noise, EMA weights and the null prompt, on "
            f"the mid-block's own {h} × {w} grid. CCA: {first['cca_k']} principal components a side, the layout that all "
            f"images share removed, fitted on {first['n_fit']} images and reported on the other {first['n_test']}. CKNNA: one "
            f"vector an image, {first['cknna_k']} neighbours among {first['num_images']}."
        ),
        Paragraph(
            "The ridge map is linear, from the mid-block's features to the teacher's tokens, fitted on half of the images and "
            "shown on the other half: what the features hold, whether or not a run has a head that reads it."
        ),
        *(
            Figure(
                run.tsne,
                f"{name}: joint t-SNE of projected tokens and the teacher's. Distances between clusters mean nothing.",
            )
            for name, run in runs.items()
        ),
    ]


def _reading(runs, table) -> list[Block]:
    """What the figures show and what they do not, said by the figures themselves."""
    distance = next(iter(table.values()))
    best = min(distance, key=distance.get)
    ranked = ", ".join(
        f"`{name}` {value:.2f}" for name, value in sorted(distance.items(), key=lambda item: item[1])
    )
    shows = f"Fréchet distances in order: {ranked}. "
    if len(distance) == 2:
        (other,) = set(distance) - {best}
        shows += f"`{best}` is {1 - distance[best] / distance[other]:.0%} below `{other}` on this one seed. "
    loss = table["held-out diffusion loss (lower is better)"]
    lowest = min(loss, key=loss.get)
    shows += f"The lowest held-out diffusion loss is `{lowest}`'s" + (
        ", which is the same run."
        if lowest == best
        else ": loss and sample quality disagree here, so both are reported."
    )
    return [
        Heading("What this shows, and what it does not"),
        Paragraph(shows),
        Paragraph(
            "It does not show that the difference would survive another seed: that takes several runs and their spread. The "
            "extractor is a classifier trained on these classes, so the distance says how much samples look like their classes "
            "to it, and little about anything it never learned. A distance of few samples is biased upwards, equally for all "
            "runs. The head's cosine mainly says that its own loss was minimised; CCA and CKNNA look at the features before it."
        ),
    ]


def _making(runs, times, command) -> list[Block]:
    """Settings that differ, commands, and how long each stage took."""
    keys = sorted({key for run in runs.values() for key in run.settings})
    values = {key: [str(run.settings.get(key)) for run in runs.values()] for key in keys}
    differing = [[key, *shown] for key, shown in values.items() if len(set(shown)) > 1]
    blocks = [Heading("How this was made")]
    if differing:
        blocks.append(Table(["setting", *runs], differing, "All settings in which the runs differ."))
    if times:
        rows = [[stage["stage"], f"{stage['seconds']:.1f} s"] for stage in times]
        groups = {stage["group"] for stage in times}
        total = sum(max(stage["seconds"] for stage in times if stage["group"] == group) for group in groups)
        caption = f"{total:.0f} s in all; of stages that ran side by side only the longest counts."
        blocks.append(Table(["stage", "time"], rows, caption))
    commands = [stage["command"] for stage in times] or [run.command for run in runs.values()]
    blocks.append(Command("\n".join(_folded(line) for line in [*commands, command])))
    return blocks


def _folded(command: str) -> str:
    """A long command over several lines that can be pasted as they are."""
    lines = textwrap.wrap(
        command, 96, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    return " \\\n".join(lines)
