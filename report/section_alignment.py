"""The page's section on alignment, from what `align` wrote of each run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from metrics.similarity_rows import nearest_timestep, value_of
from report.material import WEIGHT_WORDS, Material
from report.page import Block, Command, Figure, Paragraph, Table
from report.plot_style import timestep_axis
from report.plots import plot_panels
from report.records import format_grid

# Metric of the main tap's own features, and what the table calls it.
BEFORE_HEAD = {
    "cca": "CCA",
    "cka": "unbiased CKA",
    "cknna": "CKNNA",
    "ridge_cosine": "cosine of a ridge map",
    "ridge_r2": "R² of that map",
    "probe": "linear probe, accuracy",
    "lds": "LDS",
    "cds": "CDS",
    "rmsc": "RMSC",
}
AFTER_HEAD = {"cosine": "head's tokens: cosine", "cknna": "head's tokens: CKNNA"}
ACROSS = ("cca", "cka", "cknna")  # drawn against the timestep for all runs
ALIKE = (
    *("num_images", "images_sha256", "teacher_sha256", "seed"),
    *("timesteps", "tap_grids", "teacher_grid", "prompt"),
)
# None where that model was not measured.
LOSS = {"run": "heldout_loss_diff", "base": "heldout_loss_diff_base"}
PICTURES = {
    "align_timesteps.png": "{name}: the same by timestep and tap; dashed: the bare base model; faint: pairs at random.",
    "align_tsne.png": "{name}: joint embedding of tokens of network and teacher, as they are and with each source centred. "
    "Distances between clusters mean nothing.",
    "align_umap.png": "{name}: the same by UMAP.",
}

Column = tuple[str, Mapping, str]  # label, contents of align.json, and which of its models: run or base


def alignment_section(material: Material) -> Iterator[Block]:
    """Table, conditions and pictures of the runs that were measured, and the command for those that were not."""
    runs = material.runs
    measured = {name: run.alignment for name, run in runs.items() if run.alignment is not None}
    if missing := [name for name, run in runs.items() if run.alignment is None and not run.is_base]:
        yield Paragraph(f"Not measured: {', '.join(missing)} (`python evaluate.py align RUN`).")
    if not measured:
        return
    reference, first = next(iter(measured.items()))
    alike = {name: found for name, found in measured.items() if _conditions(found) == _conditions(first)}
    if differing := [name for name in measured if name not in alike]:
        other = f"Measured under other conditions than {reference}, so not shown"
        yield Paragraph(f"{other}: {', '.join(differing)}.")
    timestep = nearest_timestep(first["timesteps"])
    columns = _columns(alike)
    tap = first["main_tap"]
    grid = format_grid(first["tap_grids"][tap])
    yield _table(columns, first["teacher"][tap], timestep)
    probed = "probe" in first["teacher"][tap]  # captioned images have no classes
    yield Paragraph(
        f"Features of the tap {tap} at timestep {timestep} on {grid} cells, fixed noise, null prompt, "
        f"{first['num_images']} held-out images. What is fitted (CCA, the ridge map to the teacher's tokens"
        f"{', the linear probe for the class' * probed}) is fitted on {first['n_fit']} of them and reported on the other "
        f"{first['n_test']}. In brackets the null: images paired at random; {'for the probe shuffled labels; ' * probed}for "
        "LDS (local less distant similarity) and CDS (its fall with distance) shuffled positions. CCA: "
        f"{first['cca_k']} principal components a side, each position's mean removed. CKNNA: one vector an image, "
        f"{first['cknna_k']} neighbours among "
        f"{first['num_images']}; it depends on both numbers. RMSC is the contrast within an image. A dash: not defined on "
        "so small a grid, or the run has no head. The pictures of tokens below carry numbers of what they show, of the "
        "test half and of mapped tokens."
    )
    yield Command("\n".join(dict.fromkeys(found["command"] for found in alike.values())))
    yield Figure(
        _across(material.folder / "align_runs.png", columns, first["timesteps"]),
        f"The tap {tap} of all runs against the timestep at which it is read.",
    )
    for name in alike:
        for path in runs[name].figures:
            yield Figure(path, PICTURES[path.name].format(name=name))


def _conditions(found: Mapping) -> list[str]:
    return [str(found.get(key)) for key in ALIKE]


def _columns(measured: Mapping[str, Mapping]) -> list[Column]:
    """The runs that were measured, and the bare base model as the first result has it that has it."""
    columns = [(name, found, "run") for name, found in measured.items() if found[LOSS["run"]] is not None]
    base = next((found for found in measured.values() if found[LOSS["base"]] is not None), None)
    return columns if base is None else [*columns, ("bare base model", base, "base")]


def _across(file: Path, columns: Sequence[Column], timesteps: Sequence[int]) -> Path:
    """Draw the main tap's metrics of all columns against the timestep."""
    first = columns[0][1]
    panels = {}
    for metric in ACROSS:
        panel = panels[f"{first['main_tap']} {BEFORE_HEAD[metric]}"] = {}
        for label, found, model in columns:
            values = [value_of(found, metric, model=model, timestep=t) for t in timesteps]
            panel[label] = {"steps": timesteps, "values": values, "errors": [None] * len(values)}
    return plot_panels(file, panels, xlabel=timestep_axis(first["num_timesteps"] - 1))


def _table(columns: Sequence[Column], teacher: Mapping, timestep: int) -> Table:
    """A table with a row for each metric, and a column for each run, for the bare base model, and for the teacher itself."""
    rows = []
    for features, metrics in (("tap", BEFORE_HEAD), ("head", AFTER_HEAD)):
        for metric, title in metrics.items():
            row = {"timestep": timestep, "features": features}
            cells = [_cell(found, metric, model=model, **row) for _, found, model in columns]
            cells.append(teacher[metric]["value"] if features == "tap" and metric in teacher else None)
            if any(cell is not None for cell in cells):
                rows.append([title, *cells])
    losses = [f"{found[LOSS[model]]:.4f}" for _, found, model in columns]
    rows.append(["held-out diffusion loss ↓", *losses, None])
    steps = [f"{found['step']:,}" if model == "run" else "0" for _, found, model in columns]
    kinds = [WEIGHT_WORDS[found["weights"]] if model == "run" else "base" for _, found, model in columns]
    rows += [["optimiser steps", *steps, None], ["weights", *kinds, None]]
    header = [columns[0][1]["main_tap"], *(label for label, _, _ in columns), "teacher"]
    shown = [i for i in range(len(header)) if any(row[i] is not None for row in rows)]
    return Table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _cell(found: Mapping, metric: str, **row) -> str | None:
    value, null = (value_of(found, metric, which, **row) for which in ("value", "null"))
    if value is None:
        return None
    return f"{value:.3f}" if null is None else f"{value:.3f} ({null:.3f})"


def alignment_figures(folder: Path) -> list[Path]:
    """The pictures that `align` left in a folder."""
    return [folder / name for name in PICTURES if (folder / name).exists()]
