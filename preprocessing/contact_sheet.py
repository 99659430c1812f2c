"""Draw a few cached images: the image, its decoded latent, and its tokens as colours of three principal components."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import file_written_whole

CELL, GAP, MARGIN, LINE = 192, 8, 150, 22  # px
# These labels are ASCII because the font that Pillow includes has no other characters.
ROWS = ("image", "VAE decode", "tokens, PCA")


def draw_contact_sheet(
    path: Path, ids: Sequence[str], images: np.ndarray, decoded: np.ndarray, tokens: np.ndarray
) -> None:
    """Write a PNG with one column for each image.

    `images` and `decoded` are uint8 `(n, H, W, 3)`; `tokens` is `(n, h, w, D)`. One PCA is computed over the tokens of all
    images, so a colour has the same meaning in every column.
    """
    colours = principal_colours(tokens.reshape(-1, tokens.shape[-1])).reshape(*tokens.shape[:3], 3)
    height, width = (max(1, round(CELL * side / max(images.shape[1:3]))) for side in images.shape[1:3])
    sheet = Image.new("RGB", (MARGIN + len(ids) * (CELL + GAP), LINE + len(ROWS) * (height + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (name, pictures) in enumerate(zip(ROWS, (images, decoded, colours), strict=True)):
        top = LINE + row * (height + GAP)
        label = f"{name}\n{pictures.shape[1]} x {pictures.shape[2]}"
        draw.text((10, top + height // 2 - 8), label, "black", font)
        for column, picture in enumerate(pictures):
            # Small pictures are enlarged with sharp pixels; large ones are reduced smoothly.
            kind = Image.Resampling.NEAREST if len(picture) < height else Image.Resampling.LANCZOS
            cell = Image.fromarray(picture).resize((width, height), kind)
            sheet.paste(cell, (MARGIN + column * (CELL + GAP), top))
    for column, key in enumerate(ids):
        name = key.rsplit("/", 1)[-1]
        while font.getlength(name) > CELL:
            name = name[:-4] + "..."
        draw.text((MARGIN + column * (CELL + GAP), 3), name, "black", font)
    with file_written_whole(path) as file:
        sheet.save(file, "png")


def principal_colours(vectors: np.ndarray) -> np.ndarray:
    """Return three principal components of `vectors (m, D)` as uint8 RGB `(m, 3)`; percentiles 1 and 99 become 0 and 255."""
    centred = vectors.astype(np.float64) - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    components = centred @ axes[:3].T
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))  # (m, 3), zeros if m or D is less
    low, high = np.percentile(components, [1, 99], axis=0)
    return (np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1) * 255).round().astype(np.uint8)
