"""The style of all figures: the look, the colours of runs and classes, and saving a PNG beside its data."""

import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.files import write_atomically

DPI = 200  # twice the density of a page's 100 px per inch

# Okabe and Ito's palette, safe for the common colour blindnesses; without its yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++")
# Ten classes; a class is a colour in the t-SNE figure, where runs are panels.
CLASS_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#332288",
    "#882255",
    "#999933",
    "#666666",
)

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.dpi": DPI,
    "savefig.facecolor": "white",
}


def run_style(index: int) -> dict:
    """Colour, line style, marker and hatch of run number `index`, the same in every figure."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "hatch": HATCHES[index % len(HATCHES)],
    }


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def save_figure(figure, path: str | Path, data: dict) -> None:
    """Write the PNG and its JSON. The JSON is strict: a NaN is a null."""
    import matplotlib.pyplot as plt

    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"figures are PNG files, got {path}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    write_atomically(path.with_suffix(".json"), text.encode())
    write_atomically(path, buffer.getvalue())


def ordered(runs: Iterable[str], run_order: Sequence[str] | None) -> list[str]:
    """All runs in the order that decides their colours."""
    runs = list(runs)
    if not runs:
        raise ValueError("no runs to draw")
    order = list(runs if run_order is None else run_order)
    if set(runs) - set(order):
        raise ValueError(f"run_order {order} lacks {sorted(set(runs) - set(order))}")
    return order


def plain(values):
    """Numbers in a form that JSON allows: nested lists of floats, None where not finite."""
    if np.ndim(values):
        return [plain(v) for v in values]
    return float(values) if math.isfinite(values) else None
