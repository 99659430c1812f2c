"""Images per second of scripts 2 and 3, files to durable shards, against the bare encoder on pixels that are in memory.

    OMP_NUM_THREADS=1 python benchmarks/write.py --batch-size 2
    python benchmarks/write.py --batch-size 64 --workers 16 --device cuda

The encoders have the real architectures and random weights: the VAE of Stable Diffusion 1.5 at 512 px, DINOv2 at 196 px. The
images are JPEG files of 500 × 375 pixels, noise over gradients. The ratio says how much of the encoder's speed decoding,
resizing, copying and writing leave; bare and whole runs alternate.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from benchmarks.report import benchmark_parser, publish, target, temporary_folder
from benchmarks.synthetic_run import SIZES, make_vae
from cache.image_list import Sample
from cache.views import read_view
from common.arguments import Parser, between, positive
from common.device import pick_device
from preprocessing.encoders import latent_job, token_job
from preprocessing.options import add_device_option, add_latent_options, add_size_option, add_teacher_options
from preprocessing.pipeline import FieldJob, encode_fields

DINOV2 = {  # width, layers and heads of each
    "dinov2-small": (384, 12, 6),
    "dinov2-base": (768, 12, 12),
    "dinov2-large": (1024, 24, 16),
}
ENCODERS = ["vae", *DINOV2]
WIDTH, HEIGHT = 500, 375
FILES = 512  # are in the page cache anyway; a longer run goes over them again


def main() -> None:
    counts = {"seconds": (20, "of a bare run"), "batch_size": (4, "images of a forward")}
    parser = benchmark_parser(__doc__, rounds=(2, "of all"), **counts)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=ENCODERS, help="(default all)")
    parser.add_argument("--images", type=positive, help="in one run (default: as many as fill --seconds)")
    parser.add_argument("--workers", type=between(0, 1024), default=1, help="that decode images (default 1)")
    precisions = ("auto", "bf16", "fp32")
    parser.add_argument("--precision", choices=precisions, default="auto", help="(default auto)")
    add_device_option(parser)
    args = parser.parse_args()
    if args.batch_size > FILES or (args.images or 0) % args.batch_size:
        parser.error(f"--batch-size must not exceed {FILES} and must divide --images")

    rows = []
    with temporary_folder(args.dir) as folder:
        paths = write_images(folder / "images", FILES)
        for name in args.encoders:
            save_encoder(name, folder / name)
            size = ["--image-size", "512"] if name == "vae" else []
            job = job_of(name, folder / name, folder / f"{name}-cache", args, *size)
            rows.append(measure(name, job, paths, args))
    targets = [target(f"{row['encoder']}: whole / bare", row["whole / bare"], at_least=0.9) for row in rows]
    publish(args, rows, targets, device=str(pick_device(args.device)))


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    rng, paths = np.random.default_rng(0), []
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / WIDTH
    for number in range(count):
        gradient = np.stack([x, y], -1) @ rng.uniform(-200, 200, (2, 3))  # (HEIGHT, WIDTH, 3)
        pixels = 128 + gradient + rng.normal(0, 12, gradient.shape)
        paths.append(str(folder / f"{number:05d}.jpg"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def save_encoder(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    if name == "vae":
        make_vae(folder, SIZES["full"]["vae"])
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    else:
        width, layers, heads = DINOV2[name]
        config = Dinov2Config(width, layers, heads, image_size=518, patch_size=14)
        Dinov2Model(config).save_pretrained(folder)


def job_of(name: str, weights: Path, out: Path, args: argparse.Namespace, *more: str) -> FieldJob:
    """The job that script 2 ("vae") or 3 would run with its own defaults and the options `more`."""
    parser = Parser()
    parser.add_argument("--precision")
    add_device_option(parser)
    common = ["--device", args.device, "--precision", args.precision, *more]
    if name == "vae":
        add_latent_options(parser)
        return latent_job(parser.parse_args([*common, "--base", str(weights)]), out)
    add_teacher_options(parser)
    add_size_option(parser, "of the latents")
    return token_job(parser.parse_args([*common, "--teacher", str(weights)]), out)


def measure(name: str, job: FieldJob, paths: list[str], args: argparse.Namespace) -> dict:
    pixels = torch.from_numpy(np.stack([read_view(path, *job.view) for path in paths])).permute(0, 3, 1, 2)
    count = args.images or images_in(args.seconds, job, pixels, args.batch_size)
    batches = whole_batches(pixels, count, args.batch_size)  # (n, 3, S, S) each
    samples = [Sample(f"n/{n}", paths[n % len(paths)], 0, "n") for n in range(count)]
    rates = []
    for number in range(args.rounds):
        bare = encoding_seconds(job, batches)
        of_round = replace(job, folder=Path(f"{job.folder}-{number}"))
        started = time.perf_counter()
        encode_fields(samples, [of_round], batch_size=args.batch_size, workers=args.workers)
        rates.append((count / bare, count / (time.perf_counter() - started)))
    bare, whole = map(statistics.median, zip(*rates, strict=True))
    row = {"encoder": name, "images": count, "batch": args.batch_size, "bare images/s": bare}
    row |= {"whole images/s": whole, "whole / bare": whole / bare}
    return row | {"MB/s of pixels to shards": whole * job.spec.value_bytes / 1e6}


def encoding_seconds(job: FieldJob, batches: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    for batch in batches:
        encoded = job.encode(batch, [])
    if encoded.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def whole_batches(pixels: torch.Tensor, count: int, size: int) -> list[torch.Tensor]:
    """So many images in batches that share the memory of `pixels`, gone over again and again."""
    distinct = pixels[: len(pixels) // size * size].split(size)
    return [distinct[n % len(distinct)] for n in range(count // size)]


def images_in(seconds: float, job: FieldJob, pixels: torch.Tensor, batch_size: int) -> int:
    """How many images the bare encoder takes in this time: whole batches, three or more."""
    batches = whole_batches(pixels, 3 * batch_size, batch_size)
    encoding_seconds(job, batches[:1])  # warm-up
    return max(3, round(3 * seconds / encoding_seconds(job, batches))) * batch_size


if __name__ == "__main__":
    main()
