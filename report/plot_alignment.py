"""The figures of `align`: joint embeddings of projected tokens and the teacher's, and metrics against the timestep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten

import numpy as np

from metrics.embedding import Panel
from metrics.similarity_rows import value_of
from report.plot_style import CLASS_COLOURS, plain, pyplot, run_style, save_figure

KINDS = {"raw": "as they are", "centred": "each side centred by itself"}
METRICS = {"cknna": "CKNNA", "cca": "held-out CCA"}
MODELS = {"run": "-", "base": "--"}


def plot_embedding(
    path: str | Path,
    sources: Mapping[str, Mapping[str, Panel]],
    class_names: Mapping[int, str],
    title: str = "",
) -> None:
    """Draw {source: {"raw": Panel, "centred": Panel}}: a column a source, the centred panel below the raw one.

    Marker shape = side (teacher or projected), colour = class (ten at most). The numbers stand below each panel.
    """
    plt = pyplot()
    classes = sorted(
        {int(c) for panels in sources.values() for panel in panels.values() for c in panel.classes}
    )
    if not sources or not 1 <= len(classes) <= len(CLASS_COLOURS):
        raise ValueError(
            f"{len(sources)} sources with {len(classes)} classes: 1 or more with 1 to 10 are wanted"
        )
    colour = dict(zip(classes, CLASS_COLOURS, strict=False))
    figure, grid = plt.subplots(
        len(KINDS),
        len(sources),
        figsize=(max(3.7 * len(sources), 6.4), 8.9),
        squeeze=False,
        layout="constrained",
    )
    for column, (name, panels) in enumerate(sources.items()):
        for row, (kind, subtitle) in enumerate(KINDS.items()):
            axes, panel = grid[row, column], panels[kind]
            _scatter(axes, name, panel, [colour[int(c)] for c in panel.classes])
            axes.set_title(f"{fill(name, 44)}\n{subtitle}" if row == 0 else subtitle, fontsize=10)
            axes.set_xlabel(caption(panel.numbers), fontsize=8.5, linespacing=1.35)
    dot = {"linestyle": "", "markersize": 6}
    handles = [
        plt.Line2D([], [], marker="o", markerfacecolor="none", color="#333333", label="teacher", **dot),
        plt.Line2D([], [], marker="x", color="#333333", label="U-Net, projected", **dot),
    ]
    handles += [
        plt.Line2D(
            [],
            [],
            marker="s",
            color=colour[c],
            label=shorten(class_names.get(c, str(c)), 20, placeholder=" …"),
            **dot,
        )
        for c in classes
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(3, 2 * len(sources)),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
    )
    lines = [fill(line, 42 * max(len(sources), 2)) for line in title.splitlines()]
    figure.suptitle("\n".join(lines) or None, fontsize=11)
    content = {
        name: {
            kind: {
                "projected": plain(panel.projected),
                "teacher": plain(panel.teacher),
                "classes": [int(c) for c in panel.classes],
                "numbers": dict(panel.numbers),
                "caption": caption(panel.numbers).replace("\n", "; "),
            }
            for kind, panel in panels.items()
        }
        for name, panels in sources.items()
    }
    save_figure(figure, path, {"title": title, "sources": content})


def caption(numbers: Mapping[str, float | int]) -> str:
    """A panel's numbers in three short lines."""
    text = {name: f"{round(value, 2) + 0.0:.2f}" for name, value in numbers.items()}  # no minus before 0.00
    return (
        f"paired cosine {text['paired_cosine']} (random pairs {text['null_paired_cosine']})\n"
        f"CKNNA {text['cknna']} (random pairs {text['null_cknna']}), {numbers['cknna_images']} images, "
        f"k = {numbers['cknna_k']}\n"
        f"drawn: {numbers['tokens']} tokens a side of {numbers['images']} images"
    )


def plot_timesteps(path: str | Path, result: Mapping, title: str = "") -> None:
    """Draw CKNNA and CCA of the taps' features against the timestep, from the contents of align.json.

    Colour and marker = tap, solid = the run, dashed = the bare base model; faint and dotted: their nulls.
    """
    plt = pyplot()
    models = [model for model in MODELS if any(row["model"] == model for row in result["rows"])]
    figure, grid = plt.subplots(1, len(METRICS), figsize=(8.6, 4.1), layout="constrained")
    drawn = {}
    for axes, (metric, name) in zip(grid, METRICS.items(), strict=True):
        for model in models:
            for place, tap in enumerate(result["taps"]):
                style = run_style(place)
                for which in ("null", "value"):
                    values = _series(result, metric, which, model, tap)
                    drawn.setdefault(metric, {}).setdefault(model, {}).setdefault(tap, {})[which] = plain(
                        values
                    )
                    null = which == "null"
                    axes.plot(
                        result["timesteps"],
                        values,
                        color=style["color"],
                        linestyle=":" if null else MODELS[model],
                        linewidth=1.1 if null else 1.9,
                        alpha=0.35 if null else 1.0,
                        marker=None if null and len(values) > 1 else style["marker"],
                        markersize=5,
                        markerfacecolor=style["color"] if model == "run" else "white",
                        zorder=1.5 if null else 3,
                    )
        axes.set(title=name, xlabel="timestep (0 = clean, 999 = noise)", xlim=(-30, 1029))
        axes.set_xticks(result["timesteps"])
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)
    grid[0].set_ylabel("alignment with the teacher")
    line = {"color": "#333333", "linewidth": 1.9}
    handles = [
        plt.Line2D(
            [], [], color=run_style(i)["color"], marker=run_style(i)["marker"], linewidth=1.9, label=tap
        )
        for i, tap in enumerate(result["taps"])
    ]
    labels = {"run": "run", "base": "bare base model"}
    handles += [plt.Line2D([], [], linestyle=MODELS[model], label=labels[model], **line) for model in models]
    handles.append(
        plt.Line2D([], [], linestyle=":", color="#333333", alpha=0.5, linewidth=1.1, label="random pairs")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title or None, fontsize=11)
    save_figure(figure, path, {"title": title, "timesteps": list(result["timesteps"]), "metrics": drawn})


def _scatter(axes, name: str, panel: Panel, tones: Sequence[str]) -> None:
    shape = (len(panel.classes), 2)
    if np.shape(panel.projected) != shape or np.shape(panel.teacher) != shape:
        raise ValueError(
            f"{name!r} needs projected and teacher of shape {shape}, got "
            f"{np.shape(panel.projected)} and {np.shape(panel.teacher)}"
        )
    axes.scatter(
        *np.transpose(panel.teacher), s=16, facecolors="none", edgecolors=tones, marker="o", linewidths=0.8
    )
    axes.scatter(*np.transpose(panel.projected), s=16, c=tones, marker="x", linewidths=1.0)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#bbbbbb")


def _series(result: Mapping, metric: str, which: str, model: str, tap: str) -> np.ndarray:
    """(timesteps,) with NaN for what is not defined."""
    values = [
        value_of(result, metric, which, model=model, tap=tap, timestep=timestep)
        for timestep in result["timesteps"]
    ]
    return np.array(values, np.float64)  # None becomes NaN
