"""The encoders of scripts 2 and 3, which turn pixels into latents and tokens, and the specifications of their values."""

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cache.encodings import GROUP
from cache.manifest import FieldSpec
from common.device import autocast, compute_dtype, pick_device
from common.errors import UserError
from models.families.table import family_of
from models.pipeline_parts import weights_digest
from models.teachers.table import load_teacher
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
    size = args.image_size or family.image_size(codec)
    if size % codec.down:
        raise UserError(f"--image-size {size} is not a multiple of {codec.down}, the VAE's down-sampling")
    cells = size // codec.down

    @torch.no_grad()
    def encode(pixels: Tensor, ids: Sequence[str]) -> Tensor:
        images = pixels.to(device, non_blocking=True).float() / 127.5 - 1  # (n, 3, S, S) in [-1, 1]
        with autocast(device, args.precision):
            mean, std = codec.posterior(images)  # (n, C, h, w) each
        if posterior == "sample":
            mean = mean + std * torch.stack([noise_of(key, mean.shape[1:]) for key in ids]).to(device)
        if not args.unscaled:
            mean, std = codec.normalise(mean), codec.normalise_spread(std)
        return torch.cat([mean, std], dim=1) if posterior == "moments" else mean

    spec = FieldSpec(
        field="latents",
        shape=(codec.channels * (2 if posterior == "moments" else 1), cells, cells),
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
    """Return the job that makes L2-normalised patch tokens `(grid², D)` from the options of `add_teacher_options`."""
    device, size = pick_device(args.device), args.teacher_image_size
    teacher = load_teacher(args.teacher, args.grid, args.teacher_revision).to(device)
    if args.view not in teacher.views:
        raise UserError(
            f"--view {args.view} is DINOv2's transform, and {args.teacher} is a {teacher.name}: use aligned"
        )
    patch = teacher.patch
    if size is not None:
        below = size // patch * patch
        if size != below:
            use = f"use {below} or {below + patch}"
            raise UserError(f"image size {size} is not a multiple of the patch {patch}: {use}")
        teacher.grid = size // patch
    if teacher.grid < 2:
        raise UserError("one token per image cannot be aligned spatially: use --grid 2 or more")
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
        shape=(teacher.grid**2, teacher.dim),
        dtype=args.teacher_dtype,
        meaning=f"L2-normalised {teacher.name} patch tokens after the final LayerNorm, row by row",
        source=source | {"format": teacher.format} | teacher.normalisation,
        view={"kind": args.view, "size": teacher.size, "patch": patch, "grid": teacher.grid},
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
