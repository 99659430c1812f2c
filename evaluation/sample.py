"""Draw the images or clips of a target from fixed seeds into a folder of their settings; only what is missing is drawn."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cache.dataset import latent_shape
from cache.manifest import read_manifest
from cache.text import TextReader, convert, read_text_manifest, text_digest
from common.device import compute_dtype
from common.errors import UserError
from common.files import write_json
from common.reading import JsonRecord, read_record
from common.sides import height_width, written
from configs.evaluation import Eval
from configs.schema import Config
from evaluation.image_files import ImageWriter, missing_images, watched, write_films
from evaluation.targets import Target
from method.sampler import (
    balanced_labels,
    forward_rows,
    forwards_per_image,
    guidance_plan,
    random_labels,
    sample_latents,
    set_steps,
)
from models.aligned import AlignedModel
from models.backbone import Backbone
from models.latents import DECODED_ROWS, decode_images
from models.pipeline_parts import SPACING, files_digest, weights_digest
from training.kernels import keep_compiled, searched_convolutions, to_channels_last
from training.network import output_of
from training.parts import family_for, load_run_model
from training.ranks import Ranks
from training.run_folder import this_command

MANIFEST = "manifest.json"


def image_recipe(target: Target, device: torch.device) -> dict:
    """The recipe of image i: every setting that changes an image, and none that does not."""
    config, given = target.config, target.settings
    text = read_text_manifest(config.data.text)
    family = family_for(config)
    guided, sampler = given.cfg > 1, sampler_of(given, family)
    network, trained = config.model, target.weights != "base"
    scale = network.lora_alpha / network.lora_rank if trained and network.train == "lora" else 1.0
    unusual = {"lora_scale": (scale, 1.0), "quantize": (network.quantize, "none")}
    return {
        "model": {
            "base": config.model.base,
            "revision": config.model.revision,
            "base_files": files_digest(config.model.base, family.part, config.model.revision),
            "step": target.step,
            "weights": target.weights,
            "weights_sha256": target.weights_sha256,
            "parameterization": output_of(config),
            # Only where they are unusual, so that samples of other runs keep their folders.
            **{name: value for name, (value, usual) in unusual.items() if value != usual},
        },
        "sampler": sampler,
        "steps": given.sampling_steps,
        "eta": given.eta if sampler == "ddim" else None,
        "timestep_spacing": SPACING,
        "cfg": given.cfg,
        "guidance_interval": [given.guidance_low, given.guidance_high] if guided else None,
        "guidance_space": given.guidance_space if guided else None,
        # Only of a family that is told it, so that samples of others keep their folders.
        **({} if family.guidance is None else {"guidance": family.guidance}),
        "vae": {
            "base": config.model.base,
            "files": files_digest(config.model.base, "vae", config.model.revision),
            "dtype": "float32",
            "rows": DECODED_ROWS,
        },
        "dtype": str(compute_dtype(device, given.precision)).removeprefix("torch."),
        "device": device.type,
        "rows": forward_rows(device, given.batch_size),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,  # they share out sums
        "compile": given.compile,
        "labels": given.labels,
        "classes": text["num_prompts"],
        "text_sha256": text_digest(text),
        "prompts": text["details"].get("template"),  # None of captions
        "seed": given.seed,
        "latent_shape": trained_latent_shape(config),
    } | clip_settings(config)


def protocol_of(target: Target, recipe: dict) -> dict:
    """What of a recipe two targets must share for their images to be compared: all but the model."""
    return {name: value for name, value in recipe.items() if name != "model"} | {"weights": target.asked}


def sample_folder(target: Target, recipe: dict) -> Path:
    """The folder of the images of a recipe: a readable name and the digest of it all."""
    interval = recipe["guidance_interval"]
    only = (
        ""
        if interval in (None, [0.0, 1.0])
        else f"-{recipe['guidance_space']}{interval[0]:g},{interval[1]:g}"
    )
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    name = f"step{target.step:07d}_{target.weights}_{recipe['sampler']}{recipe['steps']}_cfg{recipe['cfg']:g}{only}_{digest}"
    return target.run.path / "samples" / name


def noun_of(recipe: dict) -> str:
    """What is drawn by this recipe."""
    return "clips" if "frames" in recipe else "images"


def labels_of(recipe: dict, indices: Sequence[int]) -> list[int]:
    """The class that each of these images shows."""
    if recipe["labels"] == "random":
        return random_labels(indices, recipe["classes"], recipe["seed"])
    return balanced_labels(indices, recipe["classes"])


def evenly_spread(count: int, few: int) -> list[int]:
    """`few` of `count` classes, evenly spread; all where there are no more."""
    few = min(few, count)
    return [i * count // few for i in range(few)]


def draw_samples(
    target: Target,
    device: torch.device,
    indices: Sequence[int],
    ranks: Ranks,
    *,
    image_sampler: "ImageSampler | None" = None,
) -> tuple[Path, dict]:
    """Draw those of the images `indices` that are missing; returns their folder and their recipe.

    Of several processes each draws every n-th missing image. A training gives its `image_sampler`; without one, the target's
    weights are loaded if an image is missing.
    """
    recipe = image_recipe(target, device)
    folder = sample_folder(target, recipe)
    missing = ranks.on_main(lambda: find_missing(folder, recipe, indices))
    if missing:
        if ranks.main:
            print_cost(target, len(missing), noun_of(recipe))
        image_sampler = ImageSampler.load(target, device) if image_sampler is None else image_sampler
        ranks.on_main(lambda: claim_folder(folder, recipe, image_sampler.made_with()))
        own_indices, size = missing[ranks.rank :: ranks.world], recipe["rows"]
        parts = [own_indices[start : start + size] for start in range(0, len(own_indices), size)]
        done = len(indices) - len(missing)
        with ImageWriter(folder) as writer:
            for part in watched(parts, ranks, f"sample {target.name}", len(indices), done):
                seeds = [recipe["seed"] + i for i in part]
                writer.save(image_sampler.draw(labels_of(recipe, part), seeds), part)
        ranks.on_main(lambda: None)  # all have written theirs
    if "frames" in recipe:
        ranks.on_main(lambda: write_films(folder, indices, recipe["frames"], recipe["fps"]))
    return folder, recipe


def find_missing(folder: Path, recipe: dict, indices: Sequence[int]) -> list[int]:
    """Those of `indices` that must be drawn: all where no manifest says by which weights the images of a folder were drawn."""
    known = read_samples_manifest(folder, recipe)
    return missing_images(folder, indices) if known is not None else list(indices)


def print_cost(target: Target, count: int, noun: str) -> None:
    """Print how many forwards of the network it takes to draw `count` images or clips."""
    given, config = target.settings, target.config
    scheduler, spacing = solver_of(config, family_for(config))
    set_steps(scheduler, given.sampling_steps, spacing)
    interval = given.guidance_low, given.guidance_high
    each = forwards_per_image(guidance_plan(scheduler, given.cfg, *interval, given.guidance_space))
    sampler = sampler_of(given, family_for(config))
    tqdm.write(
        f"{target.name}: {count:,} {noun} to draw, {sampler} {given.sampling_steps} steps, guidance {given.cfg:g}: {each} "
        f"forwards of the network each, {each * count:,} in all"
    )


class SamplesManifest(JsonRecord):
    """manifest.json of a folder of samples."""

    settings: dict[str, Any]
    made_with: dict[str, str]
    command: str
    date: str
    versions: dict[str, str]


def claim_folder(folder: Path, recipe: dict, made_with: dict) -> None:
    """Write the manifest of a folder; raises `UserError` where its images were drawn by another recipe or weights."""
    if read_samples_manifest(folder, recipe, made_with) is not None:
        return
    date = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {package: version(package) for package in ("torch", "diffusers", "peft")}
    made = {"settings": recipe, "made_with": made_with, "command": this_command()}
    write_json(folder / MANIFEST, made | {"date": date, "versions": versions})


def read_samples_manifest(
    folder: Path, recipe: dict, made_with: dict | None = None
) -> SamplesManifest | None:
    """The manifest of a folder, or None; raises `UserError` where it is damaged, or where it has another recipe or weights."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    known = read_record(folder / MANIFEST, SamplesManifest, f"move {folder} away, it is drawn again")
    if known["settings"] != recipe or made_with not in (None, known["made_with"]):
        raise UserError(
            f"{folder} was drawn with other weights or settings than these (the base model's files have changed?): "
            "remove it, or put back what was there"
        )
    return known


class ImageSampler:
    """Draws images: holds the network, the decoder, the scheduler and the null prompt on their device.

    Args:
        model: in eval mode, in the dtype in which it computes.
        config: the run's, whose `eval` says how images are drawn.
        text: the prompts by label.
    """

    def __init__(self, model: AlignedModel, config: Config, text: TextReader):
        self.model, self.config = model, config
        self.device = next(model.backbone.parameters()).device
        self.codec = model.family.load_codec().to(self.device)
        self.scheduler, self.spacing = solver_of(config, model.family)
        self.text, self.null = text, convert(text.null, self.device, torch.float32)

    @classmethod
    def load(cls, target: Target, device: torch.device) -> "ImageSampler":
        """Load a target's weights."""
        config, given = target.config, target.settings
        dtype = compute_dtype(device, given.precision)
        model = load_run_model(target.run, target.step, device, weights=target.weights, dtype=dtype)
        if device.type == "cuda" and dtype == torch.bfloat16:
            to_channels_last(model.backbone)
        if given.compile:
            keep_compiled()
            model.backbone.compile(dynamic=False)  # in place: its name and its digest stay
        return cls(model, config, TextReader(config.data.text))

    def draw(self, labels: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        """Images of these classes from the noise of these seeds, uint8 `(n, H, W, 3)`, or clips `(n, F, H, W, 3)`."""
        given = self.config.eval
        how = given.model_dump(include={"cfg", "eta", "guidance_low", "guidance_high", "guidance_space"})
        how |= {"steps": given.sampling_steps, "rows": forward_rows(self.device, given.batch_size)}
        how |= {"shape": trained_latent_shape(self.config), "spacing": self.spacing}
        prompts = convert(self.text.fields_of(labels), self.device, torch.float32)  # {field: (n, …)}
        with searched_convolutions():  # every forward has the same rows
            latents = sample_latents(self.model.predict, self.scheduler, prompts, self.null, seeds, **how)
            return decode_images(self.codec, latents)

    def made_with(self) -> dict:
        """Digests of the weights in memory, in the dtype in which they compute."""
        network, vae = weights_digest(self.model.backbone), weights_digest(self.codec.vae)
        return {"network_sha256": network, "vae_sha256": vae}


def solver_of(config: Config, family: Backbone) -> tuple[object, dict]:
    """The scheduler by which a run's settings draw, and the further arguments of `set_steps`."""
    shape, steps = trained_latent_shape(config), config.eval.sampling_steps
    sampler = sampler_of(config.eval, family)
    scheduler = family.sampling_scheduler(output_of(config), sampler, steps, shape)
    return scheduler, family.spacing(shape, steps, sampler)


def sampler_of(given: Eval, family: Backbone) -> str:
    """The sampler that these settings choose; raises `UserError` where it cannot do what they ask for."""
    sampler = family.sampler_of(given.sampler)
    if given.eta and sampler != "ddim":
        raise UserError(f"eval.eta is DDIM's, and {family.name} is sampled by {sampler}: set eval.eta=0")
    return sampler


def clip_settings(config: Config) -> dict:
    """`frames` and `fps` of the clips that a run was trained on; nothing of images.

    Raises `UserError` where a clip has more pixels than PIL reads of one PNG.
    """
    view = read_manifest(config.data.latents, "latents")["view"]
    if view.get("frames", 1) * math.prod(height_width(view["size"])) > 2 * (
        Image.MAX_IMAGE_PIXELS or math.inf
    ):
        raise UserError(
            f"clips of {view['frames']} frames of {written(view['size'])} px are too large to be kept as one picture each: "
            "train on shorter or smaller ones"
        )
    return {key: view[key] for key in ("frames", "fps") if key in view}


def trained_latent_shape(config: Config) -> list[int]:
    """`(C, h, w)` of the latents that a run was trained on, of clips `(C, f, h, w)`."""
    manifest = read_manifest(config.data.latents, "latents")
    return list(latent_shape(manifest["shape"], manifest["details"]))
