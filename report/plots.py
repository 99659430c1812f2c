"""Curves: training losses by step, metrics by step and images seen with their errors, and metrics against guidance."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from report.plot_style import ordered, plain, pyplot, run_style, save_figure

LABEL_LINE = 0.058  # height of a line of labels in units of the axes

Series = Mapping[str, Sequence[float | None]]  # steps, images, values, errors


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
    order = ordered(series, run_order)
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
        _log_y(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _label_ends(axes, ends)
    data = {"title": title, "xlabel": xlabel, "ylabel": ylabel, "log_y": log_y, "smooth": smooth}
    save_figure(figure, path, data | {"series": drawn})


def plot_metric_curves(
    path: str | Path,
    series: Mapping[str, Series],
    metric: str,
    *,
    levels: Mapping[str, float] | None = None,
    run_order: Sequence[str] | None = None,
) -> None:
    """Draw one metric of several runs {run: {steps, images, values, errors}} twice: against steps, and against images seen.

    Bars are ± one error where there is one. `levels` {name: value} are lines across, such as the bare base model's.
    Logarithmic where all values are positive.
    """
    plt = pyplot()
    order = ordered([*series, *(levels or {})], run_order)
    figure, both = plt.subplots(1, 2, figsize=(10.4, 4.0), sharey=True, layout="constrained")
    for axes, across in zip(both, ("steps", "images"), strict=True):
        ends = []
        for label, found in series.items():
            style = run_style(order.index(label))
            _with_errors(axes, found[across], found["values"], found["errors"], style)
            ends.append((label, found[across][-1], found["values"][-1], style["color"]))
        for label, value in (levels or {}).items():
            style = run_style(order.index(label))
            axes.axhline(value, color=style["color"], linestyle=":", linewidth=1.6)
            ends.append((label, axes.get_xlim()[1], value, style["color"]))
        axes.set_xlabel("optimiser steps" if across == "steps" else "images seen")
        axes.ticklabel_format(axis="x", style="plain")
        axes.locator_params(axis="x", nbins=6)
        if across == "images":
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    values = [v for found in series.values() for v in found["values"]] + list((levels or {}).values())
    if min(values) > 0:
        _log_y(both[0])
    both[0].set_ylabel(metric)
    _label_ends(both[1], ends)
    data = {"metric": metric, "series": {k: dict(v) for k, v in series.items()}, "levels": dict(levels or {})}
    save_figure(figure, path, data)


def plot_panels(
    path: str | Path,
    metrics: Mapping[str, Mapping[str, Series]],
    *,
    xlabel: str = "optimiser steps",
    run_order: Sequence[str] | None = None,
) -> None:
    """Draw {metric: {run: {steps, values, errors}}}: a small panel for each metric, one legend for all."""
    plt = pyplot()
    order = ordered(dict.fromkeys(run for runs in metrics.values() for run in runs), run_order)
    per_row = min(3, len(metrics))
    rows = -(-len(metrics) // per_row)
    figure, grid = plt.subplots(
        rows, per_row, figsize=(3.5 * per_row, 2.7 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(metrics) :]:
        axes.set_axis_off()
    for axes, (metric, runs) in zip(grid.flat, metrics.items(), strict=False):
        for label, found in runs.items():
            _with_errors(
                axes, found["steps"], found["values"], found["errors"], run_style(order.index(label))
            )
        axes.set(title=metric, xlabel=xlabel)
        axes.locator_params(axis="both", nbins=5)
    _legend(figure, plt, order, order)
    figure.get_layout_engine().set(h_pad=0.12)
    save_figure(
        figure, path, {"metrics": {m: {r: dict(s) for r, s in runs.items()} for m, runs in metrics.items()}}
    )


def plot_sweep(
    path: str | Path,
    series: Mapping[str, Mapping[str, Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    run_order: Sequence[str] | None = None,
) -> None:
    """Draw {run: {scales, x, y}}: one metric against another over guidance scales, each point labelled with its scale."""
    plt = pyplot()
    order = ordered(series, run_order)
    figure, axes = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    for label, found in series.items():
        style = run_style(order.index(label))
        axes.plot(
            found["x"],
            found["y"],
            color=style["color"],
            linestyle=style["linestyle"],
            marker=style["marker"],
            label=label,
        )
        for scale, x, y in zip(found["scales"], found["x"], found["y"], strict=True):
            axes.annotate(
                f"{scale:g}",
                (x, y),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color=style["color"],
            )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(figure, plt, order, series)
    save_figure(
        figure, path, {"xlabel": xlabel, "ylabel": ylabel, "series": {k: dict(v) for k, v in series.items()}}
    )


def _with_errors(axes, xs, values, errors, style: dict) -> None:
    bars = [e or 0.0 for e in errors]
    axes.errorbar(
        xs,
        values,
        yerr=bars if any(bars) else None,
        color=style["color"],
        linestyle=style["linestyle"],
        marker=style["marker"],
        markersize=5,
        linewidth=1.8,
        capsize=3,
        zorder=3,
    )


def _legend(figure, plt, order: Sequence[str], shown: Iterable[str]) -> None:
    handles = []
    for place, label in enumerate(order):
        if label not in shown:
            continue
        style = {k: v for k, v in run_style(place).items() if k != "hatch"}
        handles.append(plt.Line2D([], [], label=label, linewidth=1.8, markersize=5, **style))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9
    )


def _log_y(axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _running_mean(ys: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` points, over fewer at the ends; points that are not finite do not count."""
    half = window // 2
    parts = [ys[max(0, i - half) : i + half + 1] for i in range(len(ys))]
    return np.array([p[np.isfinite(p)].mean() if np.isfinite(p).any() else np.nan for p in parts])


def _label_ends(axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Write each run's name to the right of its last point; names that would overlap are moved apart vertically."""
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
