"""The images of the demo: scikit-learn's handwritten digits in ImageNet's layout, with captions, and changed."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.files import written_whole

if TYPE_CHECKING:
    from torch import Tensor

CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SYNSETS = [f"n{digit:08d}" for digit in range(10)]  # they look like WordNet ids and sort in class order
HEIGHT, WIDTH = 32, 40  # not square, so that the centre crop of the scripts has something to cut
IMAGES, CAPTIONED = "ILSVRC", "captioned"
TURNED = "turned"  # the same digits, turned by a quarter to the left
CAPTIONED_COUNT = 64


def make_images(out: Path, quick: bool, seed: int, kind: str = IMAGES) -> None:
    """Write scikit-learn's 1797 handwritten digits as JPEG files in ImageNet's layout, 80 % train and 20 % val.

    The split depends on the seed and keeps the shares of the classes. `quick` keeps twelve images per class and split. `kind`
    is the folder, `ILSVRC` or `TURNED`.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    splits = train_test_split(indices, test_size=0.2, stratify=digits.target, random_state=seed)
    with written_whole(out / kind) as folder:
        for split, indices in zip(("train", "val"), splits, strict=True):
            for label, synset in enumerate(SYNSETS):
                target = folder / "Data" / "CLS-LOC" / split / synset
                target.mkdir(parents=True)
                of_class = sorted(int(i) for i in indices if digits.target[i] == label)
                for index in of_class[:12] if quick else of_class:
                    pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)  # (8, 8)
                    digit = Image.fromarray(pixels).resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
                    if kind == TURNED:
                        digit = digit.transpose(Image.Transpose.ROTATE_90)
                    canvas = Image.new("RGB", (WIDTH, HEIGHT))
                    canvas.paste(digit.convert("RGB"), ((WIDTH - HEIGHT) // 2, 0))
                    canvas.save(target / f"{synset}_{index}.JPEG", quality=95)


def make_captioned(out: Path, seed: int) -> None:
    """Write `CAPTIONED_COUNT` of the digits, thin and bold, as PNG files with their captions in metadata.jsonl."""
    import json

    import numpy as np
    from PIL import Image, ImageFilter
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.random.default_rng(seed).permutation(len(digits.target))[:CAPTIONED_COUNT]
    with written_whole(out / CAPTIONED) as folder:
        lines = []
        for number, index in enumerate(chosen):
            pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)  # (8, 8)
            digit = Image.fromarray(pixels).resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
            weight = ("thin", "bold")[number % 2]
            if weight == "bold":
                digit = digit.filter(ImageFilter.MaxFilter(5))
            digit.convert("RGB").save(folder / f"{number:03d}.png")
            text = f"a handwritten {CLASS_NAMES[digits.target[index]]}, {weight}"
            lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": text}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))


def load_images(out: Path, split: str, kind: str = IMAGES) -> tuple["Tensor", "Tensor"]:
    """Return a split's centre-cropped images (N, 3, 32, 32) in [0, 1] and labels (N,), read from the JPEG files."""
    import numpy as np
    import torch
    from PIL import Image

    files = sorted((out / kind / "Data" / "CLS-LOC" / split).glob("*/*.JPEG"))
    left = (WIDTH - HEIGHT) // 2
    centre = (left, 0, left + HEIGHT, HEIGHT)
    pixels = np.stack([np.asarray(Image.open(file).crop(centre)) for file in files])  # (N, 32, 32, 3)
    labels = torch.tensor([SYNSETS.index(file.parent.name) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, labels
