"""The style of all figures: the look, the colours of runs and classes, and saving a PNG beside its data."""

import io
import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from common.files import write_atomically
from common.plain_text import printable

DPI = 200  # twice the density of a page's 100 px per inch

# Okabe and Ito's palette, safe for the common colour blindnesses; without its yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Ten classes; a class is a colour in the t-SNE figure, where runs are panels.
CLASS_COLOURS = (*COLOURS[:4], "#E69F00", "#56B4E9", "#332288", "#882255", "#999933", "#666666")

STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9, "figure.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "figure.dpi": DPI, "savefig.facecolor": "white",
    "text.parse_math": False,  # a run may be called $\\frac{1}{0}$
}  # fmt: skip


LEGEND = {"loc": "outside lower center"}  # one for all panels


def timestep_axis(last: int) -> str:
    """The label of an axis of timesteps from 0 to `last`."""
    return f"timestep (0 = clean, {last} = noise)"


def run_style(index: int) -> dict:
    """Colour, line style and marker of run number `index`, the same in every figure."""
    looks = {"color": COLOURS, "linestyle": LINES, "marker": MARKERS}
    return {name: values[index % len(values)] for name, values in looks.items()}


def run_styles(runs: Iterable[str], run_order: Sequence[str] | None) -> dict[str, dict]:
    """The style of each run. `run_order` lists all runs, so that a figure of some of them keeps their colours."""
    runs = list(runs)
    order = runs if run_order is None else run_order
    return {run: run_style(i) for i, run in enumerate(order) if run in runs}


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def drawable(text: str) -> str:
    """Return a text with an escape in place of each character that is not printable, or that the figures' font lacks."""
    lacks = (c for c in set(printable(text, keep="\n")) if c != "\n" and not _font().get_char_index(ord(c)))
    return printable(text, keep="\n").translate({ord(c): ascii(c)[1:-1] for c in lacks})


@cache
def _font():
    from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))


def make_drawable(figure) -> None:
    """Make all texts of a figure `drawable`."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(drawable(text.get_text()))


def save_figure(figure, path: str | Path, data: dict) -> Path:
    """Write the PNG, and beside it the JSON of its data, in which a NaN is an error; returns the PNG's path."""
    import matplotlib.pyplot as plt

    path, buffer = Path(path), io.BytesIO()
    make_drawable(figure)
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    write_atomically(path.with_suffix(".json"), text.encode())
    write_atomically(path, buffer.getvalue())
    return path


def plain(values):
    """Numbers in a form that JSON allows: nested lists of floats, None where not finite."""
    if np.ndim(values):
        return [plain(v) for v in values]
    return float(values) if math.isfinite(values) else None
