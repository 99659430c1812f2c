"""Assemble the page about several runs from what was recorded of them, its sections about the runs themselves included.

Nothing is measured anew.
"""

from collections.abc import Iterator
from pathlib import Path

from common.plain_text import code
from common.stages import wall_seconds
from report.material import Material, fold_commands, last_points
from report.page import Block, Command, Figure, Films, Heading, Paragraph, Table, write_page
from report.plot_grids import plot_rows, plot_sample_grids
from report.plots import plot_curves
from report.section_alignment import alignment_section
from report.section_metrics import curve_section, final_section, other_section, results_section

LOSSES = {  # of metrics.jsonl: what a figure of it is called, and its axis
    "loss_diff": ("Diffusion loss", "diffusion loss"),
    "loss_token": ("Token loss", "1 − cosine to the teacher"),
    "loss_manifold": ("Manifold loss", "Gram difference"),
}


def write_report(page: Path, material: Material) -> Path:
    """Write the page; its figures go to `material.folder`. Returns the page's file path."""
    material.folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, run in material.runs.items():
        kind = "bare base model" if run.is_base else f"λ = {run.settings['align.coeff']:g}"
        names.append(f"{code(name)} ({kind})")
    lead = (
        f"{', '.join(names)}: what was measured on these very runs. Every number stands with its protocol; those of different "
        "protocols do not compare."
    )
    found = {Heading(heading): list(section(material)) for heading, section in SECTIONS.items()}
    blocks = [block for heading, section in found.items() if section for block in (heading, *section)]
    if material.note is not None:
        blocks.insert(0, Paragraph(material.note))
    title = f"Representation alignment: {', '.join(material.runs)}"
    return write_page(page, title=title, lead=lead, sections=blocks)


def samples_section(material: Material) -> Iterator[Block]:
    """Grids of the first samples of each run, its clips as films, and rows of pictures."""
    if material.grids:
        yield Figure(
            plot_sample_grids(material.folder / "samples.png", material.grids, material.grid_columns),
            f"The first {len(next(iter(material.grids.values())))} samples of each run by the protocol of the results, not "
            "chosen: the same noise and class at the same place.",
        )
    if material.films:
        yield Films(
            material.films,
            "Clips of each run by the protocol of the results, not chosen: the same noise for every run. Metrics are of the "
            "lossless clips; these are compressed, and reduced to 256 px where they were larger.",
        )
    for number, pictures in enumerate(material.pictures):
        file = material.folder / f"pictures_{number}.png"
        yield Figure(plot_rows(file, pictures.rows, pictures.columns), pictures.caption)


def training_section(material: Material) -> Iterator[Block]:
    """The losses of each run on the training data."""
    runs = {name: run for name, run in material.runs.items() if run.log}
    for key, (title, ylabel) in LOSSES.items():
        series = {}
        for name, run in runs.items():
            lines = [line for line in run.log if key in line]
            # A term that is left out is 0 throughout.
            if lines and (key == "loss_diff" or any(line["coeff"] > 0 and line[key] for line in lines)):
                series[name] = [line["step"] for line in lines], [line[key] for line in lines]
        if series:
            note = "" if len(series) == len(runs) else " Runs with λ = 0 compute none."
            yield Figure(
                plot_curves(material.folder / f"{key}.png", series, ylabel, title, list(material.runs)),
                f"{title} on the training data: means between two logged steps, and their running mean.{note}",
            )


def findings_section(material: Material) -> Iterator[Block]:
    """What the numbers show and what they do not, in sentences made of the numbers."""
    runs = {name: run for name, run in material.runs.items() if not run.is_base}
    shows = []
    if material.curve is not None:
        metric, points = material.curve["metric"], last_points(runs, material.curve["protocol"])
        last = {name: point["metrics"][metric] for name, point in points.items()}
        trained = sorted((found["value"], name) for name, found in last.items())
        ranked = ", ".join(f"{code(name)} {value:.3g}" for value, name in trained)
        shows.append(f"{metric} in order: {ranked}.")
        if len(trained) == 2:
            (low, best), (high, other) = trained
            spread = sum((found["error"] or 0.0) ** 2 for found in (last[best], last[other])) ** 0.5
            times = f", {(high - low) / spread:.1f} times the error of their difference" if spread else ""
            shows.append(
                f"{code(best)} is {1 - low / high:.0%} below {code(other)}{times}, on this one seed of training. Both were "
                "sampled from the same noise, which makes the true error smaller."
            )
    losses = {name: run.alignment["heldout_loss_diff"] for name, run in runs.items() if run.alignment}
    if losses := {name: loss for name, loss in losses.items() if loss is not None}:
        lowest = min(losses, key=losses.get)
        shows.append(f"The lowest held-out diffusion loss is {code(lowest)}'s, {losses[lowest]:.4f}.")
    yield Paragraph(" ".join(shows))
    yield Paragraph(
        "It does not show that a difference would survive another seed of training: the errors here are of sampling alone, "
        "and two trainings differ by more. That takes several runs of each and their spread. The head's cosine mainly says "
        "that its own loss was minimised; CCA, CKA and CKNNA look at the features before it."
    )


def making_section(material: Material) -> Iterator[Block]:
    """Settings that differ, commands, and how long each stage took."""
    runs = {name: run for name, run in material.runs.items() if not run.is_base}
    keys = sorted({key for run in runs.values() for key in run.settings})
    rows = [[key, *(str(run.settings.get(key)) for run in runs.values())] for key in keys]
    if differing := [row for row in rows if len(set(row[1:])) > 1]:
        yield Table(["setting", *runs], differing, "All settings in which the runs differ.")
    times = material.times
    commands = [stage["command"] for stage in times] or [c for run in runs.values() for c in run.commands]
    if times:
        rows = [[stage["stage"], f"{stage['seconds']:.1f} s"] for stage in times]
        all_in_all = f"{wall_seconds(times):.0f} s in all"
        caption = f"{all_in_all}; of stages that ran side by side only the longest counts."
        yield Table(["stage", "time"], rows, caption)
    yield Command(fold_commands([*commands, material.command]))


SECTIONS = {
    "Results": results_section,
    "Curves": curve_section,
    "Final numbers and guidance": final_section,
    "Other measurements": other_section,
    "Samples": samples_section,
    "Alignment on held-out images": alignment_section,
    "Training": training_section,
    "What this shows, and what it does not": findings_section,
    "How this was made": making_section,
}
