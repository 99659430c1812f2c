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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import torch
from torch import nn

from benchmarks.report import Target, add_counts, benchmark_parser, publish, temporary_folder
from benchmarks.synthetic_run import SIZES, make_synthetic
from benchmarks.train_step import matmul_rate, measure, memory_gb, replaced, reset_memory
from models.sd15_unet_aligned import lora_config


def main() -> None:
    parser, _ = benchmark_parser(__doc__)
    parser.add_argument("--example", type=Path, required=True, help="diffusers' train_text_to_image_lora.py")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="(default full)")
    add_counts(
        parser,
        batch=(48, "images of a step"),
        steps=(60, "of each of their runs"),
        runs=(3, "of each loop, in turn"),
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of ours")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.size == "full" and device.type == "cpu":
        parser.error("full size needs a GPU; --size small runs on a CPU")
    ways = {
        "ours, λ = 0": ["align.coeff=0", "train.compile=none"],
        "ours, λ = 0.8": ["align.coeff=0.8", "train.compile=none"],
    }
    if device.type == "cuda":
        ways |= {
            f"{name}, compiled": [*knobs[:1], "train.compile=default"] for name, knobs in list(ways.items())
        }
    found: dict[str, list[dict]] = {"diffusers": [], **{name: [] for name in ways}}
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
    rows = [
        {
            "loop": name,
            "ms/step": statistics.median(run["ms/step"] for run in runs),
            "ms/step best": min(run["ms/step"] for run in runs),
            "memory GB": max(run["memory GB"] for run in runs),
        }
        for name, runs in found.items()
    ]
    theirs = rows[0]
    for row in rows:
        row["diffusers / this"] = theirs["ms/step best"] / row["ms/step best"]
    targets = []
    if device.type == "cuda":
        ours = next(row for row in rows if row["loop"] == "ours, λ = 0, compiled")
        targets = [
            Target("diffusers / ours, λ = 0, compiled", ours["diffusers / this"], at_least=1.3),
            Target("memory, ours / diffusers", ours["memory GB"] / theirs["memory GB"], at_most=1.0),
        ]
    publish(args, rows, targets, example=args.example.name)


def load_example(path: Path) -> types.ModuleType:
    """Their script as a module; `datasets`, of which it needs one function that we replace, need not be installed."""
    quiet = SimpleNamespace(set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None)
    datasets = types.ModuleType("datasets")
    datasets.utils = SimpleNamespace(logging=quiet)
    datasets.load_dataset = None
    sys.modules.setdefault("datasets", datasets)
    import diffusers.utils

    spec = importlib.util.spec_from_file_location("diffusers_example", path)
    module = importlib.util.module_from_spec(spec)
    with replaced(diffusers.utils, "check_min_version", lambda _: None):
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


class Images(torch.utils.data.Dataset):
    """In place of their data: latents and class ids in memory."""

    column_names = ("image", "text")

    def __init__(self, latents: torch.Tensor):
        self.latents = latents

    def with_transform(self, _):
        return self

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": self.latents[i], "input_ids": torch.tensor(i % 10)}


def run_theirs(example: types.ModuleType, folder: Path, args, device: torch.device) -> dict:
    """Their `main`, timed between its own updates of the progress bar, each of which follows a read of the loss."""
    shapes = SIZES[args.size]
    latents = torch.randn(4 * args.batch, *shapes["latents"])
    ticks: list[float] = []

    class Bar:
        def __init__(self, *_, **__):
            pass

        def update(self, _):
            if device.type == "cuda":
                torch.cuda.synchronize()
            ticks.append(time.perf_counter())

        def set_postfix(self, **_):
            pass

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
        "load_dataset": lambda *_, **__: {"train": Images(latents)},
        "tqdm": Bar,
    }
    reset_memory(device)
    with ExitStack() as stack, argv(command):
        for name, value in instead.items():
            stack.enter_context(replaced(example, name, value))
        example.main()
    warm = len(ticks) // 4
    steps = [b - a for a, b in zip(ticks[warm:], ticks[warm + 1 :], strict=False)]
    return {"ms/step": 1e3 * statistics.median(steps), "memory GB": memory_gb(device)}


@contextmanager
def argv(command: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, command
    try:
        yield
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
