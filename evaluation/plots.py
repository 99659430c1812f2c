"""Figures from plain data; each function saves a PNG and, beside it, the JSON it was drawn from."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.plot_grids import plot_sample_grids
from evaluation.plot_style import plain, pyplot, run_style, save_figure

LABEL_LINE = 0.058  # height of a line of labels in units of the axes

__all__ = ["plot_bars", "plot_curves", "plot_sample_grids", "run_style"]


def plot_curves(
    path: str | Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    log_y: bool = False,
    *,
    smooth: int = 1,
    run_order: Sequence[str] | None = None,
) -> None:
    """Draw {run label: (xs, ys)} as lines, each labelled at its end.

    `smooth` > 1 draws the raw values light and their centred running mean over that many points strong, for
    noisy training losses. `run_order` lists all runs, so that a figure of some of them keeps their colours.
    Values that are not finite leave a gap, and are null in the JSON.
    """
    plt = pyplot()
    order = _order(series, run_order)
    figure, axes = plt.subplots(figsize=(6.8, 4.0), layout="constrained")
    ends, drawn = [], {}
    for label, (xs, ys) in series.items():
        xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
        if xs.ndim != 1 or xs.shape != ys.shape or len(xs) == 0:
            raise ValueError(f"{label!r} needs xs and ys of one length, got {xs.shape} and {ys.shape}")
        style = run_style(order.index(label))
        line = {"color": style["color"], "linestyle": style["linestyle"], "linewidth": 2.0, "zorder": 3}
        strong = ys
        if smooth > 1:
            axes.plot(xs, ys, color=style["color"], alpha=0.22, linewidth=0.7, zorder=1.5)
            strong = _running_mean(ys, smooth)
        elif len(xs) <= 30:
            line["marker"], line["markersize"] = style["marker"], 5
        axes.plot(xs, strong, **line)
        finite = np.flatnonzero(np.isfinite(strong))
        if len(finite):
            ends.append((label, xs[finite[-1]], strong[finite[-1]], style["color"]))
        drawn[label] = {"x": plain(xs), "y": plain(ys)}
    if log_y:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _label_ends(axes, ends)
    save_figure(
        figure,
        path,
        {
            "title": title,
            "xlabel": xlabel,
            "ylabel": ylabel,
            "log_y": log_y,
            "smooth": smooth,
            "series": drawn,
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
    runs = _order(dict.fromkeys(run for values in metrics.values() for run in values), run_order)
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


def _order(runs: Mapping[str, object], run_order: Sequence[str] | None) -> list[str]:
    if not runs:
        raise ValueError("no runs to draw")
    order = list(runs if run_order is None else run_order)
    if set(runs) - set(order):
        raise ValueError(f"run_order {order} lacks {sorted(set(runs) - set(order))}")
    return order


def _running_mean(ys: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` points, over fewer at the ends; points that are not finite do not count."""
    half = window // 2
    parts = [ys[max(0, i - half) : i + half + 1] for i in range(len(ys))]
    return np.array([p[np.isfinite(p)].mean() if np.isfinite(p).any() else np.nan for p in parts])


def _label_ends(axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Write each run's name right of its last point, moved apart vertically, as little as needed."""
    from scipy.optimize import isotonic_regression

    if not ends:
        return
    axes.figure.canvas.draw()
    to_axes = axes.transAxes.inverted()
    heights = [to_axes.transform(axes.transData.transform(end[1:3]))[1] for end in ends]
    order = np.argsort(heights, kind="stable")
    # At least one line apart and as near as possible to the wanted heights: isotonic regression with the lines
    # taken off and put back.
    lines = LABEL_LINE * np.arange(len(ends))
    apart = isotonic_regression(np.take(heights, order) - lines).x + lines
    apart = np.clip(apart, lines, 1.0 - lines[::-1])
    for place, height in zip(order, apart, strict=True):
        label, x, y, colour = ends[place]
        arrow = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.8,
            "alpha": 0.6,
            "shrinkA": 0,
            "shrinkB": 3,
        }
        axes.annotate(
            label,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            fontweight="bold",
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops=arrow | {"relpos": (0, 0.5)},
        )
