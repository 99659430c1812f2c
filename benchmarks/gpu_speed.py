"""The parts of `gpu_check.py` that measure: steps, sampling and encoders, and what the attention and convolution kernels do."""

import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

from diffusers import StableDiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

import train as train_script
from benchmarks import write
from benchmarks.gpu_bench import Bench, broke_off, free_memory
from benchmarks.report import target
from benchmarks.train_step import CONFIG, TRAIN, matmul_rate, measure, seconds_of, targets_of
from common.device import compute_dtype, pick_device
from configs.loading import load_config
from configs.schema import Config
from evaluation.sample import ImageSampler
from evaluation.targets import Target
from method.sampler import initial_noise
from models.latents import decode_images
from training.kernels import searched_convolutions
from training.meter import PEAKS
from training.plan import (
    GB,
    forward_of,
    model_of_shapes,
    planned_bytes,
    saved_bytes,
    shape_of_latents,
    work_of,
)
from training.plan_time import BANDWIDTHS, card_of, seconds_by_kind
from training.run_folder import RunFolder

# Of the arms of a step, the value that matters most comes first.
BATCHES, COMPILED, COEFFS = (48, 64, 32, 16), ("default", "none"), (0.8, 0.0)
# Attention by the first of these that knows the shapes; heads of 160 channels are not every kernel's.
KERNELS = {
    "cuDNN": [SDPBackend.CUDNN_ATTENTION],
    "cuDNN, else flash": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
}
STEPS, WINDOWS = 4, 3  # of a window, and windows
Choose = Callable[[], AbstractContextManager]  # of kernels


def measure_speed(bench: Bench) -> tuple[list[dict], list[dict]]:
    """Sampling and encoders against their bare networks, then steps, as many as the time allows."""
    ends = time.perf_counter() + bench.seconds
    rows = [row for measured in (sampling_rows, encoder_rows) for row in kept(measured, bench)]
    steps = step_rows(bench, ends)
    if bench.device.type == "cpu":  # its runs are too short to be held against anything
        return [*rows, *steps], []
    whole = [row for row in rows if "ours / bare" in row and row["what"] != "sampling"]
    targets = [target(f"{row['what']}: ours / bare", row["ours / bare"], at_least=0.9) for row in whole]
    targets += [*targets_of(steps, bench.device), *memory_targets(steps), *time_targets(steps)]
    return [*rows, *steps], targets


def kept(measured: Callable[..., list[dict]], *args: object) -> list[dict]:
    """The rows of a measurement; where it breaks off, the reason, so that the other rows are not lost."""
    try:
        return measured(*args)
    except Exception as error:  # whatever it is, the other rows say something too
        return [{"note": broke_off(error)}]
    finally:
        free_memory()


def step_rows(bench: Bench, ends: float) -> list[dict]:
    """Our step against matmul and, at the usual batch, a bare loop; arms that differ least from the usual come first."""
    matmul, rows, longest = matmul_rate(bench.device), [], 0.0
    full = bench.size == "full"
    batches, compiled = (BATCHES, COMPILED) if full else ((bench.counts["batch"],), ("none",))
    arms = list(product(TRAIN if full else TRAIN[:1], batches, compiled, COEFFS))
    usual = arms[0]
    arms.sort(key=lambda arm: sum(a != b for a, b in zip(arm, usual, strict=True)))
    for train, batch, compiled, coeff in arms:
        arm = {"what": "step", "train": train, "batch": batch, "compile": compiled, "λ": coeff}
        started = time.perf_counter()
        if started + longest > ends:
            rows.append(arm | {"note": "left out: no time"})
            continue
        settings = [
            f"model.train={train}",
            f"data.batch_size={batch}",
            f"train.compile={compiled}",
            f"align.coeff={coeff}",
        ]
        run, bare = bench.folder / f"speed{len(rows)}", batch == bench.counts["batch"]
        rows.append(arm | kept(step_row, [*bench.settings, *settings], matmul, run, bare)[0])
        longest = max(longest, time.perf_counter() - started)
        print(rows[-1], flush=True)
    return rows


def step_row(settings: list[str], matmul: float, run: Path, bare: bool) -> list[dict]:
    """One arm, and the memory that `--plan` names for it."""
    with searched_convolutions():  # for the bare loop, too
        found = measure(settings, STEPS, matmul, run, bare=bare, windows=WINDOWS)
    return [found | planned(load_config([CONFIG], settings))]


def planned(config: Config) -> dict[str, float]:
    """The memory and, for a card that it knows, the time of a step that `--plan` names; nothing is checkpointed here."""
    device = pick_device(config.train.device)
    dtype = compute_dtype(device, config.train.precision)
    model, _ = model_of_shapes(config, dtype)
    forward = forward_of(model, shape_of_latents(config), config.teacher.cells)
    saved = saved_bytes(lambda: forward(1), list(model.parameters()))
    found = {"planned GB": sum(planned_bytes(config, model, dtype, saved).values()) / GB}
    if (card := card_of(device)) is not None:
        trained = sum(p.numel() for p in model.trained_parameters().values())
        rates = PEAKS[card], BANDWIDTHS[card]
        compiled = config.train.compile != "none"
        parts = seconds_by_kind(work_of(forward), config.data.batch_size, trained, *rates, compiled=compiled)
        found["planned ms"] = 1e3 * sum(parts.values())
    return found


def time_targets(rows: list[dict]) -> list[dict]:
    """The compiled step against the plan's, which is to be right within 15 %."""
    return [
        target(f"step / plan: {row['train']}, batch {row['batch']}, λ {row['λ']:g}, off by",
               abs(row["ms/step"] / row["planned ms"] - 1), at_most=0.15)
        for row in rows if row.get("planned ms") and row["compile"] != "none"
    ]  # fmt: skip


def memory_targets(rows: list[dict]) -> list[dict]:
    """Peak memory against the plan's, which leaves out what kernels need in passing; a CPU's is not known."""
    return [
        target(f"memory / plan: {row['train']}, batch {row['batch']}, compile {row['compile']}, λ {row['λ']:g}",
               row["memory GB"] / row["planned GB"], at_most=1.5)
        for row in rows if row.get("memory GB")
    ]  # fmt: skip


def sampling_rows(bench: Bench) -> list[dict]:
    """Unguided images of our sampler and of StableDiffusionPipeline, in the same precision, from the bare base model.

    Ours decodes in fp32, for metrics; so the network's own work is compared apart from decoding.
    """
    count, steps = (16, 20) if bench.size == "full" else (2, 2)
    config = bench.config(
        f"run={bench.folder}/sampled", f"eval.sampling_steps={steps}", f"eval.batch_size={count}"
    )
    target_of_base = Target(RunFolder.of_base_model(config), 0, "base", config.eval)
    sampler = ImageSampler.load(target_of_base, bench.device)
    labels, seeds = [n % len(sampler.text) for n in range(count)], range(count)
    text = sampler.text.fields_of(labels)["prompt_embeds"].to(bench.device)
    dtype, network = sampler.model.dtype, sampler.model.backbone
    shape = (network.config.in_channels, *[network.config.sample_size] * 2)
    noise = initial_noise(list(seeds), shape, bench.device)

    ours = seconds_of(lambda: sampler.draw(labels, seeds), bench.device, calls=2)
    decoding = seconds_of(lambda: decode_images(sampler.codec, noise), bench.device, calls=2)
    pipe = StableDiffusionPipeline.from_pretrained(bench.base, dtype=dtype).to(bench.device)
    pipe.unet, pipe.scheduler = network, sampler.scheduler
    pipe.set_progress_bar_config(disable=True)

    def theirs(output: str) -> Callable[[], object]:
        how = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": output}
        return lambda: pipe(prompt_embeds=text.to(dtype), latents=noise.to(dtype), **how)

    bare, latents = (seconds_of(theirs(output), bench.device, calls=2) for output in ("np", "latent"))
    return [
        {"what": "sampling", "batch": count, "images/s": count / ours, "ours / bare": bare / ours},
        {"what": "sampling, network alone", "batch": count, "images/s": count / (ours - decoding),
         "ours / bare": latents / (ours - decoding)},
    ]  # fmt: skip


def encoder_rows(bench: Bench) -> list[dict]:
    """Scripts 2 and 3, from files to shards, against the bare encoders (`write.py`)."""
    batch, seconds, workers = (64, 4, 15) if bench.size == "full" else (2, 1, 0)
    images = None if bench.size == "full" else 8
    args = Namespace(rounds=1, images=images, seconds=seconds, batch_size=batch, workers=workers)
    rows = []
    for name, job in bench.jobs().items():
        found = write.measure(name, job, bench.pictures, args)
        rows.append(
            {
                "what": name,
                "batch": batch,
                "images/s": found["whole images/s"],
                "ours / bare": found["whole / bare"],
            }
        )
    return rows


def compare_attention(bench: Bench) -> tuple[list[dict], list[dict]]:
    """A LoRA step, eager, under each kernel of attention, without cuDNN's search, and in the other memory layout.

    The default lets PyTorch choose, searches, and has channels last on a GPU in bf16.
    """
    ends = time.perf_counter() + bench.seconds
    full = bench.size == "full"
    kernels = KERNELS if full else {"math": [SDPBackend.MATH]}
    arms: dict[str, tuple[Choose, list[str]]] = {
        "the default": (nullcontext, []),
        **{
            f"attention by {name}": (partial(sdpa_kernel, order, set_priority=True), [])
            for name, order in kernels.items()
        },
        "no search for convolutions": (
            partial(patch.object, train_script, "searched_convolutions", nullcontext),
            [],
        ),
        "channels first": (nullcontext, ["train.channels_last=false"]),
    }
    matmul, rows = matmul_rate(bench.device), []
    for name, (choose, more) in arms.items():
        if time.perf_counter() > ends:
            rows.append({"what": name, "note": "left out: no time"})
            continue
        settings = [*bench.settings, f"data.batch_size={bench.counts['batch']}", "train.compile=none", *more]
        run = bench.folder / f"attention{len(rows)}"
        rows.append({"what": name} | kept(row_under, choose, settings, matmul, run)[0])
        print(rows[-1], flush=True)
    return rows, []


def row_under(choose: Choose, settings: list[str], matmul: float, run: Path) -> list[dict]:
    """One arm under a choice of kernels; a note where this device has none of them."""
    try:
        with choose():
            return [measure(settings, STEPS, matmul, run, bare=False, windows=WINDOWS)]
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return [{"note": "no such kernel on this device, for one of the shapes at least"}]
