"""How fast a training step is, measured in the real loop with random weights, against the device's own matmul.

    python benchmarks/train_step.py                                          # full size: needs a GPU
    python benchmarks/train_step.py --train lora --batch 48 --compile none default --coeff 0 0.8
    python benchmarks/train_step.py --size small --batch 16 --compile none    # CPU: the loop against a bare one

Everything of a training is in it: reading, decoding, noise, heads, losses, AdamW, EMA and the log. `matmul` is what a large
matrix product (bf16 on a GPU) reaches in the same process, and `share` a step's counted operations against that. The bare loop
does no more than forward, mean squared error, backward, clipping, AdamW and EMA on one batch that lies on the device.
"""

import argparse
import gc
import statistics
import sys
import timeit
from collections.abc import Callable
from itertools import product
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import torch
from diffusers.training_utils import EMAModel

import train as train_script
from benchmarks.report import ROOT, benchmark_parser, publish, target, temporary_folder
from benchmarks.synthetic_run import make_synthetic
from common.arguments import positive
from configs.loading import load_config
from training.meter import Meter
from training.parts import Parts, build_parts
from training.plan import step_flops
from training.run_folder import RunFolder
from training.state import TrainingState

TRAIN = ("lora", "partial", "full")
WINDOWS = 7  # of each loop, in turn
CONFIG = ROOT / "configs" / "A.yaml"


def main() -> None:
    parser = benchmark_parser(__doc__, steps=(10, "of each window"))
    parser.add_argument("--size", choices=("full", "small"), default="full", help="(default full)")
    parser.add_argument("--train", nargs="+", choices=TRAIN, default=TRAIN)
    parser.add_argument("--batch", nargs="+", type=positive, default=[48], help="(default 48)")
    parser.add_argument("--compile", nargs="+", default=["none", "default"], help="(default none default)")
    parser.add_argument("--coeff", nargs="+", type=float, default=[0.0, 0.8], help="λ (default 0 0.8)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every arm")
    args = parser.parse_args()
    device = device_of(parser, args)
    with temporary_folder(args.dir) as folder:
        base = make_synthetic(folder, args.size, images=4 * max(args.batch))
        matmul = matmul_rate(device)
        print(f"matmul: {matmul / 1e12:.4g} TFLOP/s")
        rows = []
        for train, batch, compiled, coeff in product(args.train, args.batch, args.compile, args.coeff):
            arm = {"train": train, "batch": batch, "compile": compiled, "λ": coeff}
            ours = [f"model.train={train}", f"data.batch_size={batch}", f"train.compile={compiled}"]
            settings = [*base, *ours, f"align.coeff={coeff}", "train.precision=auto", *args.set]
            rows.append(arm | measure(settings, args.steps, matmul, folder / f"run{len(rows)}"))
            print(rows[-1], flush=True)
    publish(args, rows, targets_of(rows, device), matmul_tflop_per_s=matmul / 1e12)


def device_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> torch.device:
    """The GPU if there is one; else the CPU, which is for the small size only."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.size == "full" and device.type == "cpu":
        parser.error("full size needs a GPU; --size small runs on a CPU")
    return device


def measure(
    settings: list[str],
    steps: int,
    matmul: float,
    run: Path,
    *,
    bare: bool = True,
    windows: int | None = None,
) -> dict:
    """One arm: windows of our loop and of the bare one in turn, so that both see the same machine; medians."""
    windows = WINDOWS if windows is None else windows
    own = [f"run={run}", f"train.steps={(windows + 1) * steps}", f"train.log_every={steps}"]
    own += ["train.checkpoint_every=100000000", "optim.warmup_fraction=0"]
    config = load_config([CONFIG], [*settings, *own])
    theirs: list[float] = []
    try:
        parts = build_parts(config)
        flops = step_flops(config)[1]
        step = bare_step(parts)
        device = parts.device
        reset_memory(device)

        class Interrupted(Meter):
            """After each reading the bare loop has its turn, off the record."""

            def read(self) -> dict[str, float]:
                line = super().read() | {"memory_gb": memory_gb(device)}
                if bare:
                    theirs.append(seconds_of(step, device, calls=steps))
                    reset_memory(device)
                    super().read()
                return line

        with RunFolder.claimed(config) as folder, patch.object(train_script, "Meter", Interrupted):
            ours = parts.masters, parts.coefficient, parts.ranks, parts.dataset.identity
            state = TrainingState(config, *ours)
            state.save = lambda run: None  # a checkpoint is no part of a step
            train_script.take_steps(parts, folder, state, train_script.open_stream(parts, first_step=0))
            warming_up, *lines = folder.metrics()  # the first window compiles
            memory = warming_up["memory_gb"]  # later the bare loop's optimiser is there too
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    finally:
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    ours = [1 / line["it_per_s"] for line in lines]
    seconds = statistics.median(ours)
    ratio = {"ours / bare": min(ours) / min(theirs[1:])} if bare else {}  # other work only ever adds time
    return {
        "ms/step": 1e3 * seconds,
        "ms/step best": 1e3 * min(ours),
        "images/s": config.data.batch_size / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "share of matmul": flops / seconds / matmul,
        "memory GB": memory,
        "data wait": statistics.median(line["data_wait"] for line in lines),
    } | ratio


def bare_step(parts: Parts) -> Callable[[], None]:
    """A step that does no more than it must, on the same network; it leaves no gradient behind and moves no weight of ours."""
    batch, device = parts.config.data.batch_size, parts.device
    dataset, network = parts.dataset, parts.model.backbone
    dtype = parts.model.dtype
    latents = torch.randn(batch, *dataset.latent_shape, device=device).to(dtype)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(1000, (batch,), device=device)
    rows = dataset.text.null.items()
    text = {name: torch.randn(batch, *row.shape, device=device).to(dtype) for name, row in rows}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-12, weight_decay=0.0, fused=True)
    ema = EMAModel(trained, decay=0.9995, foreach=True)

    def step() -> None:
        out = parts.family.forward(network, latents, timesteps, text)
        torch.nn.functional.mse_loss(out.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(trained)

    return step


def memory_gb(device: torch.device) -> float:
    """The most that was in use since the last reset."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def reset_memory(device: torch.device) -> None:
    """Begin a new record; the allocator keeps what it has, so that the next window starts warm."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product, bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return max(2 * n**3 / seconds_of(lambda: a @ b, device, calls=20) for _ in range(5))


def seconds_of(call: Callable[[], object], device: torch.device, *, calls: int) -> float:
    """Seconds of a call, the mean of several after one that does not count."""

    def run(times: int) -> None:
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    run(1)
    return timeit.timeit(lambda: run(calls), number=1) / calls


def targets_of(rows: list[dict], device: torch.device) -> list[dict]:
    """Held against the bounds that docs/performance.md explains, where the arms that they need were run."""
    measured = {(r["train"], r["batch"], r["compile"], r["λ"] > 0): r for r in rows if "ms/step" in r}
    targets = []
    for (train, batch, compiled, aligned), row in measured.items():
        arm = f"{train}, batch {batch}, compile {compiled}"
        if device.type == "cuda" and aligned and (without := measured.get((train, batch, compiled, False))):
            more = row["ms/step best"] / without["ms/step best"] - 1
            targets.append(target(f"what alignment adds: {arm}", more, at_most=0.02))
        if device.type == "cuda" and aligned and train == "lora" and batch == 48:
            targets.append(target(f"share of the matmul rate: {arm}", row["share of matmul"], at_least=0.5))
            targets.append(target(f"memory in GB: {arm}", row["memory GB"], at_most=70))
        if device.type == "cuda":
            targets.append(target(f"waiting for data: {arm}, λ {row['λ']:g}", row["data wait"], at_most=0.01))
        elif not aligned:
            targets.append(target(f"ours / bare loop: {arm}", row["ours / bare"], at_most=1.05))
    return targets


if __name__ == "__main__":
    main()
