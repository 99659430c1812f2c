"""The page's section on alignment, from what `align` wrote of each run."""

from collections.abc import Mapping
from pathlib import Path

from metrics.similarity_rows import nearest_timestep, value_of
from report.material import Material
from report.page import Block, Command, Figure, Heading, Paragraph, Table
from report.plots import plot_panels

# Metric of the mid-block's own features, and what the table calls it.
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
ACROSS = {"cca": "CCA", "cka": "unbiased CKA", "cknna": "CKNNA"}  # drawn against the timestep for all runs
ALIKE = (
    "num_images",
    "images_sha256",
    "teacher_sha256",
    "seed",
    "timesteps",
    "tap_grids",
    "teacher_grid",
    "prompt",
)
BASE = "bare base model"
PICTURES = {
    "align_timesteps.png": "{name}: the same by timestep and tap; dashed: the bare base model; faint: pairs at random.",
    "align_tsne.png": "{name}: joint embedding of U-Net and teacher tokens, as they are and with each source centred. "
    "Distances between clusters mean nothing.",
    "align_umap.png": "{name}: the same by UMAP.",
}


def alignment_section(material: Material) -> list[Block]:
    """Table, conditions and pictures of the runs that were measured, and the command for those that were not."""
    runs = material.runs
    measured = {name: run.alignment for name, run in runs.items() if run.alignment is not None}
    blocks: list[Block] = [Heading("Alignment on held-out images")]
    missing = [name for name, run in runs.items() if run.alignment is None and not run.is_base]
    if missing:
        blocks.append(Paragraph(f"Not measured: {', '.join(missing)} (`python evaluate_sd15.py align RUN`)."))
    if not measured:
        return blocks
    first = next(iter(measured.values()))
    differing = [name for name, found in measured.items() if _conditions(found) != _conditions(first)]
    if differing:
        note = f"Measured under other conditions than {next(iter(measured))}, so not shown: {', '.join(differing)}."
        blocks.append(Paragraph(note))
    alike = {name: found for name, found in measured.items() if name not in differing}
    timestep = nearest_timestep(first["timesteps"])
    h, w = first["tap_grids"]["mid"]
    blocks += [
        _table(alike, timestep),
        Paragraph(
            f"Mid-block at timestep {timestep} on its own {h} × {w} grid, fixed noise, null prompt, "
            f"{first['num_images']} held-out images. What is fitted (CCA, the ridge map to the teacher's tokens, the linear "
            f"probe for the class) is fitted on {first['n_fit']} of them and reported on the other {first['n_test']}. In "
            "brackets the null: images paired at random; for the probe shuffled labels; for LDS (local less distant "
            f"similarity) and CDS (its fall with distance) shuffled positions. CCA: {first['cca_k']} principal components a "
            f"side, each position's mean removed. CKNNA: one vector an image, {first['cknna_k']} neighbours among "
            f"{first['num_images']}; it depends on both numbers. RMSC is the contrast within an image. A dash: not defined on "
            "so small a grid, or the run has no head. The pictures of tokens below carry numbers of what they show, of the "
            "test half and of mapped tokens."
        ),
        Command("\n".join(dict.fromkeys(found["command"] for found in alike.values()))),
        _across(alike, material.folder),
    ]
    for name, run in runs.items():
        if name not in alike:
            continue
        blocks += [
            Figure(path, PICTURES[path.name].format(name=name))
            for path in run.figures
            if path.name in PICTURES
        ]
    return blocks


def _across(measured: Mapping[str, Mapping], folder: Path) -> Figure:
    """Figure of the mid-block's metrics of all runs and of the bare base model, against the timestep."""
    timesteps = next(iter(measured.values()))["timesteps"]
    trained, base = _trained_and_base(measured)
    lines = [(name, found, "run") for name, found in trained.items()]
    lines += [] if base is None else [(BASE, base, "base")]
    panels = {
        f"mid-block {title}": {
            name: {
                "steps": timesteps,
                "values": [value_of(found, metric, model=model, timestep=t) for t in timesteps],
                "errors": [None] * len(timesteps),
            }
            for name, found, model in lines
        }
        for metric, title in ACROSS.items()
    }
    file = folder / "align_runs.png"
    plot_panels(file, panels, xlabel="timestep (0 = clean, 999 = noise)")
    return Figure(file, "The mid-block of all runs against the timestep at which it is read.")


def _trained_and_base(measured: Mapping[str, Mapping]) -> tuple[dict[str, Mapping], Mapping | None]:
    """The results that have a run, by its label, and the first result that has the bare base model."""
    trained = {name: found for name, found in measured.items() if found["heldout_loss_diff"] is not None}
    base = next((found for found in measured.values() if found["heldout_loss_diff_base"] is not None), None)
    return trained, base


def _conditions(found: Mapping) -> tuple:
    return tuple(str(found.get(key)) for key in ALIKE)


def _table(measured: Mapping[str, Mapping], timestep: int) -> Table:
    """A table with a row for each metric, and a column for each run, for the bare base model, and for the teacher itself."""
    trained, base = _trained_and_base(measured)
    columns = [*trained, *([BASE] if base else []), "teacher"]
    rows = []
    for features, metrics in (("tap", BEFORE_HEAD), ("head", AFTER_HEAD)):
        for metric, title in metrics.items():
            cells = [
                _cell(found, metric, model="run", timestep=timestep, features=features)
                for found in trained.values()
            ]
            if base:
                cells.append(_cell(base, metric, model="base", timestep=timestep, features=features))
            own = next(iter(measured.values()))["teacher"]["mid"].get(metric) if features == "tap" else None
            cells.append(None if own is None or own["value"] is None else own["value"])
            if any(cell is not None for cell in cells):
                rows.append([title, *cells])
    losses = [found["heldout_loss_diff"] for found in trained.values()]
    losses += [base["heldout_loss_diff_base"]] if base else []
    rows.append(["held-out diffusion loss ↓", *(f"{loss:.4f}" for loss in losses), None])
    rows.append(
        [
            "optimiser steps",
            *(f"{found['step']:,}" for found in trained.values()),
            *(["0"] if base else []),
            None,
        ]
    )
    weights = {"ema": "EMA", "raw": "raw"}
    kinds = [weights.get(found["weights"], found["weights"]) for found in trained.values()]
    rows.append(["weights", *kinds, *(["base"] if base else []), None])
    shown = [i for i in range(len(columns)) if any(row[i + 1] is not None for row in rows)]
    return Table(
        ["mid-block", *(columns[i] for i in shown)], [[row[0], *(row[i + 1] for i in shown)] for row in rows]
    )


def _cell(found: Mapping, metric: str, **row) -> str | None:
    value, null = (value_of(found, metric, which, tap="mid", **row) for which in ("value", "null"))
    if value is None:
        return None
    return f"{value:.3f}" if null is None else f"{value:.3f} ({null:.3f})"


def alignment_figures(folder: Path) -> list[Path]:
    """The pictures that `align` left in a folder."""
    return [folder / name for name in PICTURES if (folder / name).exists()]
