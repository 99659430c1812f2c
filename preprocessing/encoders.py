"""The encoders of scripts 2 and 3, which turn pixels into latents and tokens, and the specifications of their values."""

import hashlib
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cache.encodings import GROUP
from cache.manifest import FieldSpec
from common.device import autocast, compute_dtype, pick_device
from common.errors import UserError
from common.sides import as_kept, covers, height_width, same_aspect, written
from models.families.table import family_of
from models.pipeline_parts import weights_digest
from models.teachers.dinov2 import DINOv2Encoder
from preprocessing.options import part_of
from preprocessing.pipeline import FieldJob, encode_fields, read_images_to_encode

MEANING = {
    "mode": "mode of the VAE's posterior",
    "sample": "a sample of the VAE's posterior, drawn from a generator seeded by the image's id",
    "moments": "mean and standard deviation of the VAE's posterior, one above the other",
}


def encode_images(args: Namespace, *, latents: Path | None = None, tokens: Path | None = None) -> None:
    """Encode every image of the list into each folder that is given; `args` is the command line of script 2 or 3."""
    samples = read_images_to_encode(args.csv)
    folders = ((latent_job, latents), (token_job, tokens))
    jobs, part = [job(args, folder) for job, folder in folders if folder is not None], part_of(args)
    encode_fields(
        samples, jobs, batch_size=args.batch_size, workers=args.workers, part=part, shard_size=args.shard_size
    )


def latent_job(args: Namespace, folder: Path) -> FieldJob:
    """Return the job that makes latents `(C, h, w)`, or moments `(2C, h, w)`, with the base model's VAE.

    `args` has the options of `add_latent_options`.
    """
    device, posterior, family = pick_device(args.device), args.posterior, family_of(args.base, args.revision)
    codec = family.load_codec().to(device)
    size = args.size or args.image_size or family.image_size(codec)
    sides, steps = height_width(size), [codec.down * patch for patch in family.patch[-2:]]
    if any(side % step for side, step in zip(sides, steps, strict=True)):
        parts = "the VAE's down-sampling" + (" times the network's patch" if max(family.patch) > 1 else "")
        option = "--image-size" if args.size is None else "--size"
        raise UserError(f"{option} {written(size)} is not a multiple of {max(steps)}, {parts}")
    cells = [side // codec.down for side in sides]

    @torch.no_grad()
    def encode(pixels: Tensor, ids: Sequence[str]) -> Tensor:
        images = pixels.to(device, non_blocking=True).float() / 127.5 - 1  # (n, 3, H, W) in [-1, 1]
        with autocast(device, args.precision):
            mean, std = codec.posterior(images)  # (n, C, h, w) each
        if posterior == "sample":
            mean = mean + std * torch.stack([noise_of(key, mean.shape[1:]) for key in ids]).to(device)
        if not args.unscaled:
            mean, std = codec.normalise(mean), codec.normalise_spread(std)
        return torch.cat([mean, std], dim=1) if posterior == "moments" else mean

    spec = FieldSpec(
        field="latents",
        shape=(codec.channels * (2 if posterior == "moments" else 1), *cells),
        dtype=args.dtype,
        meaning=MEANING[posterior] + ("" if args.unscaled else ", times scaling_factor"),
        source=source_of(args.base, args.revision, codec.vae, device, args.precision),
        view={"kind": "aligned", "size": size},
        details={"posterior": posterior, "scaled": not args.unscaled}
        | codec.normalisation
        | ({"size_and_crop": True} if family.image_conditions else {}),
    )
    return FieldJob(folder, spec, encode, device)


def token_job(args: Namespace, folder: Path) -> FieldJob:
    """Return the job that makes L2-normalised DINOv2 patch tokens `(N, D)` from the options of `add_teacher_options`.

    `args.size` is that of the latents, whose crop the teacher sees.
    """
    device, size = pick_device(args.device), args.teacher_image_size
    teacher = DINOv2Encoder.from_pretrained(args.teacher, args.grid, args.teacher_revision).to(device)
    patch = teacher.model.config.patch_size
    if size is not None:
        below = [side // patch * patch for side in height_width(size)]
        if below != [*height_width(size)]:
            use = f"use {written(as_kept(*below))} or {written(as_kept(*(side + patch for side in below)))}"
            raise UserError(f"image size {written(size)} is not a multiple of the patch {patch}: {use}")
        grid = as_kept(*(side // patch for side in below))
        teacher = DINOv2Encoder(teacher.model, grid, teacher.format).to(device)
    crop = teacher.size if args.size is None else args.size
    if math.prod(height_width(teacher.grid)) < 2:
        raise UserError("one token per image cannot be aligned spatially: use --grid 2 or more")
    if not covers(teacher.grid, crop):
        raise UserError(
            f"a grid of {written(teacher.grid)} has not the shape of --size {written(crop)}: give a --grid whose cells are "
            "about as wide as they are high"
        )
    if args.view == "official" and not same_aspect(crop, 1):
        raise UserError("--view official is of squares: use aligned")
    if args.teacher_dtype == "int8" and teacher.dim % GROUP:
        needed = f"int8 needs a width that is a multiple of {GROUP}"
        raise UserError(f"{needed}, the teacher's is {teacher.dim}: use float16")

    @torch.no_grad()
    def encode(pixels: Tensor, _ids: Sequence[str]) -> Tensor:
        with autocast(device, args.precision):
            tokens = teacher(pixels.to(device, non_blocking=True).float() / 255)  # (n, N, D)
        return nn.functional.normalize(tokens.float(), dim=-1)

    source = source_of(args.teacher, args.teacher_revision, teacher.model, device, args.precision)
    source |= {"implementation": teacher.implementation, "position_embeddings": teacher.resampling}
    spec = FieldSpec(
        field="tokens",
        shape=(math.prod(height_width(teacher.grid)), teacher.dim),
        dtype=args.teacher_dtype,
        meaning="L2-normalised DINOv2 patch tokens after the final LayerNorm, row by row",
        source=source | {"format": teacher.format},
        view={"kind": args.view, "size": teacher.size, "patch": patch, "grid": teacher.grid}
        | ({} if same_aspect(crop, teacher.size) else {"crop": height_width(crop)}),
    )
    return FieldJob(folder, spec, encode, device)


def source_of(model: str, revision: str | None, module: nn.Module, device: torch.device, wanted: str) -> dict:
    """Describe the weights of a field and the precision that `autocast(device, wanted)` computes in, for its `source`."""
    precision = "bf16" if compute_dtype(device, wanted) == torch.bfloat16 else "fp32"
    weights = {"model": model, "revision": revision, "weights_sha256": weights_digest(module)}
    return weights | {"precision": precision}


def noise_of(key: str, shape: Sequence[int]) -> Tensor:
    """Return normal noise that depends only on an image's id, so that neither batches nor interruptions change a cache."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
