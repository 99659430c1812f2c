"""Trainings on the smallest demo, shared by the tests."""

import os
import signal
from pathlib import Path

import torch
from conftest import demo_overrides
from safetensors.torch import load_file

import train as train_script
from training.meter import RATES
from training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
FILES = ("trained.safetensors", "ema.safetensors", "optimizer.safetensors")


def train(miniature, run, *more, flags=()) -> RunFolder:
    """Run the script in this process; settings of the smallest demo, and `more`."""
    train_script.main(["--config", str(CONFIG), *flags, *demo_overrides(miniature, run, *more)])
    return RunFolder(run)


def tensors(run: RunFolder, step: int = 6, file: str = FILES[0]) -> dict[str, torch.Tensor]:
    """What a checkpoint's file holds."""
    return load_file(run.checkpoint_folder / f"step-{step:07d}" / file)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(run: RunFolder) -> list[dict]:
    """A run's metrics without what the clock decides."""
    return [{k: v for k, v in line.items() if k not in RATES} for line in run.metrics()]


def assert_same_run(a: RunFolder, b: RunFolder, step: int = 6) -> None:
    """Weights, moving averages, moments and metrics are equal bit for bit."""
    for file in FILES:
        assert equal(tensors(a, step, file), tensors(b, step, file)), file
    assert timeless(a) == timeless(b)


def stop_after(monkeypatch, step: int) -> None:
    """Let training receive a stop request at the end of a step, as SIGTERM would make."""
    update = train_script.TrainingState.update

    def update_then_stop(state):
        update(state)
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_script.TrainingState, "update", update_then_stop)


def stopped_at(step: int, miniature, run, monkeypatch, *more) -> RunFolder:
    """A run that was told to stop after a step, and did."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        return train(miniature, run, *more)
