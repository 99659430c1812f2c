"""Build the parts of the demo's folder: images and small models. A part is made once and never left half-written.

The heavy libraries are imported inside the functions, so that a finished demo is recognised without a delay. The
models and their trainings are in `miniature/models.py` and `miniature/selfdistilled.py`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import write_json, written_whole
from common.reading import RECORD
from miniature import make_moving

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Dinov2Model

CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SYNSETS = [f"n{digit:08d}" for digit in range(10)]  # they look like WordNet ids and sort in class order
HEIGHT, WIDTH = 32, 40  # not square, so that the centre crop of the scripts has something to cut
IMAGES, CAPTIONED = "ILSVRC", "captioned"
CAPTIONED_COUNT = 64
CLASSES = "imagenet_classes.json"
SETTINGS = "demo.json"
QUALITY = "models/quality.json"

# The least value that each measure must reach; higher is better. Measures without a floor are only reported.
FLOORS = {
    "vae_psnr_db": 30.0,
    "prompt_separation": 0.5,  # 1 - the largest cosine between two classes' prompts
    "teacher_linear_probe": 0.95,
    "classifier_accuracy": 0.97,
}
# Floors that apply to one model instead of those above.
OWN_FLOORS = {"dinov2-selfdistilled": {"teacher_linear_probe": 0.9, "teacher_effective_rank": 10.0}}

# Training steps of each model by `quick`; the numbers for the full demo were chosen by measurement.
STEPS = {
    False: {"vae": 300, "text": 150, "teacher": 800, "classifier": 200, "selfdistilled": 1500},
    True: {"vae": 3, "text": 5, "teacher": 3, "classifier": 3, "selfdistilled": 3},
}


def make_images(out: Path, quick: bool, seed: int) -> None:
    """Write scikit-learn's 1797 handwritten digits as JPEG files in ImageNet's layout, 80 % train and 20 % val.

    The split depends on the seed and keeps the shares of the classes. `quick` keeps twelve images per class and split.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    splits = train_test_split(indices, test_size=0.2, stratify=digits.target, random_state=seed)
    with written_whole(out / IMAGES) as folder:
        for split, indices in zip(("train", "val"), splits, strict=True):
            for label, synset in enumerate(SYNSETS):
                target = folder / "Data" / "CLS-LOC" / split / synset
                target.mkdir(parents=True)
                of_class = sorted(int(i) for i in indices if digits.target[i] == label)
                for index in of_class[:12] if quick else of_class:
                    pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)  # (8, 8)
                    digit = Image.fromarray(pixels).resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC)
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


def load_images(out: Path, split: str) -> tuple["Tensor", "Tensor"]:
    """Return a split's centre-cropped images (N, 3, 32, 32) in [0, 1] and labels (N,), read from the JPEG files."""
    import numpy as np
    import torch
    from PIL import Image

    files = sorted((out / IMAGES / "Data" / "CLS-LOC" / split).glob("*/*.JPEG"))
    left = (WIDTH - HEIGHT) // 2
    centre = (left, 0, left + HEIGHT, HEIGHT)
    pixels = np.stack([np.asarray(Image.open(file).crop(centre)) for file in files])  # (N, 32, 32, 3)
    labels = torch.tensor([SYNSETS.index(file.parent.name) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, labels


def make_stable_diffusion(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save a Stable Diffusion folder with a trained autoencoder, a trained text encoder and an untrained U-Net."""
    from diffusers import StableDiffusionPipeline

    from miniature import models as small

    images, _ = load_images(out, "train")
    held_out, _ = load_images(out, "val")
    vae = small.train_vae(images, steps["vae"])
    tokenizer = small.build_tokenizer(CLASS_NAMES)
    text_encoder = small.train_text_encoder(tokenizer, CLASS_NAMES, steps["text"])
    unet, scheduler = small.build_unet(text_encoder.config.hidden_size), small.build_scheduler()
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    # vocab.json and merges.txt, which other tools read
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    return {
        "vae_psnr_db": small.measure_psnr(vae, held_out),
        "scaled_latent_std": (small.encode(vae, held_out) * vae.config.scaling_factor).std().item(),
        "prompt_separation": 1 - small.measure_prompt_cosine(tokenizer, text_encoder, CLASS_NAMES),
    }


def make_teacher(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the teacher, a DINOv2 that makes 4x4 patch tokens of an image of 32 px."""
    from miniature.models import train_teacher

    return _save_teacher(train_teacher(*load_images(out, "train"), steps["teacher"]), out, folder)


def make_self_distilled(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the second teacher: the first's architecture, trained without labels; these only measure its quality."""
    from miniature import selfdistilled as distilled

    teacher = distilled.train_self_distilled(load_images(out, "train")[0], steps["selfdistilled"])
    return _save_teacher(teacher, out, folder)


def _save_teacher(teacher: "Dinov2Model", out: Path, folder: Path) -> dict[str, float]:
    from miniature import models as small
    from miniature import selfdistilled as distilled

    teacher.save_pretrained(folder)
    small.write_preprocessor(folder, small.IMAGENET_MEAN, small.IMAGENET_STD)
    (images, labels), (held_out, held_out_labels) = load_images(out, "train"), load_images(out, "val")
    known, tokens = small.teacher_tokens(teacher, images), small.teacher_tokens(teacher, held_out)
    return {
        "teacher_linear_probe": small.measure_linear_probe((known, labels), (tokens, held_out_labels)),
        "teacher_token_cosine": small.measure_token_cosine(tokens),
        "teacher_spatial_detail": distilled.measure_spatial_detail((known, images), (tokens, held_out)),
        "teacher_effective_rank": distilled.measure_effective_rank(tokens.mean(1)),
        "teacher_detail_share": distilled.measure_detail_share(tokens),
    }


def make_classifier(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the ResNet that judges generated images; it shares neither architecture nor seed with the teacher."""
    from miniature import models as small

    images, labels = load_images(out, "train")
    classifier = small.train_classifier(images, labels, CLASS_NAMES, steps["classifier"])
    classifier.save_pretrained(folder)
    small.write_preprocessor(folder, small.CLASSIFIER_MEAN, small.CLASSIFIER_STD)
    return {"classifier_accuracy": small.measure_accuracy(classifier, *load_images(out, "val"))}


# The order follows the cost of the models, so that two processes finish at about the same time.
MODELS: dict[str, Callable[[Path, Path, dict[str, int]], dict[str, float]]] = {
    "dinov2-mini": make_teacher,
    "sd15-mini": make_stable_diffusion,
    "classifier": make_classifier,
    "dinov2-selfdistilled": make_self_distilled,  # last, so that the others keep their position, which decides their seed
}
OPTIONAL = ("dinov2-selfdistilled",)  # made on request only


def make_family(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the tiny pipeline of random weights of the family that `folder` names."""
    from miniature.families import make_pipeline

    make_pipeline(family_in(folder.name), folder)
    return {}


def family_in(name: str) -> str:
    """The family of a model's name, such as sdxl of sdxl-mini; a folder in the making may have a suffix."""
    return name.strip(".").partition("-")[0]


def wanted(out: Path, self_distilled: bool, family: str | None = None, moving: bool = False) -> list[str]:
    """Return the names of the models for `out`; an optional one is included if it is requested or already there."""
    if moving:
        return list(make_moving.MODELS)
    if family is not None:
        return ["dinov2-mini", "classifier", f"{family}-mini"]
    return [n for n in MODELS if n not in OPTIONAL or self_distilled or (out / "models" / n).is_dir()]


def floors_of(name: str, *, own: bool = True) -> dict[str, float]:
    """Return the floors that a model's measures must reach; without its `own`, those of all that are made with it."""
    shared = make_moving.FLOORS if name in make_moving.MODELS else FLOORS
    return {**shared, **(OWN_FLOORS.get(name, {}) if own else {})}


@with_config(RECORD)
class Settings(TypedDict):
    """demo.json: what decides the content of the folder."""

    seed: int
    quick: bool
    family: NotRequired[str]
    moving: NotRequired[bool]


@with_config(RECORD)
class Quality(Settings):
    """models/quality.json: the measures of each model, and the floors that they reach."""

    floors_enforced: bool
    floors: dict[str, float]
    own_floors: NotRequired[dict[str, dict[str, float]]]
    models: dict[str, dict[str, float]]


def make_model(name: str, out: Path, quick: bool, seed: int) -> dict[str, float]:
    """Build one of the models in `out/models/name`, with its `quality.json`, and return its measures and seconds.

    Raises UserError when a measure misses its floor, and then leaves no files. `quick` ignores the floors.
    """
    from miniature.models import reproducible

    started = time.perf_counter()
    # Each model has its own seed, because the teacher and the classifier that judges must be independent.
    places, made = [*MODELS, "a family's", *make_moving.MODELS], MODELS | make_moving.MODELS
    random = reproducible(100 * seed + places.index(name if name in made else "a family's"))
    steps = make_moving.STEPS if name in make_moving.MODELS else STEPS
    with _quiet(), random, written_whole(out / "models" / name) as folder:
        measures = made.get(name, make_family)(out, folder, steps[quick])
        floors = floors_of(name)
        missed = {key: value for key, value in measures.items() if value < floors.get(key, value)}
        if missed and not quick:
            listed = ", ".join(f"{key} is {value:.3f}, floor {floors[key]}" for key, value in missed.items())
            raise UserError(f"models/{name}: {listed}; try another --seed (in another --out)")
        measures["seconds"] = round(time.perf_counter() - started, 1)
        write_json(folder / "quality.json", measures)
    return measures


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars that transformers shows even for files of 200 kB."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
