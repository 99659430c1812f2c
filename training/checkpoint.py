"""Checkpoints as safetensors and JSON, written under a temporary name and then renamed, so that `step-…` is always whole.

step-0000600/
    trained.safetensors     every trained weight by name: backbone.… (LoRA or plain) and heads.…
    ema.safetensors         the moving average of these weights under the same names, which evaluation uses
    optimizer.safetensors   the tensors of the optimiser's state by parameter, such as backbone.…/exp_avg
    state.json              step, running sums of the metrics, plain values of the optimiser's state,
                            size and CRC-32 of each file above, and the CRC-32 of state.json itself

Every reader checks the files against these sizes and CRC-32. A training renames a damaged checkpoint to `damaged-step-…` and
continues from the one before.
"""

import itertools
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_json, written_whole
from common.reading import JsonRecord, UnreadableFile, read_record
from training.optimizers import flat_state, load_flat_state

TRAINED, EMA, OPTIMIZER = "trained.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE = "state.json"
WEIGHTS = {"ema": EMA, "raw": TRAINED}  # from the name that evaluation uses to the file


def save_checkpoint(folder: Path, training, extra: dict, *, keep: int, keep_every: int) -> None:
    """Write `folder/step-…` from the step, parameters, optimizer and ema of a `TrainingState`; delete old checkpoints.

    The newest `keep` checkpoints stay, and those at multiples of `keep_every`. `extra` is anything that JSON can hold. Raises
    `UserError` when the checkpoint cannot be written; the earlier checkpoints are then untouched.
    """
    step, parameters, ema = training.step, training.parameters, training.ema
    final = folder / f"step-{step:07d}"
    moments, values = flat_state(training.optimizer, parameters)
    state = {"step": step, "ema_step": ema.optimization_step, "optimizer": values, "extra": extra}
    shutil.rmtree(final, ignore_errors=True)
    averages = dict(zip(parameters, ema.shadow_params, strict=True))
    try:
        with written_whole(final) as aside:
            for tensors, name in ((parameters, TRAINED), (averages, EMA), (moments, OPTIMIZER)):
                # Copies, because safetensors refuses tensors that share memory.
                save_file(
                    {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()},
                    aside / name,
                )
            files = {name: fingerprint(aside / name) for name in (TRAINED, EMA, OPTIMIZER)}
            write_json(aside / STATE, _sealed(state | {"files": files}))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the checkpoint of step {step} ({error}): free some disk; the same command goes on from the "
            "checkpoint before"
        ) from None
    for old in checkpoints(folder)[:-keep]:
        if not (keep_every and step_of(old) % keep_every == 0):
            old.unlink() if old.is_symlink() else shutil.rmtree(old)


def fingerprint(file: Path) -> "Fingerprint":
    """Return the size and the CRC-32 of a file."""
    checksum, size = 0, 0
    with open(file, "rb") as opened:
        while block := opened.read(2**24):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def newest_whole(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None where the folder has no checkpoint.

    Damaged checkpoints that are newer are reported and renamed to `damaged-…`. Raises `UserError`, and renames nothing, when a
    checkpoint cannot be read at the moment, or when all are damaged: a training of several days must not start from step 0
    without being asked, neither now nor when the command is repeated.
    """
    damaged: list[tuple[Path, _DamagedError]] = []
    for path in reversed(_step_folders(folder)):
        try:
            _verify(path)
        except _DamagedError as damage:
            damaged.append((path, damage))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; nothing was changed") from None
        else:
            for other, damage in damaged:
                names = (f"damaged-{other.name}{f'-{n}' if n else ''}" for n in itertools.count())
                aside = next(place for place in map(other.with_name, names) if not os.path.lexists(place))
                other.rename(aside)
                print(f"warning: {other} is damaged ({damage}): it is now {aside.name}; {path.name} is used")
            return path
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole, not even {damaged[-1][0].name} ({damaged[-1][1]}): choose another run=…, or "
            "remove the folder to start anew"
        )
    return None


class Fingerprint(JsonRecord):
    """Size and CRC-32 of a file."""

    bytes: int
    crc32: int


class State(JsonRecord):
    """state.json."""

    step: int
    ema_step: int
    optimizer: NotRequired[dict[str, Any]]  # not in those of before optim.name existed
    extra: dict[str, Any]
    files: dict[str, Fingerprint]
    crc32: int  # of all else in state.json


class _DamagedError(Exception):
    """A file of a checkpoint is missing or has changed since it was written."""


def _verify(path: Path, names: tuple[str, ...] = (TRAINED, EMA, OPTIMIZER)) -> State:
    """Compare files of a checkpoint with the sizes and CRC-32 in its state.json, and return the state."""
    for name in (STATE, *names):
        if not (path / name).exists():
            raise _DamagedError(f"{name} is missing")
    try:
        state = read_record(path / STATE, State, "")
    except UnreadableFile:
        raise
    except UserError:
        raise _DamagedError(f"{STATE} is not as it was written") from None
    if state != _sealed(state) or state["step"] != step_of(path):
        raise _DamagedError(f"{STATE} is not as it was written")
    for name in names:
        if fingerprint(path / name) != state["files"].get(name):
            raise _DamagedError(f"{name} is not as it was written")
    return state


def _sealed(state: dict) -> dict:
    """Return the state with its own CRC-32 added."""
    bare = {key: value for key, value in state.items() if key != "crc32"}
    return bare | {"crc32": zlib.crc32(json.dumps(bare, sort_keys=True).encode())}


def state_of(path: Path, names: tuple[str, ...] = ()) -> State:
    """Return a checkpoint's state.json; raises `UserError` where that or one of the files `names` is damaged."""
    try:
        return _verify(path, names)
    except (_DamagedError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another checkpoint") from None


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a folder, sorted by step."""
    return [path for path in _step_folders(folder) if (path / STATE).exists()]


def _step_folders(folder: Path) -> list[Path]:
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name))
    return sorted(named, key=step_of)


def restore_checkpoint(path: Path, training) -> dict:
    """Restore step, parameters, optimizer and ema of a `TrainingState` from an undamaged checkpoint; returns its `extra`."""
    state = state_of(path)
    parameters, ema = training.parameters, training.ema
    _copy_into(parameters, path / TRAINED)
    _copy_into(dict(zip(parameters, ema.shadow_params, strict=True)), path / EMA)
    load_flat_state(training.optimizer, parameters, _load(path / OPTIMIZER), state.get("optimizer", {}))
    training.step, ema.optimization_step = state["step"], state["ema_step"]
    return state["extra"]


def load_weights(file: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Copy a checkpoint's `trained.safetensors` or `ema.safetensors` into the parameters of the same names.

    Raises `UserError` where the file is damaged.
    """
    state_of(file.parent, (file.name,))
    _copy_into(parameters, file)


def trained_file_of(source: Path) -> tuple[Path, dict[str, Tensor]]:
    """Find the weights of `source` and return (file, weights by name).

    `source` is a run or a checkpoint, of which the moving average is taken, or a file of weights.
    """
    file = source
    if (source / "checkpoints").is_dir():
        found = checkpoints(source / "checkpoints")
        if not found:
            raise UserError(f"{source} has no finished checkpoint to start from")
        file = found[-1] / EMA
    elif source.is_dir():
        file = source / EMA
    if not file.is_file():
        raise UserError(
            f"{source} is no run, no checkpoint and no trained.safetensors: a new run cannot start from it"
        )
    if (file.parent / STATE).exists():  # a file that was copied elsewhere has no state.json
        state_of(file.parent, (file.name,))
    return file, _load(file)


@torch.no_grad()
def _copy_into(parameters: dict[str, Tensor], file: Path) -> None:
    """Copy the tensors of a file into those of the same names; raises `UserError` unless names and shapes agree."""
    stored = _load(file)
    if any(name.startswith("unet.") for name in stored):
        raise UserError(
            f"{file} was written by an earlier version of this repository, which named weights unet.…: train the run again, or "
            "go on with that version"
        )
    if differing := set(stored) ^ set(parameters):
        raise UserError(
            f"{file} was written by another model (for instance {min(differing)}): check the run's config"
        )
    for name, parameter in parameters.items():
        if stored[name].shape != parameter.shape:
            raise UserError(
                f"{file}: {name} is {tuple(stored[name].shape)}, the model's is {tuple(parameter.shape)}"
            )
    for name, parameter in parameters.items():
        parameter.copy_(stored[name])


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
