"""What the parts of `gpu_check.py` work on: models with random weights, a cache, pictures, and the real training."""

import gc
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import train as train_script
from benchmarks.synthetic_run import make_synthetic
from benchmarks.train_step import CONFIG
from benchmarks.write import job_of, save_encoder, write_images
from common.errors import one_line
from common.files import write_json
from configs.loading import load_config
from configs.schema import Config
from miniature.models import build_teacher
from preprocessing.pipeline import FieldJob
from training.run_folder import RunFolder

BROKE_OFF = "broke off with"
# Cached images, photographs as files, steps of a short training (even), the usual batch of `speed`, and one that fits no GPU.
COUNTS = {"full": {"cached": 1024, "files": 128, "steps": 8, "batch": 48, "too_large": 1024},
          "small": {"cached": 16, "files": 8, "steps": 4, "batch": 2, "too_large": 16}}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where the parts work: a folder with everything, its size, the device, and the seconds that a part may take."""

    folder: Path
    size: str
    device: torch.device
    seconds: float
    settings: list[str]
    pictures: list[str]

    @property
    def counts(self) -> dict[str, int]:
        return COUNTS[self.size]

    @property
    def base(self) -> Path:
        return self.folder / "sd15"

    def config(self, *more: str) -> Config:
        return load_config([CONFIG], [*self.settings, *more])

    def train(self, name: str, *more: str) -> RunFolder:
        """Train by the command itself, in this process: a small batch, eager unless `more` says otherwise."""
        run = self.folder / name
        few = ["data.batch_size=4", "optim.warmup_fraction=0", "train.log_every=1", "train.compile=none",
               f"train.steps={self.counts['steps']}"]  # fmt: skip
        try:
            train_script.main(["--config", str(CONFIG), *self.settings, f"run={run}", *few, *more])
        finally:
            free_memory()
        return RunFolder(run)

    def jobs(self) -> dict[str, FieldJob]:
        """The jobs of scripts 2 and 3, with encoders on the device, which leave it with their last user."""
        args = Namespace(device=str(self.device), precision="auto")
        weights = {"vae": self.base, "dinov2": self.folder / "dinov2"}
        return {
            name: job_of(name, path, self.folder / f"{name}-cache", args) for name, path in weights.items()
        }


def prepare(folder: Path, size: str, device: torch.device, seconds: float) -> Bench:
    """Make models, cache and photographs below `folder`, the same at every call."""
    torch.manual_seed(0)
    pictures = write_images(folder / "pictures", COUNTS[size]["files"])
    settings = make_synthetic(folder, size, COUNTS[size]["cached"], pictures=pictures)
    if size == "full":
        save_encoder("dinov2-large", folder / "dinov2")
    else:
        build_teacher().save_pretrained(folder / "dinov2")
    save_classifier(folder / "classifier")
    return Bench(folder, size, device, seconds, [*settings, "train.precision=auto"], pictures)


def save_classifier(folder: Path) -> None:
    """A small classifier, which an evaluation takes in Inception's place."""
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder)
    how = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(folder / "preprocessor_config.json", how)


@contextmanager
def traced_only() -> Iterator[None]:
    """Let `compile_backbone` trace graphs without making kernels of them, which takes minutes and changes no graph."""
    compile_whole = torch.nn.Module.compile

    def trace(module: torch.nn.Module, mode: str, dynamic: bool) -> None:
        compile_whole(module, backend="eager", dynamic=dynamic)

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with patch.object(torch.nn.Module, "compile", trace):
        yield


def broke_off(error: Exception) -> str:
    """The reason of a proof or measurement that broke off, in one line; its traceback is printed."""
    traceback.print_exception(error)
    return f"{BROKE_OFF} {type(error).__name__}: {one_line(error):.200}"


def free_memory() -> None:
    """Leave nothing of a training on the device; counters of graphs stay."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
