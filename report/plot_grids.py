"""Grids of samples, one per run, side by side."""

import hashlib
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from report.plot_style import DPI, pyplot, save_figure

WIDEST = 2600  # px of a row of grids
CELL_GAP = 8  # px between cells
LETTER, LINE = 15, 28  # px of a letter and of a line of a caption
COLUMN_LABEL = {"fontsize": 8.5, "ha": "center", "va": "bottom"}


def plot_sample_grids(path: str | Path, grids: Mapping[str, np.ndarray], column_labels: Sequence[str]):
    """Draw {run label: images (N, H, W, 3) uint8} as titled grids side by side, same order of images in each.

    Small images are enlarged by a whole factor, nearest neighbour, so that a pixel stays a pixel; images
    beyond 256 px are reduced. `column_labels`, one for each column, stand above the columns of every grid.
    """
    columns = len(column_labels)
    shapes = {label: images.shape for label, images in grids.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"grids differ in shape: {shapes}")
    # Two grids stand side by side at least, so their cells shrink (but not below 64 px) to make room.
    widest = WIDEST // min(len(grids), 2)
    canvases = {label: _canvas(images, columns, widest) for label, images in grids.items()}
    height, width = next(iter(canvases.values())).shape[:2]
    cell, gap = width / columns, 48
    names = [fitted(name, cell) for name in column_labels]
    top = 110 + more_lines(names)
    per_row = max(1, min(len(grids), (WIDEST + gap) // (width + gap)))
    rows = math.ceil(len(grids) / per_row)
    sheet = _Sheet(per_row * (width + gap) + gap, rows * (height + top) + gap)
    for i, (label, canvas) in enumerate(canvases.items()):
        left, y = gap + (i % per_row) * (width + gap), (i // per_row) * (height + top) + top
        sheet.picture(left, y, canvas)
        sheet.text(left, y - top + 28, label, fontsize=11, fontweight="bold", va="top")
        for column, name in enumerate(names):
            sheet.text(left + (column + 0.5) * cell, y - 8, name, **COLUMN_LABEL)
    facts = {name: {"shape": list(x.shape), "sha256": _digest(x)} for name, x in grids.items()}
    data = {"runs": facts, "columns": columns, "column_labels": list(column_labels)}
    return save_figure(sheet.figure, path, data)


def plot_rows(
    path: str | Path, rows: Mapping[str, Sequence[np.ndarray | None]], columns: Sequence[str], note: str = ""
) -> Path:
    """Draw {row label: images (H, W, 3) uint8} under column labels; a cell that is None stays white."""
    shapes = {image.shape for images in rows.values() for image in images if image is not None}
    if len(shapes) != 1 or any(len(images) != len(columns) for images in rows.values()):
        raise ValueError(f"rows need images of one size, one for each of {len(columns)} columns: {shapes}")
    blank = np.full(*shapes, 255, np.uint8)
    canvases = [
        _canvas(np.stack([blank if image is None else image for image in images]), len(columns), WIDEST)
        for images in rows.values()
    ]
    height, width = canvases[0].shape[:2]
    longest = max(len(line) for label in rows for line in label.split("\n"))
    names = [fitted(name, width / len(columns)) for name in columns]
    left, top, bottom = 40 + 15 * longest, 70 + more_lines(names), 70 if note else 24
    sheet = _Sheet(left + max(width, 13 * len(note)) + 24, top + height * len(rows) + bottom)
    for i, (label, canvas) in enumerate(zip(rows, canvases, strict=True)):
        y = top + i * height
        sheet.picture(left, y, canvas)
        sheet.text(left - 16, y + (height - CELL_GAP) / 2, label, fontsize=9, ha="right", va="center")
    cell = width / len(columns)
    for column, name in enumerate(names):
        sheet.text(left + column * cell + (cell - CELL_GAP) / 2, top - 12, name, **COLUMN_LABEL)
    sheet.text(left, sheet.height - 22, note, fontsize=8, color="#555555", va="bottom")
    facts = {label: [None if i is None else _digest(i) for i in images] for label, images in rows.items()}
    return save_figure(sheet.figure, path, {"rows": facts, "columns": list(columns), "note": note})


def fitted(name: str, width: float) -> str:
    """A caption in lines that fit above a column of `width` px, three at most."""
    return textwrap.fill(name, max(6, int(width // LETTER)), max_lines=3, placeholder=" …")


def more_lines(names: Sequence[str]) -> int:
    """The px that captions of several lines need beyond one."""
    return LINE * max(name.count("\n") for name in names) if names else 0


class _Sheet:
    """A figure of whole pixels, on which places are px from the left and from the top."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = pyplot().figure(figsize=(width / DPI, height / DPI))

    def picture(self, x: float, y: float, canvas: np.ndarray) -> None:
        """Show a canvas (H, W, 3), pixel by pixel, with its upper left corner here."""
        h, w = canvas.shape[0] / self.height, canvas.shape[1] / self.width
        axes = self.figure.add_axes((x / self.width, 1 - (y + canvas.shape[0]) / self.height, w, h))
        axes.imshow(canvas, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def text(self, x: float, y: float, text: str, **look) -> None:
        """Write a text as it is: a caption may hold a dollar sign."""
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **look)


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


def _canvas(images: np.ndarray, columns: int, widest: int) -> np.ndarray:
    """(N, H, W, 3) -> one white picture of N cells in `columns` columns that share `widest` px.

    A cell has 64 to 128 px, or 256 of photographs.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    largest = max(64, min(128, widest // columns - 2 * CELL_GAP))
    longest = max(images.shape[1:3])
    if longest <= 256:
        factor = max(1, largest // longest)
        images = images.repeat(factor, axis=1).repeat(factor, axis=2)  # (N, fH, fW, 3)
    else:
        size = tuple(round(side * 256 / longest) for side in (images.shape[2], images.shape[1]))
        resized = (Image.fromarray(i).resize(size, Image.Resampling.LANCZOS) for i in images)
        images = np.stack(list(map(np.asarray, resized)))
    n, h, w, _ = images.shape
    canvas = np.full((math.ceil(n / columns) * (h + CELL_GAP), columns * (w + CELL_GAP), 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + CELL_GAP), (i % columns) * (w + CELL_GAP)
        canvas[y : y + h, x : x + w] = image
    return canvas
