"""Digits that move, written as films with captions: what the demos of video families are trained on."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cache.films import write_film
from common.files import written_whole

WIDTH, HEIGHT, SIDE = 48, 32, 24  # px, of a frame and of the digit in it
FRAMES, FPS = 17, 8
CLIPS = "clips"
# How a digit moves: its place and its turn at a time from 0 to 1.
MOTIONS = {
    "moving left": lambda t: ((1 - t) * (WIDTH - SIDE), 0.0),
    "moving right": lambda t: (t * (WIDTH - SIDE), 0.0),
    "turning": lambda t: ((WIDTH - SIDE) / 2, 90 * t),
}


def make_clips(out: Path, count: int, names: list[str], seed: int) -> None:
    """Write `count` films of one digit each into OUT/clips, with metadata.jsonl: "a three moving left"."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    chosen = rng.permutation(len(digits.target))[:count]
    with written_whole(out / CLIPS) as folder:
        lines = []
        for number, index in enumerate(chosen):
            motion = list(MOTIONS)[number % len(MOTIONS)]
            write_film(folder / f"{number:03d}.mp4", film(digits.images[index], motion), FPS)
            text = f"a {names[digits.target[index]]} {motion}"
            lines.append(json.dumps({"file_name": f"{number:03d}.mp4", "text": text}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))


def film(digit: np.ndarray, motion: str) -> np.ndarray:
    """The frames of a digit `(8, 8)` in motion, uint8 `(FRAMES, HEIGHT, WIDTH, 3)`."""
    drawn = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    frames = []
    for number in range(FRAMES):
        left, turn = MOTIONS[motion](number / (FRAMES - 1))
        frame = Image.new("L", (WIDTH, HEIGHT))
        frame.paste(drawn.rotate(turn, Image.Resampling.BICUBIC), (round(left), (HEIGHT - SIDE) // 2))
        frames.append(np.asarray(frame.convert("RGB")))
    return np.stack(frames)
