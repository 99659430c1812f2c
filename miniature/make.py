"""Build the parts of the demo's folder: images and small models. A part is made once and never left half-written.

The heavy libraries are imported inside the functions, so that a finished demo is recognised without a delay. The
models and their trainings are in `miniature/models.py` and `miniature/selfdistilled.py`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired

from common.errors import UserError
from common.files import write_json, written_whole
from common.reading import JsonRecord
from miniature import make_moving
from miniature.digits import CLASS_NAMES, IMAGES, TURNED, load_images

if TYPE_CHECKING:
    from transformers import Dinov2Model

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
DIGITS = "sd3-digits"


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


def make_classifier(out: Path, folder: Path, steps: dict[str, int], kind: str = IMAGES) -> dict[str, float]:
    """Save the ResNet that judges generated images; it shares neither architecture nor seed with the teacher."""
    from miniature import models as small

    images, labels = load_images(out, "train", kind)
    classifier = small.train_classifier(images, labels, CLASS_NAMES, steps["classifier"])
    classifier.save_pretrained(folder)
    small.write_preprocessor(folder, small.CLASSIFIER_MEAN, small.CLASSIFIER_STD)
    return {"classifier_accuracy": small.measure_accuracy(classifier, *load_images(out, "val", kind))}


def make_judge_of_turned(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the judge of turned digits, and measure what the teacher, which has not seen any, knows of them."""
    from transformers import Dinov2Model

    from miniature import models as small

    measures = make_classifier(out, folder, steps, TURNED)
    teacher = Dinov2Model.from_pretrained(out / "models/dinov2-mini").eval()
    shown = (load_images(out, split, TURNED) for split in ("train", "val"))
    known = [(small.teacher_tokens(teacher, images), labels) for images, labels in shown]
    return measures | {"teacher_probe_on_turned": small.measure_linear_probe(*known)}


def make_mmdit(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save a Stable Diffusion 3 folder of the miniature's trained parts and an untrained MMDiT."""
    from miniature.mmdit import save_mmdit

    save_mmdit(out / "models/sd15-mini", folder)
    return {}


# The order follows the cost of the models, so that two processes finish at about the same time.
MODELS: dict[str, Callable[[Path, Path, dict[str, int]], dict[str, float]]] = {
    "dinov2-mini": make_teacher,
    "sd15-mini": make_stable_diffusion,
    "classifier": make_classifier,
    "dinov2-selfdistilled": make_self_distilled,  # behind the others, which keep their position: it decides the seed
    DIGITS: make_mmdit,
    "classifier-turned": make_judge_of_turned,
}
DERIVED = tuple(MODELS)[4:]  # of other models' parts, or measured with them, and so made after them
OPTIONAL = ("dinov2-selfdistilled", *DERIVED)  # made on request only


def make_family(out: Path, folder: Path, steps: dict[str, int]) -> dict[str, float]:
    """Save the tiny pipeline of random weights of the family that `folder` names."""
    from miniature.families import make_pipeline

    make_pipeline(family_in(folder.name), folder)
    return {}


def family_in(name: str) -> str:
    """The family of a model's name, such as sdxl of sdxl-mini; a folder in the making may have a suffix."""
    return name.strip(".").partition("-")[0]


def wanted(
    out: Path, asked: Sequence[str] = (), family: str | None = None, moving: bool = False
) -> list[str]:
    """Return the names of the models for `out`; an optional one is included if it is asked for or already there."""
    if moving:
        return list(make_moving.MODELS)
    if family is not None:
        return ["dinov2-mini", "classifier", f"{family}-mini"]
    return [n for n in MODELS if n not in OPTIONAL or n in asked or (out / "models" / n).is_dir()]


def floors_of(name: str, *, own: bool = True) -> dict[str, float]:
    """Return the floors that a model's measures must reach; without its `own`, those of all that are made with it."""
    shared = make_moving.FLOORS if name in make_moving.MODELS else FLOORS
    return {**shared, **(OWN_FLOORS.get(name, {}) if own else {})}


class Settings(JsonRecord):
    """demo.json: what decides the content of the folder."""

    seed: int
    quick: bool
    family: NotRequired[str]
    moving: NotRequired[bool]


class Quality(Settings):
    """models/quality.json: the measures of each model, and the floors that they reach."""

    floors_enforced: bool
    floors: dict[str, float]
    own_floors: NotRequired[dict[str, dict[str, float]]]
    models: dict[str, dict[str, float]]


def place_of(name: str) -> int:
    """Return what tells the seeds of the models of one folder apart."""
    for first, models in ((0, MODELS), (5, make_moving.MODELS)):
        if name in models:
            return first + list(models).index(name)
    return 4


def make_model(name: str, out: Path, quick: bool, seed: int) -> dict[str, float]:
    """Build one of the models in `out/models/name`, with its `quality.json`, and return its measures and seconds.

    Raises UserError when a measure misses its floor, and then leaves no files. `quick` ignores the floors.
    """
    from miniature.models import reproducible

    started = time.perf_counter()
    # Each model has its own seed, because the teacher and the classifier that judges must be independent.
    random, made = reproducible(100 * seed + place_of(name)), MODELS | make_moving.MODELS
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
