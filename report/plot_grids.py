"""Grids of samples, one per run, side by side."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from report.plot_style import DPI, pyplot, save_figure

WIDEST = 2600  # px of a row of grids
CELL_GAP = 8  # px between cells


def plot_sample_grids(
    path: str | Path,
    grids: Mapping[str, np.ndarray],
    columns: int,
    column_labels: Sequence[str] | None = None,
) -> None:
    """Draw {run label: images (N, H, W, 3) uint8} as titled grids side by side, same order of images in each.

    Small images are enlarged by a whole factor, nearest neighbour, so that a pixel stays a pixel; images
    beyond 256 px are reduced. `column_labels` (one per column) stand above the columns of every grid.
    """
    plt = pyplot()
    if not grids or columns < 1:
        raise ValueError("at least one grid and one column are needed")
    if len({images.shape for images in grids.values()}) != 1:
        raise ValueError(
            f"grids differ in shape: { {label: images.shape for label, images in grids.items()} }"
        )
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"{len(column_labels)} column labels for {columns} columns")
    # Two grids stand side by side at least, so their cells shrink (but not below 64 px) to make room.
    largest = max(64, min(128, WIDEST // min(len(grids), 2) // columns - 2 * CELL_GAP))
    canvases = {label: _canvas(images, columns, largest) for label, images in grids.items()}
    height, width = next(iter(canvases.values())).shape[:2]
    cell = width / columns
    gap, top = 48, 84 if column_labels is None else 84 + 26
    per_row = max(1, min(len(grids), (WIDEST + gap) // (width + gap)))
    rows = math.ceil(len(grids) / per_row)
    full_w, full_h = per_row * (width + gap) + gap, rows * (height + top) + gap
    figure = plt.figure(figsize=(full_w / DPI, full_h / DPI))
    for i, (label, canvas) in enumerate(canvases.items()):
        left, y = gap + (i % per_row) * (width + gap), (i // per_row) * (height + top) + top
        axes = figure.add_axes((left / full_w, 1 - (y + height) / full_h, width / full_w, height / full_h))
        axes.imshow(canvas, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        figure.text(
            left / full_w, 1 - (y - top + 28) / full_h, label, fontsize=11, fontweight="bold", va="top"
        )
        for column, name in enumerate(column_labels or ()):
            figure.text(
                (left + (column + 0.5) * cell) / full_w,
                1 - (y - 8) / full_h,
                name,
                fontsize=8.5,
                ha="center",
                va="bottom",
            )
    facts = {
        label: {"shape": list(images.shape), "sha256": _digest(images)} for label, images in grids.items()
    }
    save_figure(figure, path, {"runs": facts, "columns": columns, "column_labels": list(column_labels or [])})


def plot_rows(
    path: str | Path, rows: Mapping[str, Sequence[np.ndarray | None]], columns: Sequence[str], note: str = ""
) -> None:
    """Draw {row label: images (H, W, 3) uint8} under column labels; a cell that is None stays white."""
    plt = pyplot()
    shapes = {image.shape for images in rows.values() for image in images if image is not None}
    if len(shapes) != 1 or any(len(images) != len(columns) for images in rows.values()):
        raise ValueError(
            f"rows need images of one size, one for each of {len(columns)} columns; sizes: {shapes}"
        )
    (shape,) = shapes
    blank = np.full(shape, 255, np.uint8)
    largest = max(64, min(128, WIDEST // len(columns) - 2 * CELL_GAP))
    canvases = [
        _canvas(np.stack([blank if image is None else image for image in images]), len(columns), largest)
        for images in rows.values()
    ]
    height, width = canvases[0].shape[:2]
    longest = max(len(line) for label in rows for line in label.split("\n"))
    left, top, bottom = 40 + 15 * longest, 70, 70 if note else 24
    full_w, full_h = left + max(width, 13 * len(note)) + 24, top + height * len(rows) + bottom
    figure = plt.figure(figsize=(full_w / DPI, full_h / DPI))
    for i, (label, canvas) in enumerate(zip(rows, canvases, strict=True)):
        y = top + i * height
        axes = figure.add_axes((left / full_w, 1 - (y + height) / full_h, width / full_w, height / full_h))
        axes.imshow(canvas, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        middle = 1 - (y + (height - CELL_GAP) / 2) / full_h
        figure.text((left - 16) / full_w, middle, label, fontsize=9, ha="right", va="center")
    cell = width / len(columns)
    for column, name in enumerate(columns):
        x = (left + column * cell + (cell - CELL_GAP) / 2) / full_w
        figure.text(x, 1 - (top - 12) / full_h, name, fontsize=8.5, ha="center", va="bottom")
    figure.text(left / full_w, 22 / full_h, note, fontsize=8, color="#555555", va="bottom")
    facts = {
        label: [None if image is None else _digest(image) for image in images]
        for label, images in rows.items()
    }
    save_figure(figure, path, {"rows": facts, "columns": list(columns), "note": note})


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


def _canvas(images: np.ndarray, columns: int, largest: int) -> np.ndarray:
    """(N, H, W, 3) -> one white picture of N cells in `columns` columns, each about `largest` px or, of photographs, 256."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    longest = max(images.shape[1:3])
    if longest <= 256:
        factor = max(1, largest // longest)
        images = images.repeat(factor, axis=1).repeat(factor, axis=2)  # (N, fH, fW, 3)
    else:
        size = tuple(round(side * 256 / longest) for side in (images.shape[2], images.shape[1]))
        images = np.stack(
            [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.LANCZOS)) for i in images]
        )
    n, h, w, _ = images.shape
    canvas = np.full((math.ceil(n / columns) * (h + CELL_GAP), columns * (w + CELL_GAP), 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + CELL_GAP), (i % columns) * (w + CELL_GAP)
        canvas[y : y + h, x : x + w] = image
    return canvas
