"""Command-line options that several preprocessing scripts share. The imports are light, so that `--help` is instant."""

import argparse
import os
from pathlib import Path

from common.arguments import SIDE, between, positive, sides
from common.base_model import BASE
from common.errors import UserError
from common.files import expand_home
from common.sides import GRID


def choice(*names: str) -> dict:
    """Return the arguments of an option that takes one of the names, the first by default."""
    return {"choices": list(names), "default": names[0]}


def add_encoding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that scripts 2 and 3 have in common."""
    add = parser.add_argument
    add("--csv", type=Path, required=True, help="images to encode: CSV of script 1")
    add("--out", type=Path, required=True, help="folder of this field; the same command resumes")
    add("--batch-size", type=between(1, 65_536), help="images per forward (default 64), or clips (default 1)")
    workers = (
        "processes that decode images (default: one for each core, 8 at most; here %(default)s; 0 = none)"
    )
    add("--workers", type=between(0, 1024), default=decoding_workers(), help=workers)
    precision = "of the encoder: auto (default) = bf16 on a GPU that has it, fp32 elsewhere"
    add("--precision", **choice("auto", "bf16", "fp32"), help=precision)
    add_shard_options(parser, "images in one file (default 10000, or what the folder has)")
    add_device_option(parser)


def add_shard_options(parser: argparse.ArgumentParser, size: str) -> None:
    """Add the options of a folder of shards; `size` explains --shard-size."""
    shard = (
        "write only every N-th shard, from the I-th on (I = 0 … N-1): one process for each GPU or machine, all with the "
        "same --out; torchrun and accelerate launch set it by themselves"
    )
    parser.add_argument("--shard", type=part, metavar="I/N", help=shard)
    parser.add_argument("--shard-size", type=positive, help=size)


def decoding_workers() -> int:
    """Return the number of cores for each rank of this machine, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, min(8, cores // int(ranks) if ranks.isdecimal() and int(ranks) else cores))


def part_of(args: argparse.Namespace) -> tuple[int, int]:
    """Return (i, n), of every n shards number i: --shard, else rank and world size of a launcher, else (0, 1), which is all."""
    if args.shard is not None:
        return args.shard
    rank = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    try:
        return part(rank)
    except argparse.ArgumentTypeError:
        todo = "unset both, or give --shard"
        raise UserError(f"RANK/WORLD_SIZE is {rank}, which no launcher sets: {todo}") from None


def add_latent_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the VAE and what is stored of its posterior."""
    add_base_options(parser)
    add, size = parser.add_argument, parser.add_mutually_exclusive_group()
    square = "side of the square in pixels (default: what the base model was made for)"
    size.add_argument("--image-size", type=between(1, SIDE), help=square)
    add_size_option(size, "the largest central crop of this shape, resized to it, in pixels")
    posterior = (
        "mode (default); sample = one draw, decided by the image's id; moments = mean and standard deviation, of which "
        "training draws anew at every step (twice the size)"
    )
    add("--posterior", **choice("mode", "sample", "moments"), help=posterior)
    unscaled = "store without the VAE's scaling factor; training applies it"
    add("--unscaled", action="store_true", help=unscaled)
    add("--dtype", **choice("float16", "bfloat16", "float32"), help="stored as (default float16)")


def add_size_option(parser: argparse._ActionsContainer, meaning: str) -> None:
    """Add the option of the size of images that are no squares."""
    parser.add_argument("--size", type=sides(1, SIDE), metavar="WIDTHxHEIGHT", help=meaning)


def add_teacher_options(parser: argparse.ArgumentParser, *, prefix: str = "") -> None:
    """Add the options of the teacher and its view; `prefix` keeps two of the names apart from others of the same script."""
    add, size = parser.add_argument, parser.add_mutually_exclusive_group()
    teacher = (
        "hub id or folder of a DINOv2, a DINOv3 ViT, or a SigLIP or SigLIP 2 (its vision tower); of a DINOv2 also a .pth, .pt "
        "or .safetensors file in the format of facebookresearch/dinov2 (default %(default)s)"
    )
    add("--teacher", type=expand_home, default="facebook/dinov2-large", help=teacher)
    add("--teacher-revision", help="hub revision (commit) of the teacher")
    grid = "tokens per side (default 14: 196 px with patches of 14 px; 37: 518 px), or WIDTHxHEIGHT of a grid such as 37x28"
    size.add_argument("--grid", type=sides(1, GRID), default=14, help=grid)
    pixels = {"dest": "teacher_image_size", "help": "the same in pixels, a multiple of the patch"}
    size.add_argument(f"--{prefix}image-size", type=sides(1, SIDE), **pixels)
    view = "of the teacher: aligned (default) = the VAE's crop; official = DINOv2's own transform, its central 87.5 %%"
    add("--view", **choice("aligned", "official"), help=view)
    seen = (
        "of a clip, which frames stand for a latent frame, of those that the VAE makes it of: the middle one, or the mean of "
        "all their tokens"
    )
    add("--frames-of-teacher", **choice("middle", "mean"), help=seen)
    stored = "stored as (default float16; int8 = half the size, an fp16 scale for every 64 channels)"
    dtypes = choice("float16", "bfloat16", "float32", "int8")
    add(f"--{prefix}dtype", dest="teacher_dtype", **dtypes, help=stored)


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the base model, of which each script loads only a part."""
    base = "base model: hub id or local diffusers folder (default %(default)s)"
    parser.add_argument("--base", type=expand_home, default=BASE, help=base)
    parser.add_argument("--revision", help="hub revision (commit) of the base model")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default) = cuda when present, else cpu")


def part(text: str) -> tuple[int, int]:
    """An argparse type: `I/N` with 0 ≤ I < N."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, such as 0/4, not {text}")
    return int(index), int(count)
