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

import json
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_json, written_whole
from training.optimizer_state import flat_state, load_flat_state

TRAINED, EMA, OPTIMIZER, STATE = (
    "trained.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "state.json",
)
WEIGHTS = {"ema": EMA, "raw": TRAINED}  # from the name that evaluation uses to the file


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    parameters: dict[str, nn.Parameter],
    optimizer,
    ema,
    extra,
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write `folder/step-…` and return its path; delete old checkpoints.

    The newest `keep` checkpoints stay, and those at multiples of `keep_every`. `parameters` are the trained parameters by name,
    in the order with which `ema` was built; `extra` is anything that JSON can hold. Raises `UserError` when the checkpoint
    cannot be written; the earlier checkpoints are then untouched.
    """
    final = folder / f"step-{step:07d}"
    moments, values = flat_state(optimizer, parameters)
    state = {"step": step, "ema_step": ema.optimization_step, "optimizer": values, "extra": extra}
    shutil.rmtree(final, ignore_errors=True)
    averages = dict(zip(parameters, ema.shadow_params, strict=True))
    try:
        with written_whole(final) as aside:
            for tensors, name in ((parameters, TRAINED), (averages, EMA), (moments, OPTIMIZER)):
                save_file(_on_cpu(tensors), aside / name)
            files = {name: fingerprint(aside / name) for name in (TRAINED, EMA, OPTIMIZER)}
            write_json(aside / STATE, _sealed(state | {"files": files}))
    except (OSError, SafetensorError) as error:
        reason = f"cannot write the checkpoint of step {step} ({error})"
        raise UserError(
            f"{reason}: free some disk; the same command goes on from the checkpoint before"
        ) from None
    for old in checkpoints(folder)[:-keep]:
        if not (keep_every and step_of(old) % keep_every == 0):
            shutil.rmtree(old)
    return final


def fingerprint(file: Path) -> dict[str, int]:
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
    for path in sorted(filter(_is_named, folder.glob("step-*")), key=step_of, reverse=True):
        try:
            _verify(path)
        except _DamagedError as damage:
            damaged.append((path, damage))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; nothing was changed") from None
        else:
            for other, damage in damaged:
                aside = other.with_name(f"damaged-{other.name}")
                shutil.rmtree(aside, ignore_errors=True)
                other.rename(aside)
                print(f"warning: {other} is damaged ({damage}): it is now {aside.name}; {path.name} is used")
            return path
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole, not even {damaged[-1][0].name} ({damaged[-1][1]}): choose another run=…, or "
            "remove the folder to start anew"
        )
    return None


class _DamagedError(Exception):
    """A file of a checkpoint is missing or has changed since it was written."""


def _verify(path: Path, names: tuple[str, ...] = (TRAINED, EMA, OPTIMIZER)) -> dict:
    """Compare files of a checkpoint with the sizes and CRC-32 in its state.json, and return the state."""
    try:
        state = json.loads((path / STATE).read_bytes())
        if not isinstance(state, dict) or state != _sealed(state) or state["step"] != step_of(path):
            raise _DamagedError(f"{STATE} is not as it was written")
        for name in names:
            if fingerprint(path / name) != state["files"][name]:
                raise _DamagedError(f"{name} is not as it was written")
    except FileNotFoundError as error:
        raise _DamagedError(f"{Path(error.filename).name} is missing") from None
    except ValueError:
        raise _DamagedError(f"{STATE} is not as it was written") from None
    return state


def _sealed(state: dict) -> dict:
    """Return the state with its own CRC-32 added."""
    bare = {key: value for key, value in state.items() if key != "crc32"}
    return bare | {"crc32": zlib.crc32(json.dumps(bare, sort_keys=True).encode())}


def contents_of(path: Path) -> dict[str, dict[str, int]]:
    """Return sizes and CRC-32 of a checkpoint's files from its state.json; raises `UserError` where that is damaged."""
    return _check_whole(path, ())["files"]


def images_per_step_of(path: Path) -> int:
    """Return the number of images that each step before a checkpoint took."""
    return _check_whole(path, ())["extra"]["data"]["images_per_step"]


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def _is_named(path: Path) -> bool:
    return re.fullmatch(r"step-\d{7,}", path.name) is not None


@torch.no_grad()
def restore_checkpoint(
    path: Path, *, parameters: dict[str, nn.Parameter], optimizer, ema
) -> tuple[int, dict]:
    """Restore parameters, optimiser and moving average from an undamaged checkpoint; returns its step and `extra`."""
    state = json.loads((path / STATE).read_bytes())
    for name, value in _matching(path / TRAINED, parameters).items():
        parameters[name].copy_(value)
    for shadow, value in zip(ema.shadow_params, _matching(path / EMA, parameters).values(), strict=True):
        shadow.copy_(value)
    ema.optimization_step = state["ema_step"]
    values = state.get("optimizer", {})  # checkpoints from before optim.name existed have none
    load_flat_state(optimizer, parameters, _load(path / OPTIMIZER), values)
    return state["step"], state["extra"]


@torch.no_grad()
def load_weights(file: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Copy a checkpoint's `trained.safetensors` or `ema.safetensors` into the parameters of the same names.

    Raises `UserError` where the file is damaged.
    """
    _check_whole(file.parent, (file.name,))
    for name, value in _matching(file, parameters).items():
        parameters[name].copy_(value)


def _check_whole(path: Path, names: tuple[str, ...]) -> dict:
    """Call `_verify`, and raise its errors as `UserError`."""
    try:
        return _verify(path, names)
    except (_DamagedError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another checkpoint") from None


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
        _check_whole(file.parent, (file.name,))
    return file, _load(file)


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a folder, sorted by step."""
    found = (path for path in folder.glob("step-*") if _is_named(path) and (path / STATE).exists())
    return sorted(found, key=step_of)


def _matching(file: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the file's tensors in the order of `parameters`; raises `UserError` unless names and shapes agree."""
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
    return {name: stored[name] for name in parameters}


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, because safetensors refuses tensors that share memory."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
