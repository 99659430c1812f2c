"""The figures of `align`: joint embeddings of projected tokens and the teacher's, and metrics against the timestep."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten

import numpy as np

from metrics.embedding import Panel
from metrics.similarity_rows import value_of
from report.plot_style import CLASS_COLOURS, LEGEND, plain, pyplot, run_style, save_figure, timestep_axis

KINDS = {"raw": "as they are", "centred": "each side centred by itself"}
METRICS = {"cknna": "CKNNA", "cca": "held-out CCA"}
INK = "#333333"  # of what stands for all colours in a legend
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
    every = [panel for panels in sources.values() for panel in panels.values()]
    classes = sorted({int(c) for panel in every for c in panel.classes})
    if not sources or not 1 <= len(classes) <= len(CLASS_COLOURS):
        raise ValueError(f"{len(sources)} sources with {len(classes)} classes: 1 or more, 1 to 10 are wanted")
    colour = dict(zip(classes, CLASS_COLOURS, strict=False))
    shape, size = (len(KINDS), len(sources)), (max(3.7 * len(sources), 6.4), 8.9)
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    content = {name: {} for name in sources}
    for axes, (kind, name) in zip(grid.flat, itertools.product(KINDS, sources), strict=True):
        panel = sources[name][kind]
        numbers = caption(panel.numbers)
        _scatter(axes, panel, [colour[int(c)] for c in panel.classes])
        above = f"{fill(name, 44)}\n" if axes in grid[0] else ""
        axes.set_title(above + KINDS[kind], fontsize=10)
        axes.set_xlabel(numbers, fontsize=8.5, linespacing=1.35)
        content[name][kind] = {
            "projected": plain(panel.projected),
            "teacher": plain(panel.teacher),
            "classes": [int(c) for c in panel.classes],
            "numbers": dict(panel.numbers),
            "caption": numbers.replace("\n", "; "),
        }
    looks = [
        {"marker": "o", "markerfacecolor": "none", "color": INK, "label": "teacher"},
        {"marker": "x", "color": INK, "label": "network, projected"},
    ]
    for c in classes:
        name = shorten(class_names.get(c, str(c)), 20, placeholder=" …")
        looks.append({"marker": "s", "color": colour[c], "label": name})
    handles = [plt.Line2D([], [], linestyle="", markersize=6, **look) for look in looks]
    figure.legend(handles=handles, ncols=max(3, 2 * len(sources)), handletextpad=0.2, **LEGEND)
    figure.suptitle("\n".join(fill(line, 42 * max(len(sources), 2)) for line in title.splitlines()))
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
    tones = {tap: run_style(i) for i, tap in enumerate(result["taps"])}
    figure, grid = plt.subplots(1, len(METRICS), figsize=(8.6, 4.1), layout="constrained")
    drawn = {metric: {model: {tap: {} for tap in tones} for model in models} for metric in METRICS}
    for axes, (metric, name) in zip(grid, METRICS.items(), strict=True):
        for model, tap, which in itertools.product(models, tones, ("null", "value")):
            where = {"model": model, "tap": tap}
            values = [value_of(result, metric, which, timestep=t, **where) for t in result["timesteps"]]
            values = np.array(values, np.float64)  # (timesteps,); None, which is not defined, becomes NaN
            drawn[metric][model][tap][which] = plain(values)
            look = tones[tap] | {"markersize": 5, "markerfacecolor": "white"}
            if model == "run":
                look["markerfacecolor"] = look["color"]
            if which == "value":
                look |= {"linestyle": MODELS[model], "linewidth": 1.9, "zorder": 3}
            else:
                look |= {"linestyle": ":", "linewidth": 1.1, "zorder": 1.5, "alpha": 0.35}
                look["marker"] = look["marker"] if len(values) == 1 else None
            axes.plot(result["timesteps"], values, **look)
        last = result["num_timesteps"] - 1
        axes.set(title=name, xlabel=timestep_axis(last), xlim=(-30, last + 30))
        axes.set_xticks(result["timesteps"])
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)
    grid[0].set_ylabel("alignment with the teacher")
    looks = [tone | {"linestyle": "-", "label": tap} for tap, tone in tones.items()]
    labels = {"run": "run", "base": "bare base model"}
    looks += [{"color": INK, "linestyle": MODELS[model], "label": labels[model]} for model in models]
    null = {"color": INK, "linestyle": ":", "linewidth": 1.1, "alpha": 0.5, "label": "random pairs"}
    handles = [plt.Line2D([], [], **{"linewidth": 1.9, **look}) for look in [*looks, null]]
    figure.legend(handles=handles, ncols=len(handles), **LEGEND)
    figure.suptitle(title)
    save_figure(figure, path, {"title": title, "timesteps": list(result["timesteps"]), "metrics": drawn})


def _scatter(axes, panel: Panel, tones: Sequence[str]) -> None:
    circles = {"facecolors": "none", "edgecolors": tones, "marker": "o", "linewidths": 0.8}
    axes.scatter(*np.transpose(panel.teacher), s=16, **circles)
    axes.scatter(*np.transpose(panel.projected), s=16, c=tones, marker="x", linewidths=1.0)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#bbbbbb")
