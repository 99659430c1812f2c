"""The same LoRA, batch and cached latents in the loop of diffusers' own LoRA example and in ours.

    curl -O https://raw.githubusercontent.com/huggingface/diffusers/main/examples/text_to_image/train_text_to_image_lora.py
    python benchmarks/vs_diffusers.py --example train_text_to_image_lora.py                 # full size: needs a GPU
    python benchmarks/vs_diffusers.py --example train_text_to_image_lora.py --size small --batch 16

Their script runs as it is, but for what surrounds its loop: its VAE and text encoder are replaced by look-ups in cached latents
and embeddings, at no cost, and its LoRA by ours. Ours runs at λ = 0, eager and compiled, and at λ = 0.8. Both in bf16 on a GPU.
"""

import importlib.util
import statistics
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import torch
from torch import nn

from benchmarks.report import benchmark_parser, publish, target, temporary_folder
from benchmarks.synthetic_run import SIZES, make_synthetic
from benchmarks.train_step import device_of, matmul_rate, measure, memory_gb, reset_memory
from models.sd15_unet_aligned import lora_config


def main() -> None:
    counts = {"steps": (60, "of each of their runs"), "runs": (3, "of each loop, in turn")}
    parser = benchmark_parser(__doc__, batch=(48, "images of a step"), **counts)
    parser.add_argument("--example", type=Path, required=True, help="diffusers' train_text_to_image_lora.py")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="(default full)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of ours")
    args = parser.parse_args()
    device = device_of(parser, args)
    compilers = {"": "none", ", compiled": "default"} if device.type == "cuda" else {"": "none"}
    ways = {
        f"ours, λ = {coeff}{how}": [f"align.coeff={coeff}", f"train.compile={compiler}"]
        for how, compiler in compilers.items()
        for coeff in ("0", "0.8")
    }
    found: dict[str, list[dict]] = {name: [] for name in ("diffusers", *ways)}
    with temporary_folder(args.dir) as folder:
        base = make_synthetic(folder, args.size, images=4 * args.batch)
        matmul = matmul_rate(device)
        example = load_example(args.example)
        for turn in range(args.runs):
            found["diffusers"].append(run_theirs(example, folder, args, device))
            for number, (name, knobs) in enumerate(ways.items()):
                settings = [*base, f"data.batch_size={args.batch}", "train.precision=auto", *knobs, *args.set]
                run = folder / f"run{turn}-{number}"
                found[name].append(measure(settings, max(args.steps // 6, 1), matmul, run, bare=False))
            print({name: round(runs[-1]["ms/step"], 1) for name, runs in found.items()}, flush=True)
    best = {name: min(run["ms/step"] for run in runs) for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        median, memory = (
            statistics.median(run["ms/step"] for run in runs),
            max(run["memory GB"] for run in runs),
        )
        row = {"loop": name, "ms/step": median, "ms/step best": best[name], "memory GB": memory}
        rows.append(row | {"diffusers / this": best["diffusers"] / best[name]})
    targets = []
    if device.type == "cuda":
        ours = next(row for row in rows if row["loop"] == "ours, λ = 0, compiled")
        targets = [
            target("diffusers / ours, λ = 0, compiled", ours["diffusers / this"], at_least=1.3),
            target("memory, ours / diffusers", ours["memory GB"] / rows[0]["memory GB"], at_most=1.0),
        ]
    publish(args, rows, targets, example=args.example.name)


def load_example(path: Path) -> types.ModuleType:
    """Their script as a module; `datasets`, of which it needs one function that we replace, need not be installed."""
    quiet = SimpleNamespace(set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None)
    datasets = types.ModuleType("datasets")
    datasets.utils, datasets.load_dataset = SimpleNamespace(logging=quiet), None
    sys.modules.setdefault("datasets", datasets)
    spec = importlib.util.spec_from_file_location("diffusers_example", path)
    module = importlib.util.module_from_spec(spec)
    with patch("diffusers.utils.check_min_version", lambda _: None):
        spec.loader.exec_module(module)
    return module


class Latents(nn.Module):
    """In place of their VAE: what they think are pixels are latents."""

    config = SimpleNamespace(scaling_factor=1.0)

    def encode(self, pixel_values):
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: pixel_values))


class Embeddings(nn.Module):
    """In place of their text encoder: a table."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, input_ids, return_dict):
        return (self.table[input_ids],)


class Images(torch.utils.data.StackDataset):
    """In place of their data: latents and class ids in memory."""

    column_names = ("image", "text")

    def with_transform(self, _):
        return self


def run_theirs(example: types.ModuleType, folder: Path, args, device: torch.device) -> dict:
    """Their `main`, timed between its own updates of the progress bar, each of which follows a read of the loss."""
    shapes = SIZES[args.size]
    count = 4 * args.batch
    images = Images(pixel_values=torch.randn(count, *shapes["latents"]), input_ids=torch.arange(count) % 10)
    ticks: list[float] = []

    def tick(_) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ticks.append(time.perf_counter())

    def given(value):
        return SimpleNamespace(from_pretrained=lambda *_, **__: value)

    command = [
        "train_text_to_image_lora.py", f"--pretrained_model_name_or_path={folder}/sd15",
        "--dataset_name=lambdalabs/naruto-blip-captions", f"--train_batch_size={args.batch}",
        f"--max_train_steps={args.steps}", "--checkpointing_steps=1000000000", f"--output_dir={folder}/theirs",
        "--lr_scheduler=cosine", "--report_to=tensorboard", "--seed=0",
        f"--mixed_precision={'bf16' if device.type == 'cuda' else 'no'}",
    ]  # fmt: skip
    instead = {
        "AutoencoderKL": given(Latents()),
        "CLIPTextModel": given(Embeddings(torch.randn(10, *shapes["text"]))),
        "CLIPTokenizer": given(None),
        "LoraConfig": lambda **_: lora_config(),
        "load_dataset": lambda *_, **__: {"train": images},
        "tqdm": lambda *_, **__: SimpleNamespace(update=tick, set_postfix=lambda **_: None),
    }
    reset_memory(device)
    with patch.multiple(example, **instead), patch("sys.argv", command):
        example.main()
    warm = len(ticks) // 4
    steps = [b - a for a, b in zip(ticks[warm:], ticks[warm + 1 :], strict=False)]
    return {"ms/step": 1e3 * statistics.median(steps), "memory GB": memory_gb(device)}


if __name__ == "__main__":
    main()
