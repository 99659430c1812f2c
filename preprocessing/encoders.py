"""The encoders of scripts 2 and 3, which turn pixels into latents and tokens, and the specifications of their values."""

import hashlib
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cache.encodings import GROUP
from cache.image_list import clip_shape
from cache.manifest import FieldSpec
from common.device import autocast, compute_dtype, pick_device
from common.errors import UserError
from common.sides import as_kept, covers, height_width, same_aspect, written
from models.families.table import family_of
from models.pipeline_parts import weights_digest
from models.teachers.table import load_teacher
from preprocessing.options import part_of
from preprocessing.pipeline import FieldJob, encode_fields, read_images_to_encode

IMAGES_AT_ONCE = 64
MEANING = {
    "mode": "mode of the VAE's posterior",
    "sample": "a sample of the VAE's posterior, drawn from a generator seeded by the image's id",
    "moments": "mean and standard deviation of the VAE's posterior, one above the other",
}


def encode_images(args: Namespace, *, latents: Path | None = None, tokens: Path | None = None) -> None:
    """Encode every image of the list into each folder that is given; `args` is the command line of script 2 or 3."""
    samples, jobs = read_images_to_encode(args.csv), []
    clip = clip_shape(samples)
    if latents is not None:
        jobs.append(latent_job(args, latents, clip))
    if tokens is not None:
        per_latent = getattr(args, "frames_per_latent", None)  # script 3's option
        if jobs and clip is not None and clip[0] > 1:
            per_latent = (clip[0] - 1) // (jobs[0].spec.shape[1] - 1)
        jobs.append(token_job(args, tokens, clip, per_latent or 1))
    batch_size = args.batch_size or (IMAGES_AT_ONCE if clip is None else 1)
    encode_fields(
        samples, jobs, batch_size=batch_size, workers=args.workers, part=part_of(args), shard_size=args.shard_size
    )  # fmt: skip


def latent_job(args: Namespace, folder: Path, clip: tuple[int, float] | None = None) -> FieldJob:
    """Return the job that makes latents `(C, h, w)`, or moments `(2C, h, w)`, with the base model's VAE.

    Those of a `clip`, frames and fps, are `(C, f, h, w)`. `args` has the options of `add_latent_options`.
    """
    device, kept, family = pick_device(args.device), args.posterior, family_of(args.base, args.revision)
    codec = family.load_codec().to(device)
    if (clip is None) != (codec.frames == 1):
        listed, wanted, option = (
            ("images", "clips", "videos") if clip is None else ("clips", "images", "images")
        )
        raise UserError(
            f"{args.csv} lists {listed} and {family.name} is trained on {wanted}: make a list with script 1 and --{option}"
        )
    size = args.size or args.image_size or family.image_size(codec)
    sides, steps = height_width(size), [codec.down * patch for patch in family.patch[-2:]]
    if any(side % step for side, step in zip(sides, steps, strict=True)):
        parts = "the VAE's down-sampling" + (" times the network's patch" if max(family.patch) > 1 else "")
        option = "--image-size" if args.size is None else "--size"
        raise UserError(f"{option} {written(size)} is not a multiple of {max(steps)}, {parts}")
    cells = [side // codec.down for side in sides]
    times = () if clip is None else (latent_frames(clip[0], codec.frames),)

    @torch.no_grad()
    def posterior(pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels.to(device, non_blocking=True).float() / 127.5 - 1  # (n, [F,] 3, H, W) in [-1, 1]
        with autocast(device, args.precision):
            return codec.posterior(images.movedim(-3, 1))  # (n, C, [f,] h, w) each

    def encode(pixels: Tensor, ids: Sequence[str]) -> Tensor:
        # Clips are encoded one by one, because a VAE's activations of one are large.
        parts = [posterior(part) for part in pixels.split(len(pixels) if clip is None else 1)]
        mean, std = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
        if kept == "sample":
            mean = mean + std * torch.stack([noise_of(key, mean.shape[1:]) for key in ids]).to(device)
        if not args.unscaled:
            mean, std = codec.normalise(mean), codec.normalise_spread(std)
        return torch.cat([mean, std], dim=1) if kept == "moments" else mean

    spec = FieldSpec(
        field="latents",
        shape=(codec.channels * (2 if kept == "moments" else 1), *times, *cells),
        dtype=args.dtype,
        meaning=MEANING[kept] + ("" if args.unscaled else ", times scaling_factor"),
        source=source_of(args.base, args.revision, codec.vae, device, args.precision),
        view={"kind": "aligned", "size": size} | clip_view(clip),
        details={"posterior": kept, "scaled": not args.unscaled}
        | codec.normalisation
        | ({"size_and_crop": True} if family.image_conditions else {}),
    )
    return FieldJob(folder, spec, encode, device)


def token_job(
    args: Namespace, folder: Path, clip: tuple[int, float] | None = None, per_latent: int = 1
) -> FieldJob:
    """Return the job that makes L2-normalised patch tokens `(N, D)` from the options of `add_teacher_options`.

    `args.size` is that of the latents, whose crop the teacher sees. Those of a `clip`, frames and fps, are `(f · N, D)`: of
    each latent frame, which is made of `per_latent` frames.
    """
    device, size = pick_device(args.device), args.teacher_image_size
    teacher = load_teacher(args.teacher, args.grid, args.teacher_revision).to(device)
    if args.view not in teacher.views:
        raise UserError(
            f"--view {args.view} is DINOv2's transform, and {args.teacher} is a {teacher.name}: use aligned"
        )
    patch = teacher.patch
    if size is not None:
        below = [side // patch * patch for side in height_width(size)]
        if below != [*height_width(size)]:
            use = f"use {written(as_kept(*below))} or {written(as_kept(*(side + patch for side in below)))}"
            raise UserError(f"image size {written(size)} is not a multiple of the patch {patch}: {use}")
        teacher.grid = as_kept(*(side // patch for side in below))
    crop, cells = teacher.size if args.size is None else args.size, math.prod(height_width(teacher.grid))
    if cells < 2:
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
    def tokens_of(pixels: Tensor) -> Tensor:
        with autocast(device, args.precision):
            tokens = teacher(pixels.to(device, non_blocking=True).float() / 255)  # (n, N, D)
        return nn.functional.normalize(tokens.float(), dim=-1)

    groups, pick = None, args.frames_of_teacher
    if clip is not None:
        groups = frames_of_latents(clip[0], per_latent, pick)

    def encode(pixels: Tensor, _ids: Sequence[str]) -> Tensor:
        return tokens_of(pixels) if groups is None else tokens_of_clips(pixels, groups, tokens_of)

    source = source_of(args.teacher, args.teacher_revision, teacher.model, device, args.precision)
    source |= {"implementation": teacher.implementation, "position_embeddings": teacher.resampling}
    spec = FieldSpec(
        field="tokens",
        shape=((1 if groups is None else len(groups)) * cells, teacher.dim),
        dtype=args.teacher_dtype,
        meaning=f"L2-normalised {teacher.name} patch tokens after the final LayerNorm, row by row",
        source=source | {"format": teacher.format} | teacher.normalisation,
        view={"kind": args.view, "size": teacher.size, "patch": patch, "grid": teacher.grid}
        | ({} if same_aspect(crop, teacher.size) else {"crop": height_width(crop)})
        | clip_view(clip)
        | ({} if groups is None else {"latent_frames": len(groups), "frames_of_teacher": pick}),
    )
    return FieldJob(folder, spec, encode, device)


def clip_view(clip: tuple[int, float] | None) -> dict[str, int | float]:
    """Describe the moments that a model saw, for the `view` of a field; nothing of images."""
    return {} if clip is None else {"frames": clip[0], "fps": clip[1]}


def latent_frames(frames: int, per_latent: int) -> int:
    """Return how many latent frames a video VAE makes: one of the first frame, one of each `per_latent` others."""
    below = (frames - 1) // per_latent * per_latent + 1
    if frames != below:
        raise UserError(
            f"clips of {frames} frames are not {per_latent} k + 1, as the VAE needs: list clips of {below} or "
            f"{below + per_latent} with script 1"
        )
    return (frames - 1) // per_latent + 1


def frames_of_latents(frames: int, per_latent: int, pick: str) -> list[list[int]]:
    """Return the numbers of the frames that the teacher sees for each latent frame.

    The first latent frame is the first frame, and each other one is made of `per_latent` frames, of which the teacher sees the
    middle one, the later of two, or all of them.
    """
    latent_frames(frames, per_latent)
    groups = [list(range(start, start + per_latent)) for start in range(1, frames, per_latent)]
    return [[0], *(groups if pick == "mean" else ([group[per_latent // 2]] for group in groups))]


def tokens_of_clips(
    pixels: Tensor, groups: Sequence[Sequence[int]], tokens_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return L2-normalised tokens `(n, f·N, D)` of clips `(n, F, 3, H, W)`: of each group of frames the mean of its tokens."""
    seen = torch.tensor([number for group in groups for number in group])
    images = pixels[:, seen].flatten(0, 1)  # (n·m, 3, H, W)
    tokens = torch.cat([tokens_of(part) for part in images.split(IMAGES_AT_ONCE)])  # (n·m, N, D)
    tokens = tokens.unflatten(0, (len(pixels), len(seen)))
    frames = [
        part.mean(1) for part in tokens.split([len(group) for group in groups], dim=1)
    ]  # (n, N, D) each
    return nn.functional.normalize(torch.cat(frames, dim=1), dim=-1)


def source_of(model: str, revision: str | None, module: nn.Module, device: torch.device, wanted: str) -> dict:
    """Describe the weights of a field and the precision that `autocast(device, wanted)` computes in, for its `source`."""
    precision = "bf16" if compute_dtype(device, wanted) == torch.bfloat16 else "fp32"
    weights = {"model": model, "revision": revision, "weights_sha256": weights_digest(module)}
    return weights | {"precision": precision}


def noise_of(key: str, shape: Sequence[int]) -> Tensor:
    """Return normal noise that depends only on an image's id, so that neither batches nor interruptions change a cache."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
