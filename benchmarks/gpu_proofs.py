"""The proofs of `gpu_check.py`: each runs the real commands on the device and holds what it finds against a stated bound.

Bounds on a GPU are estimates from the precision of bf16 and TF32, made before any GPU was measured.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

import train as train_script
from benchmarks.gpu_bench import Bench, broke_off, free_memory, traced_only
from benchmarks.kills import differences
from benchmarks.report import target
from benchmarks.train_step import CONFIG
from cache.text import TextReader, convert
from cache.views import read_view
from common.errors import UserError
from evaluation.sample import ImageSampler
from evaluation.targets import find_targets
from method.sampler import initial_noise
from metrics.features import full_precision
from training.checkpoint import TRAINED
from training.run_folder import RunFolder
from training.state import TrainingState

# Largest difference between the losses of a step, over the mean loss: bf16 rounds to one part in 256, and a loss is a mean.
LOSS_BOUNDS = {"compiled": 0.01, "fp32": 0.02}
# On a CPU kernels repeat themselves; on a GPU last bits of gradients differ, and Adam makes whole steps of small gradients.
RESUMED = {"cpu": 0.0, "cuda": 0.1}
FAST = ["optim.lr=0.01"]  # moves the weights so far in a few steps that an image shows it
# Of 1: half a level of 8 bits, and one and a half, both in fp32 without TF32.
IMAGE = {"cpu": 0.003, "cuda": 0.006}
BATCHED = {"cpu": 1e-4, "cuda": 0.02}  # bf16 on a GPU


def prove(bench: Bench) -> tuple[list[dict], list[dict]]:
    """Run every proof; one that breaks off, or for which there was no time, has failed, and the others still count."""
    rows, targets, ends = [], [], time.perf_counter() + bench.seconds
    for proof in PROOFS:
        name = proof.__name__.replace("_", " ")
        started = time.perf_counter()
        if proof in NEED_A_GPU and bench.device.type == "cpu":
            rows.append({"proof": name, "note": "needs a GPU"})
            continue
        try:
            found = proof(bench) if started < ends else [target("left out: no time", 1.0, at_most=0)]
        except Exception as error:  # whatever it is, the other proofs say something too
            found = [target(broke_off(error), 1.0, at_most=0)]
        finally:
            free_memory()
        rows.append({"proof": name, "seconds": time.perf_counter() - started})
        targets += [result | {"what": f"{name}: {result['what']}"} for result in found]
        print(rows[-1], *found, sep="\n", flush=True)
    return rows, targets


def the_self_test_passes(bench: Bench) -> list[dict]:
    """Data, taps, heads and gradients are alive on this device: the self-test raises where one is not."""
    config = ["--config", str(CONFIG)]
    train_script.main([*config, *bench.settings, "data.batch_size=4", "--self-test"])
    return [target("failures", 0.0, at_most=0)]


def losses_agree(bench: Bench) -> list[dict]:
    """The same steps, eager and compiled in bf16 and eager in fp32, have the same losses but for what bf16 rounds."""
    arms = {
        "eager": ["train.precision=bf16"],
        "compiled": ["train.precision=bf16", "train.compile=default"],
        "fp32": ["train.precision=fp32"],
    }
    losses = {}
    for name, settings in arms.items():
        with nullcontext() if bench.device.type == "cuda" else traced_only():
            run = bench.train(f"losses-{name}", *settings)
        losses[name] = losses_of(run)
    return [
        target(f"eager bf16 and {name}", apart(losses["eager"], losses[name]), at_most=LOSS_BOUNDS[name])
        for name in ("compiled", "fp32")
    ]


def nothing_waits_for_the_device(bench: Bench) -> list[dict]:
    """Between two lines of the log no call waits for the GPU: PyTorch raises an error for one that would."""
    last = bench.counts["steps"]
    with watched_for_waiting(first=2, last=last):
        bench.train("waiting", f"train.log_every={last}")
    return [target("calls that wait", 0.0, at_most=0)]


@contextmanager
def watched_for_waiting(first: int, last: int) -> Iterator[None]:
    """Let a waiting call raise from the end of step `first`, when every buffer is made, to the update of step `last`."""
    update = TrainingState.update

    def update_and_watch(state: TrainingState) -> None:
        update(state)
        if state.step in (first, last):
            torch.cuda.set_sync_debug_mode("error" if state.step == first else "default")

    try:
        with patch.object(TrainingState, "update", update_and_watch):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def one_graph_is_compiled(bench: Bench) -> list[dict]:
    """Warm-up and cutoff of λ, previews and an evaluation between the steps leave a training with a single graph."""
    steps = bench.counts["steps"]
    between = [
        "align.warmup_steps=2", f"align.cutoff_step={steps - 1}", f"train.preview_every={steps // 2}",
        "train.preview_images=2", f"train.eval_every={steps // 2}", f"eval.extractor={bench.folder}/classifier",
        "eval.num_samples=8", "eval.sampling_steps=2", "eval.bootstrap=2", "train.compile=default",
    ]  # fmt: skip
    with traced_only():
        run = bench.train("graphs", *between)
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    happened = {
        "values of λ": len({line["coeff"] for line in run.metrics()}),
        "previews": len(list(run.path.glob("previews/*.png"))),
        "evaluations": len((run.path / "eval" / "points.jsonl").read_text().splitlines()),
    }
    return [
        target("graphs", float(graphs), at_most=1),
        target("graphs, at least", float(graphs), at_least=1),
        target("graph breaks", float(breaks), at_most=0),
        *(target(what, float(count), at_least=2) for what, count in happened.items()),
    ]


def every_block_compiles_with_checkpointing(bench: Bench) -> list[dict]:
    """With gradient checkpointing Dynamo takes every block; it would raise where it gave up after too many shapes."""
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8),
        traced_only(),
    ):
        bench.train("blocks", "train.steps=2", "train.compile=default", "model.gradient_checkpointing=true")
        frames, breaks = counters["frames"], sum(counters["graph_break"].values())
    return [
        target("frames compiled", float(frames["ok"]), at_least=2),
        target("frames not compiled", float(frames["total"] - frames["ok"]), at_most=0),
        target("graph breaks", float(breaks), at_most=0),
    ]


def a_resumed_run_equals_an_undisturbed_one(bench: Bench) -> list[dict]:
    """A training stopped by SIGTERM and resumed ends as one that was not: bit for bit on a CPU, nearly on a GPU.

    The distance between the two ends is told as a share of the way that the weights went since the stop.
    """
    steps = bench.counts["steps"]
    half = steps // 2
    settings = [*FAST, f"train.checkpoint_every={half}"]
    whole = bench.train("whole", *settings)
    with stopped_after(half):
        stopped = bench.train("stopped", *settings)
    if stopped.checkpoint_steps() != [half]:
        raise RuntimeError(f"stopped at {stopped.checkpoint_steps()}, not at {half}")
    stopped = bench.train("stopped", *settings)
    middle, end, other = (
        weights_of(run, step) for run, step in ((whole, half), (whole, steps), (stopped, steps))
    )
    share = distance(end, other) / distance(end, middle)
    found = [
        target(
            "distance of the ends, over the way since the stop", share, at_most=RESUMED[bench.device.type]
        ),
        target("losses", apart(losses_of(whole), losses_of(stopped)), at_most=RESUMED[bench.device.type]),
    ]
    if bench.device.type == "cpu":
        entries = sum(row["differing"] for row in differences(whole, stopped))
        found.append(target("tensors and lines that differ", float(entries), at_most=0))
    return found


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Let a training be told to stop at the end of a step, by a signal to this process."""
    update = TrainingState.update

    def update_and_stop(state: TrainingState) -> None:
        update(state)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(TrainingState, "update", update_and_stop):
        yield


def an_export_draws_our_image(bench: Bench) -> list[dict]:
    """StableDiffusionPipeline with the exported LoRA draws the image that our sampler draws, in fp32 and guided; the bare
    base model draws another."""
    # Of the proof before, if that was run: the same command finds it complete.
    run = bench.train("whole", *FAST)
    changes = {"eval.sampling_steps": 4, "eval.cfg": 3.0, "eval.precision": "fp32", "eval.batch_size": 1}
    [[ours]] = find_targets([run.path], changes=changes)
    with full_precision(bench.device):
        image = ImageSampler.load(ours, bench.device).draw([1], [7])[0] / 255  # (H, W, 3)
    free_memory()
    pipe = StableDiffusionPipeline.from_pretrained(bench.base).to(bench.device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    text = TextReader(ours.config.data.text)
    prompt, null = (
        convert(fields, bench.device, torch.float32) for fields in (text.fields_of([1]), text.null)
    )
    shape = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    prompts = prompt | {f"negative_{name}": values[None] for name, values in null.items()}

    def draw() -> np.ndarray:
        noise = initial_noise([7], shape, bench.device)
        how = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
        with full_precision(bench.device):
            return pipe(latents=noise, **prompts, **how).images[0]

    bare = draw()
    pipe.load_lora_weights(run.path / "export" / "ema")
    bound = IMAGE[bench.device.type]
    return [
        target("largest difference of a pixel", float(np.abs(image - draw()).max()), at_most=bound),
        target("the same to the base model's", float(np.abs(image - bare).max()), at_least=2 * bound),
    ]


def an_image_alone_is_encoded_as_among_others(bench: Bench) -> list[dict]:
    """Latents of script 2 and tokens of script 3 do not depend on the images beside them: batches of 8 and of 1."""
    found = []
    for name, job in bench.jobs().items():
        views = np.stack([read_view(path, *job.view) for path in bench.pictures[:8]])
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2)  # (8, 3, S, S)
        ids = [str(n) for n in range(8)]
        together = job.encode(pixels, ids).float()
        alone = torch.cat([job.encode(pixels[n : n + 1], ids[n : n + 1]) for n in range(8)]).float()
        error = ((together - alone).norm() / together.norm()).item()
        found.append(target(f"{name}, relative", error, at_most=BATCHED[bench.device.type]))
    return found


def out_of_memory_is_one_line(bench: Bench) -> list[dict]:
    """A batch that fits no GPU ends in the one line that says what to do."""
    try:
        bench.train("too-large", "train.steps=1", f"data.batch_size={bench.counts['too_large']}")
    except UserError as error:
        lines = str(error).count("\n") + 1
        return [target("lines", float(lines if "out of memory" in str(error) else 99), at_most=1)]
    raise RuntimeError(f"{bench.counts['too_large']} images fitted, which proves nothing")


def losses_of(run: RunFolder) -> list[float]:
    return [line["loss"] for line in run.metrics()]


def apart(a: list[float], b: list[float]) -> float:
    """The largest difference between two curves, over the mean of the first."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / (sum(a) / len(a))


def weights_of(run: RunFolder, step: int) -> dict[str, Tensor]:
    return load_file(run.checkpoint(step) / TRAINED)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Euclidean, over all weights."""
    return sum((a[name] - b[name]).double().square().sum().item() for name in a) ** 0.5


PROOFS = (
    the_self_test_passes,
    losses_agree,
    nothing_waits_for_the_device,
    a_resumed_run_equals_an_undisturbed_one,
    an_export_draws_our_image,
    an_image_alone_is_encoded_as_among_others,
    out_of_memory_is_one_line,
    one_graph_is_compiled,
    every_block_compiles_with_checkpointing,
)
NEED_A_GPU = (nothing_waits_for_the_device, out_of_memory_is_one_line)
