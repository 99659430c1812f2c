"""Curves: training losses by step, metrics by step and images seen with their errors, and metrics against guidance."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from report.plot_style import LEGEND, make_drawable, plain, pyplot, run_styles, save_figure

SMOOTH = 9  # points of the running mean of a loss
LABEL_LINE = 0.058  # height of a line of labels in units of the axes

Series = Mapping[str, Sequence[float | None]]  # steps, images, values, errors


def plot_curves(
    path: str | Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ylabel: str,
    title: str,
    run_order: Sequence[str] | None = None,
) -> Path:
    """Draw {run label: (steps, values)} as lines on a logarithmic scale, each labelled at its end.

    The raw values are light and their centred running mean over `SMOOTH` points strong, for noisy training losses. Values that
    are not finite leave a gap, and are null in the JSON.
    """
    styles = run_styles(series, run_order)
    figure, axes = pyplot().subplots(figsize=(6.8, 4.0), layout="constrained")
    ends, drawn = [], {}
    for label, (xs, ys) in series.items():
        xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
        if xs.ndim != 1 or xs.shape != ys.shape or len(xs) == 0:
            raise ValueError(f"{label!r} needs xs and ys of one length, got {xs.shape} and {ys.shape}")
        look, strong = styles[label] | {"marker": None}, _running_mean(ys, SMOOTH)
        axes.plot(xs, ys, color=look["color"], alpha=0.22, linewidth=0.7, zorder=1.5)
        axes.plot(xs, strong, linewidth=2.0, zorder=3, **look)
        finite = np.flatnonzero(np.isfinite(strong))
        if len(finite):
            ends.append((label, xs[finite[-1]], strong[finite[-1]], look["color"]))
        drawn[label] = {"x": plain(xs), "y": plain(ys)}
    _log_y(axes)
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    _label_ends(axes, ends)
    data = {"title": title, "xlabel": "step", "ylabel": ylabel, "log_y": True, "smooth": SMOOTH}
    return save_figure(figure, path, data | {"series": drawn})


def plot_metric_curves(
    path: str | Path,
    series: Mapping[str, Series],
    metric: str,
    *,
    levels: Mapping[str, float] | None = None,
    run_order: Sequence[str] | None = None,
) -> Path:
    """Draw one metric of several runs {run: {steps, images, values, errors}} twice: against steps, and against images seen.

    Bars are ± one error where there is one. `levels` {name: value} are lines across, such as the bare base model's.
    Logarithmic where all values are positive.
    """
    levels = dict(levels or {})
    styles = run_styles([*series, *levels], run_order)
    figure, both = pyplot().subplots(1, 2, figsize=(10.4, 4.0), sharey=True, layout="constrained")
    for axes, across in zip(both, ("steps", "images"), strict=True):
        ends = []
        for label, found in series.items():
            _with_errors(axes, found[across], found, styles[label])
            ends.append((label, found[across][-1], found["values"][-1], styles[label]["color"]))
        for label, value in levels.items():
            colour = styles[label]["color"]
            axes.axhline(value, color=colour, linestyle=":", linewidth=1.6)
            ends.append((label, axes.get_xlim()[1], value, colour))
        axes.set_xlabel("optimiser steps" if across == "steps" else "images seen")
        axes.ticklabel_format(axis="x", style="plain")
        axes.locator_params(axis="x", nbins=6)
    both[1].xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    if min([v for found in series.values() for v in found["values"]] + list(levels.values())) > 0:
        _log_y(both[0])
    both[0].set_ylabel(metric)
    _label_ends(both[1], ends)
    return save_figure(figure, path, {"metric": metric, "series": series, "levels": levels})


def plot_panels(
    path: str | Path, metrics: Mapping[str, Mapping[str, Series]], *, xlabel: str = "optimiser steps"
) -> Path:
    """Draw {metric: {run: {steps, values, errors}}}: a small panel for each metric, one legend for all."""
    styles = run_styles(dict.fromkeys(run for runs in metrics.values() for run in runs), None)
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    size = (3.5 * columns, 2.7 * rows + 0.5)
    figure, grid = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(metrics) :]:
        axes.set_axis_off()
    for axes, (metric, runs) in zip(grid.flat, metrics.items(), strict=False):
        for label, found in runs.items():
            _with_errors(axes, found["steps"], found, styles[label])
        axes.set(title=metric, xlabel=xlabel)
        axes.locator_params(axis="both", nbins=5)
    _legend_of_runs(figure, styles)
    figure.get_layout_engine().set(h_pad=0.12)
    return save_figure(figure, path, {"metrics": metrics})


def plot_sweep(
    path: str | Path,
    series: Mapping[str, Mapping[str, Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    run_order: Sequence[str] | None = None,
) -> Path:
    """Draw {run: {scales, x, y}}: one metric against another over guidance scales, each point labelled with its scale."""
    styles = run_styles(series, run_order)
    figure, axes = pyplot().subplots(figsize=(6.8, 4.4), layout="constrained")
    for label, found in series.items():
        axes.plot(found["x"], found["y"], **styles[label])
        note = {"textcoords": "offset points", "fontsize": 8, "color": styles[label]["color"]}
        for scale, x, y in zip(found["scales"], found["x"], found["y"], strict=True):
            axes.annotate(f"{scale:g}", (x, y), xytext=(5, 5), **note)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend_of_runs(figure, styles)
    return save_figure(figure, path, {"xlabel": xlabel, "ylabel": ylabel, "series": series})


def _with_errors(axes, xs: Sequence[float], found: Series, style: dict) -> None:
    """Draw a series against `xs`, with bars where it has errors."""
    bars = [e or 0.0 for e in found["errors"]]
    line = style | {"markersize": 5, "linewidth": 1.8, "capsize": 3, "zorder": 3}
    axes.errorbar(xs, found["values"], yerr=bars if any(bars) else None, **line)


def _legend_of_runs(figure, styles: Mapping[str, dict]) -> None:
    line = pyplot().Line2D
    look = {"linewidth": 1.8, "markersize": 5}
    handles = [line([], [], label=label, **look, **style) for label, style in styles.items()]
    figure.legend(handles=handles, ncols=min(4, len(handles)), **LEGEND)


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
    make_drawable(axes.figure)
    axes.figure.draw_without_rendering()  # which finds the places of its parts
    to_axes = axes.transAxes.inverted()
    heights = [to_axes.transform(axes.transData.transform(end[1:3]))[1] for end in ends]
    order = np.argsort(heights, kind="stable")
    # At least one line apart and as near as possible to the wanted heights: isotonic regression with the lines
    # taken off and put back.
    lines = LABEL_LINE * np.arange(len(ends))
    apart = isotonic_regression(np.take(heights, order) - lines).x + lines
    apart = np.clip(apart, lines, 1.0 - lines[::-1])
    for index, height in zip(order, apart, strict=True):
        label, x, y, colour = ends[index]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6}
        line |= {"shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        text = {"color": colour, "fontweight": "bold", "fontsize": 9, "va": "center"}
        place = {"xytext": (1.03, height), "textcoords": "axes fraction", "annotation_clip": False}
        axes.annotate(label, (x, y), arrowprops=line, **place, **text)
