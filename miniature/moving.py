"""Digits in motion: films with captions, and the small trained models of a video pipeline, its teacher and its judges.

`0_make_demo.py --moving` makes them. Every digit makes one motion, those of a class all in turn; train and val share no digit.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor

from cache.films import write_film
from common.files import written_whole

# In pixels: the side of a frame, that of the digit, and how far it goes from the middle to either side.
SIDE, DIGIT, WAY = 32, 22, 5
FRAMES, FPS = 13, 8
CLIPS, SPLITS = "clips", ("train", "val")  # folders
QUICK = 40  # digits of each split that `quick` keeps
# Where the digit goes, in x and y, from one end of its way to the other.
MOTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1)}


def split_digits(seed: int, quick: bool) -> dict[str, list[int]]:
    """The numbers of scikit-learn's digits of each split, 80 % train and 20 % val; few with `quick`."""
    classes = datasets.load_digits().target
    how = {"test_size": 0.2, "stratify": classes, "random_state": seed}
    parts = train_test_split(np.arange(len(classes)), **how)
    kept = [sorted(part.tolist())[: QUICK if quick else None] for part in parts]
    return dict(zip(SPLITS, kept, strict=True))


def load_digits(out: Path, split: str) -> tuple[Tensor, Tensor]:
    """The digits (N, 1, 8, 8) in [0, 1] that the films of a split show, and their classes (N,)."""
    numbers = sorted({int(file.name.partition("_")[0]) for file in (out / CLIPS / split).glob("*.mp4")})
    return digits_of(numbers)


def digits_of(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The digits of these numbers (N, 1, 8, 8) in [0, 1], and their classes (N,)."""
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images[numbers]).float().unsqueeze(1) / 16
    return images, torch.from_numpy(digits.target[numbers])


def draw(digits: Tensor, places: Tensor) -> Tensor:
    """Digits (N, 1, 8, 8) in [0, 1] drawn at places (N, 2), x and y in pixels from the middle: gray (N, 1, 32, 32)."""
    theta = torch.zeros(len(digits), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = SIDE / DIGIT
    theta[:, :, 2] = -places * (2 / DIGIT)
    grid = F.affine_grid(theta, [len(digits), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(digits, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def draw_clips(digits: Tensor, motions: Tensor) -> Tensor:
    """Clips (N, 3, 13, 32, 32) in [0, 1] of digits (N, 1, 8, 8), each in the motion of that number (N,)."""
    ways = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[motions]  # (N, 2)
    steps = torch.linspace(-WAY, WAY, FRAMES)
    places = ways[:, None] * steps[:, None]  # (N, F, 2)
    frames = draw(digits.repeat_interleave(FRAMES, 0), places.flatten(0, 1))  # (N·F, 1, 32, 32)
    return frames.unflatten(0, (len(digits), FRAMES)).transpose(1, 2).expand(-1, 3, -1, -1, -1)


def make_clips(out: Path, names: list[str], quick: bool, seed: int) -> None:
    """Write OUT/clips/{train,val}/: a film of each digit, and metadata.jsonl with its caption, "a three moving left"."""
    with written_whole(out / CLIPS) as folder:
        for split, numbers in split_digits(seed, quick).items():
            (folder / split).mkdir()
            digits, labels = digits_of(numbers)
            # How many digits of its class come before each, (N,).
            earlier = (F.one_hot(labels).cumsum(0) - 1).gather(1, labels[:, None]).squeeze(1)
            motions = earlier % len(MOTIONS)
            clips = (draw_clips(digits, motions) * 255).round().byte()  # (N, 3, F, H, W)
            pixels = clips.movedim(1, -1).numpy()
            lines = []
            for clip, label, which, number in zip(pixels, labels, motions, numbers, strict=True):
                motion = list(MOTIONS)[which]
                file = f"{number:04d}_{motion.split()[1]}.mp4"
                write_film(folder / split / file, clip, FPS)
                lines.append(json.dumps({"file_name": file, "text": f"a {names[label]} {motion}"}) + "\n")
            (folder / split / "metadata.jsonl").write_text("".join(lines))
