"""The page's section on alignment, from what `align` wrote of each run."""

from collections.abc import Mapping
from pathlib import Path

from evaluation.alignment_rows import nearest_timestep, value_of
from evaluation.page import Block, Command, Figure, Heading, Paragraph, Table

# Metric of the mid-block's own features, and what the table calls it.
BEFORE_HEAD = {
    "cca": "CCA, held-out images",
    "cka": "CKA, unbiased, linear",
    "cknna": "CKNNA",
    "ridge_cosine": "cosine of a ridge map to the teacher's tokens, held-out images",
    "ridge_r2": "R² of that map",
    "probe": "accuracy of a linear probe for the class, held-out images",
    "lds": "LDS, local − distant similarity",
    "cds": "CDS, fall of similarity with distance",
    "rmsc": "RMSC, contrast within an image",
}
AFTER_HEAD = {
    "cosine": "cosine of the head's tokens with the teacher's",
    "cknna": "CKNNA of the head's tokens",
}
PICTURES = {
    "align_timesteps.png": "{name}: the same by timestep and tap; dashed: the bare base model; faint: pairs at random.",
    "align_tsne.png": "{name}: joint embedding of U-Net and teacher tokens, as they are and with each source centred. Distances "
    "between clusters mean nothing.",
    "align_umap.png": "{name}: the same by UMAP.",
}


def alignment_sections(runs: Mapping) -> list[Block]:
    """Table, conditions and pictures of the runs that were measured; what to run for those that were not."""
    measured = {name: run.alignment for name, run in runs.items() if run.alignment is not None}
    blocks: list[Block] = [Heading("Alignment on held-out images")]
    missing = [name for name, run in runs.items() if run.alignment is None and not run.is_base]
    if missing:
        blocks.append(Paragraph(f"Not measured: {', '.join(missing)} (`python evaluate_sd15.py align RUN`)."))
    if not measured:
        return blocks
    first = next(iter(measured.values()))
    if differing := [name for name, found in measured.items() if _conditions(found) != _conditions(first)]:
        blocks.append(
            Paragraph(
                f"Measured under other conditions than {next(iter(measured))}, and so not comparable with it: {', '.join(differing)}."
            )
        )
    timestep = nearest_timestep(first["timesteps"])
    h, w = first["tap_grids"]["mid"]
    blocks += [
        _table(measured, timestep),
        Paragraph(
            f"Mid-block at timestep {timestep} on its own {h} × {w} grid, fixed noise, EMA weights, null prompt, "
            f"{first['num_images']} held-out images. In brackets the null: images paired at random (for LDS and CDS: positions "
            "shuffled; for the probe: labels shuffled). "
            f"CCA: {first['cca_k']} principal components a side, each position's mean over images removed, fitted on "
            f"{first['n_fit']} images and reported on the other {first['n_test']}. CKNNA: one vector an image, "
            f"{first['cknna_k']} neighbours among {first['num_images']}; it depends on both numbers. A dash: not defined on this "
            "grid, or the run has no head."
        ),
        Command("\n".join(dict.fromkeys(found["command"] for found in measured.values()))),
    ]
    for name, run in runs.items():
        blocks += [
            Figure(path, PICTURES[path.name].format(name=name))
            for path in run.figures
            if path.name in PICTURES
        ]
    return blocks


def _conditions(found: Mapping) -> tuple:
    return tuple(
        str(found[key]) for key in ("num_images", "seed", "timesteps", "tap_grids", "teacher_grid", "prompt")
    )


def _table(measured: Mapping[str, Mapping], timestep: int) -> Table:
    """A row each metric, a column each run, the bare base model, and the teacher itself where it has the metric."""
    base = next((found for found in measured.values() if found["heldout_loss_diff_base"] is not None), None)
    trained = {name: found for name, found in measured.items() if found["heldout_loss_diff"] is not None}
    header = ["mid-block", *trained, *(["bare base model"] if base else []), "the teacher"]
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
    rows.append(
        ["held-out diffusion loss ↓", *losses, *([base["heldout_loss_diff_base"]] if base else []), None]
    )
    return Table(header, rows)


def _cell(found: Mapping, metric: str, **row) -> str | None:
    value, null = (value_of(found, metric, which, tap="mid", **row) for which in ("value", "null"))
    if value is None:
        return None
    return f"{value:.3f}" if null is None else f"{value:.3f} ({null:.3f})"


def alignment_figures(folder: Path) -> list[Path]:
    """The pictures that `align` left in a folder."""
    return [folder / name for name in PICTURES if (folder / name).exists()]
