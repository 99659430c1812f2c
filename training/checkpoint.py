"""Checkpoints: safetensors and JSON, written aside and renamed, so that a folder named `step-…` is always whole.

step-0000600/
    trained.safetensors     every trained weight by name: backbone.… (LoRA or plain) and heads.…
    ema.safetensors         their moving average, same names: what evaluation uses
    optimizer.safetensors   the tensors of the optimiser's state by parameter, such as unet.…/exp_avg
    state.json              step, running sums of the metrics, what else the optimiser's state holds,
                        sizes and CRC-32 of the files above and of itself

Whatever reads one checks that it is as it was written. A training renames a damaged one to `damaged-step-…` and goes on from
the one before.
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
WEIGHTS = {"ema": EMA, "raw": TRAINED}  # by the name that evaluation has for them


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
    """Write `folder/step-…` and delete all but the newest `keep` and those at multiples of `keep_every`; returns its path.

    `parameters` are the trained ones by name, in the order `ema` was built with; `extra` is anything JSON can hold. Raises
    `UserError` when it cannot be written; what was there before is then still there.
    """
    final = folder / f"step-{step:07d}"
    moments, values = flat_state(optimizer, parameters)
    state = {
        "step": step,
        "ema_step": ema.optimization_step,
        "optimizer": values,
        "extra": extra,
    }
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
    """Size and CRC-32 of a file."""
    checksum, size = 0, 0
    with open(file, "rb") as opened:
        while block := opened.read(2**24):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written, None where there never was one.

    Newer ones are reported and renamed to `damaged-…`. Raises `UserError`, and renames none, when one cannot be read for now,
    or when all are damaged: a training of days must not start anew by itself, neither now nor when the command is repeated.
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
    """Something in a checkpoint is not as it was written."""


def _verify(path: Path, names: tuple[str, ...] = (TRAINED, EMA, OPTIMIZER)) -> dict:
    """Compare files of a checkpoint with what its state says of them; returns the state."""
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
    """The state with the CRC-32 of itself."""
    bare = {key: value for key, value in state.items() if key != "crc32"}
    return bare | {"crc32": zlib.crc32(json.dumps(bare, sort_keys=True).encode())}


def contents_of(path: Path) -> dict[str, dict[str, int]]:
    """Sizes and CRC-32 of a checkpoint's files, as they were written; raises `UserError` where nobody can say."""
    return _check_whole(path, ())["files"]


def images_per_step_of(path: Path) -> int:
    """Images that each step up to a checkpoint took."""
    return _check_whole(path, ())["extra"]["data"]["images_per_step"]


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def _is_named(path: Path) -> bool:
    return re.fullmatch(r"step-\d{7,}", path.name) is not None


@torch.no_grad()
def restore_checkpoint(
    path: Path, *, parameters: dict[str, nn.Parameter], optimizer, ema
) -> tuple[int, dict]:
    """Put everything back as it was when a whole checkpoint was written; returns its step and `extra`."""
    state = json.loads((path / STATE).read_bytes())
    for name, value in _matching(path / TRAINED, parameters).items():
        parameters[name].copy_(value)
    for shadow, value in zip(ema.shadow_params, _matching(path / EMA, parameters).values(), strict=True):
        shadow.copy_(value)
    ema.optimization_step = state["ema_step"]
    values = state.get("optimizer", {})  # absent where a checkpoint is older than optim.name
    load_flat_state(optimizer, parameters, _load(path / OPTIMIZER), values)
    return state["step"], state["extra"]


@torch.no_grad()
def load_weights(file: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Copy a checkpoint's `trained.safetensors` or `ema.safetensors` into parameters of the same names; raises `UserError` for
    damage."""
    _check_whole(file.parent, (file.name,))
    for name, value in _matching(file, parameters).items():
        parameters[name].copy_(value)


def _check_whole(path: Path, names: tuple[str, ...]) -> dict:
    """`_verify`, whose complaint is the user's."""
    try:
        return _verify(path, names)
    except (_DamagedError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another checkpoint") from None


def trained_file_of(source: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights that `source` means, a run, a checkpoint (their moving average) or a file, as (file, weights by name)."""
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
    if (file.parent / STATE).exists():  # else somebody has taken the file elsewhere
        _check_whole(file.parent, (file.name,))
    return file, _load(file)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder by step number."""
    found = (path for path in folder.glob("step-*") if _is_named(path) and (path / STATE).exists())
    return sorted(found, key=step_of)


def _matching(file: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The file's tensors in the order of `parameters`; raises `UserError` unless names and shapes agree."""
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
    """Copies of them, since safetensors refuses those that share memory."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
