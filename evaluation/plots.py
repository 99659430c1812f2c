"""Figures from plain data; each function saves a PNG and, beside it, the JSON it was drawn from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np

from evaluation.plot_style import CLASS_COLOURS, ordered, plain, pyplot, run_style, save_figure


@dataclass
class TsnePanel:
    """One run's panel: `projected` and `teacher` (M, 2) coordinates, `classes` (M,) and a `caption`."""

    projected: np.ndarray
    teacher: np.ndarray
    classes: Sequence[int]
    caption: str = ""


def plot_tsne(
    path: str | Path, panels: Mapping[str, TsnePanel], class_names: Mapping[int, str] | None = None
) -> None:
    """Draw one panel per run: marker shape = source (teacher or projected), colour = class (ten at most)."""
    plt = pyplot()
    classes = sorted({int(c) for panel in panels.values() for c in panel.classes})
    if not panels or not 1 <= len(classes) <= len(CLASS_COLOURS):
        raise ValueError(
            f"{len(panels)} panels with {len(classes)} classes: 1 or more with 1 to 10 are wanted"
        )
    colour = dict(zip(classes, CLASS_COLOURS, strict=False))
    per_row = min(len(panels), 3)
    rows = math.ceil(len(panels) / per_row)
    figure, grid = plt.subplots(
        rows,
        per_row,
        figsize=(max(4.0 * per_row, 6.0), 4.6 * rows + 0.9),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (label, panel) in zip(grid.flat, panels.items(), strict=False):
        shape = (len(panel.classes), 2)
        if np.shape(panel.projected) != shape or np.shape(panel.teacher) != shape:
            raise ValueError(
                f"{label!r} needs projected and teacher of shape {shape}, got "
                f"{np.shape(panel.projected)} and {np.shape(panel.teacher)}"
            )
        tones = [colour[int(c)] for c in panel.classes]
        axes.scatter(
            *np.transpose(panel.teacher),
            s=20,
            facecolors="none",
            edgecolors=tones,
            marker="o",
            linewidths=0.9,
        )
        axes.scatter(*np.transpose(panel.projected), s=20, c=tones, marker="x", linewidths=1.1)
        axes.set(title=label, xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#bbbbbb")
        axes.set_xlabel(fill(panel.caption, 46), fontsize=9)
    dot = {"linestyle": "", "markersize": 6}
    handles = [
        plt.Line2D([], [], marker="o", markerfacecolor="none", color="#333333", label="teacher", **dot),
        plt.Line2D([], [], marker="x", color="#333333", label="U-Net, projected", **dot),
    ]
    handles += [
        plt.Line2D([], [], marker="s", color=colour[c], label=(class_names or {}).get(c, str(c)), **dot)
        for c in classes
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 2 + 2 * per_row),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
    )
    save_figure(
        figure,
        path,
        {
            "panels": {
                label: {
                    "projected": plain(panel.projected),
                    "teacher": plain(panel.teacher),
                    "classes": [int(c) for c in panel.classes],
                    "caption": panel.caption,
                }
                for label, panel in panels.items()
            }
        },
    )


def plot_bars(
    path: str | Path,
    metrics: Mapping[str, Mapping[str, float | None]],
    title: str = "",
    *,
    run_order: Sequence[str] | None = None,
) -> None:
    """Draw {metric: {run: value}}: one small panel of bars per metric, each with its own scale from 0.

    A value of None reads "not measured". Say in the metric's name whether lower or higher is better.
    """
    plt = pyplot()
    if not metrics:
        raise ValueError("no metrics")
    runs = ordered(dict.fromkeys(run for values in metrics.values() for run in values), run_order)
    per_row = min(len(metrics), 3)
    rows = math.ceil(len(metrics) / per_row)
    figure, grid = plt.subplots(
        rows,
        per_row,
        figsize=(3.6 * per_row + 1.2, (0.42 * len(runs) + 0.75) * rows + 0.3),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes in grid.flat[len(metrics) :]:
        axes.set_axis_off()
    for axes, (metric, values) in zip(grid.flat, metrics.items(), strict=False):
        finite = [v for v in values.values() if v is not None and math.isfinite(v)]
        for place, run in enumerate(runs):
            value = values.get(run)
            style = run_style(place)
            measured = value is not None and math.isfinite(value)
            if measured:
                axes.barh(
                    place,
                    value,
                    height=0.62,
                    color=style["color"],
                    hatch=style["hatch"],
                    edgecolor="white",
                    linewidth=0.0,
                )
            right = not measured or value >= 0
            axes.annotate(
                f"{value:.4g}" if measured else "not measured",
                (value if measured else 0.0, place),
                xytext=(4 if right else -4, 0),
                textcoords="offset points",
                va="center",
                ha="left" if right else "right",
                fontsize=9,
                color="#222222" if measured else "#777777",
            )
        low, high = min([0.0, *finite]), max([0.0, *finite])
        room = 0.24 * ((high - low) or 1.0)
        axes.set(title=metric, yticks=range(len(runs)), yticklabels=runs)
        axes.set_xlim(low - (room if low < 0 else 0.0), high + room)
        axes.set_ylim(len(runs) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(visible=False, axis="y")
    figure.suptitle(title or None, fontsize=12)
    save_figure(
        figure,
        path,
        {
            "title": title,
            "metrics": {
                metric: {run: None if v is None else plain(v) for run, v in values.items()}
                for metric, values in metrics.items()
            },
        },
    )
