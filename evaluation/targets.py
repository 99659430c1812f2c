"""What is evaluated: a run, one of its checkpoints, or the bare base model that a config names."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.errors import UserError
from configs.loading import load_config
from training.checkpoint import WEIGHTS, images_per_step_of
from training.run_folder import RunFolder


@dataclass(frozen=True)
class Target:
    """The weights of one step of a run: "ema", "raw", or "base" at step 0 for the bare base model, which has but one kind
    and stands beside runs of whichever was `asked` for."""

    run: RunFolder
    step: int
    weights: str
    asked: str = "ema"

    @cached_property
    def weights_sha256(self) -> str | None:
        """sha256 of the checkpoint's file; None for the base model, whose weights are known once they are loaded."""
        if self.weights == "base":
            return None
        try:
            with open(self.run.checkpoint(self.step) / WEIGHTS[self.weights], "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from None

    @cached_property
    def images_seen(self) -> int:
        """Images that training had read by then."""
        return 0 if self.weights == "base" else self.step * images_per_step_of(self.run.checkpoint(self.step))

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.run.name}" if self.weights == "base" else f"{self.run.name} step {self.step}"


def open_run(path: Path) -> tuple[RunFolder, str | None]:
    """The run of a folder, of a checkpoint's folder (whose step is returned too), or of a config's base model."""
    if path.suffix in (".yaml", ".yml"):
        return RunFolder.of_base_model(load_config(path)), None
    if path.parent.name == "checkpoints" and path.name.startswith("step-"):
        step = path.name.removeprefix("step-").lstrip("0") or "0"
        return RunFolder(path.parents[1]), step
    return RunFolder(path), None


def targets_of(path: Path, which: str = "newest", *, raw: bool = False) -> list[Target]:
    """The targets that RUN and `--checkpoint` mean; raises `UserError` where there are none."""
    run, step = open_run(path)
    weights = "raw" if raw else "ema"
    if run.is_base_model:
        return [Target(run, 0, "base", weights)]
    return [Target(run, step, weights, weights) for step in _steps(run, step or which)]


def _steps(run: RunFolder, which: str) -> list[int]:
    steps = run.checkpoint_steps()
    if not steps:
        raise UserError(
            f"{run.path} has no checkpoint yet: train_sd15.py writes one every train.checkpoint_every steps"
        )
    if which in ("all", "newest"):
        return steps if which == "all" else steps[-1:]
    if which not in map(str, steps):
        raise UserError(f"{run.path} has no checkpoint of step {which}; it has {', '.join(map(str, steps))}")
    return [int(which)]
