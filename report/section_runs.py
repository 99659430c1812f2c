"""The page's sections about the runs themselves: samples, training, findings, and how all was made."""

from report.material import Material, fold_command, last_points
from report.page import Block, Command, Figure, Heading, Paragraph, Table
from report.plot_grids import plot_rows, plot_sample_grids
from report.plots import plot_curves


def samples_section(material: Material) -> list[Block]:
    """Grids of the first samples of each run, and rows of pictures."""
    blocks: list[Block] = []
    if material.grids:
        file = material.folder / "samples.png"
        plot_sample_grids(file, material.grids, len(material.grid_columns), material.grid_columns)
        count = len(next(iter(material.grids.values())))
        caption = (
            f"The first {count} samples of each run by the protocol of the results, not chosen: the same noise and class "
            "at the same place."
        )
        blocks.append(Figure(file, caption))
    for number, pictures in enumerate(material.pictures):
        file = material.folder / f"pictures_{number}.png"
        plot_rows(file, pictures.rows, pictures.columns)
        blocks.append(Figure(file, pictures.caption))
    return [Heading("Samples"), *blocks] if blocks else []


def training_section(material: Material) -> list[Block]:
    """The losses of each run on the training data."""
    runs = {name: run for name, run in material.runs.items() if run.log}
    blocks: list[Block] = []
    for key, title, ylabel in (
        ("loss_diff", "Diffusion loss", "diffusion loss"),
        ("loss_token", "Token loss", "1 − cosine to the teacher"),
        ("loss_manifold", "Manifold loss", "Gram difference"),
    ):
        series = {
            name: ([line["step"] for line in lines], [line[key] for line in lines])
            for name, run in runs.items()
            if (lines := [line for line in run.log if key in line])
            and (key == "loss_diff" or any(line["coeff"] > 0 for line in lines))
        }
        if series:
            file = material.folder / f"{key}.png"
            plot_curves(
                file, series, "step", ylabel, title, log_y=True, smooth=9, run_order=list(material.runs)
            )
            note = "" if len(series) == len(runs) else " Runs with λ = 0 compute none."
            caption = (
                f"{title} on the training data: means between two logged steps, and their running mean.{note}"
            )
            blocks.append(Figure(file, caption))
    return [Heading("Training"), *blocks] if blocks else []


def findings_section(material: Material) -> list[Block]:
    """What the numbers show and what they do not, in sentences made of the numbers."""
    runs = {name: run for name, run in material.runs.items() if not run.is_base}
    shows = []
    if material.curve is not None:
        metric = material.curve["metric"]
        last = {
            name: point["metrics"][metric]
            for name, point in last_points(material.runs, material.curve["protocol"]).items()
        }
        trained = sorted((last[name]["value"], name) for name in runs if name in last)
        shows.append(f"{metric} in order: {', '.join(f'`{name}` {value:.3g}' for value, name in trained)}.")
        if len(trained) == 2:
            (low, best), (high, other) = trained
            errors = [last[name]["error"] or 0.0 for name in (best, other)]
            spread = sum(error**2 for error in errors) ** 0.5
            shows.append(
                f"`{best}` is {1 - low / high:.0%} below `{other}`"
                + (f", {(high - low) / spread:.1f} times the error of their difference" if spread else "")
                + ", on this one seed of training. Both were sampled from the same noise, which makes the true error smaller."
            )
    losses = {
        name: run.alignment["heldout_loss_diff"]
        for name, run in runs.items()
        if run.alignment is not None and run.alignment["heldout_loss_diff"] is not None
    }
    if losses:
        lowest = min(losses, key=losses.get)
        shows.append(f"The lowest held-out diffusion loss is `{lowest}`'s, {losses[lowest]:.4f}.")
    return [
        Heading("What this shows, and what it does not"),
        Paragraph(" ".join(shows)),
        Paragraph(
            "It does not show that a difference would survive another seed of training: the errors here are of sampling alone, "
            "and two trainings differ by more. That takes several runs of each and their spread. The head's cosine mainly says "
            "that its own loss was minimised; CCA, CKA and CKNNA look at the features before it."
        ),
    ]


def making_section(material: Material) -> list[Block]:
    """Settings that differ, commands, and how long each stage took."""
    runs = {name: run for name, run in material.runs.items() if not run.is_base}
    keys = sorted({key for run in runs.values() for key in run.settings})
    values = {key: [str(run.settings.get(key)) for run in runs.values()] for key in keys}
    differing = [[key, *shown] for key, shown in values.items() if len(set(shown)) > 1]
    blocks: list[Block] = [Heading("How this was made")]
    if differing:
        blocks.append(Table(["setting", *runs], differing, "All settings in which the runs differ."))
    times = material.times
    if times:
        rows = [[stage["stage"], f"{stage['seconds']:.1f} s"] for stage in times]
        groups = {stage["group"] for stage in times}
        total = sum(max(stage["seconds"] for stage in times if stage["group"] == group) for group in groups)
        caption = f"{total:.0f} s in all; of stages that ran side by side only the longest counts."
        blocks.append(Table(["stage", "time"], rows, caption))
    commands = [stage["command"] for stage in times] or [c for run in runs.values() for c in run.commands]
    blocks.append(Command("\n".join(fold_command(line) for line in [*commands, material.command])))
    return blocks
