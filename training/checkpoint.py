"""Checkpoints: safetensors and JSON, written aside and renamed, so that a folder named `step-…` is always whole.

step-0000600/
    trained.safetensors     every trained weight by name: unet.… (LoRA or plain) and heads.…
    ema.safetensors         their moving average, same names: what evaluation uses
    optimizer.safetensors   AdamW's moments
    state.json              step, learning-rate schedule, running sums of the metrics
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import UserError
from files import write_json, written_whole

TRAINED, EMA, OPTIMIZER, STATE = (
    "trained.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "state.json",
)


def save_checkpoint(
    folder: Path, step: int, *, parameters: dict[str, nn.Parameter], optimizer, lr_schedule, ema, extra, keep
):
    """Write `folder/step-…` and delete all but the newest `keep`; returns the new checkpoint's path.

    `parameters` are the trained ones by name, in the order `ema` was built with; `extra` is anything JSON can hold.
    """
    final = folder / f"step-{step:07d}"
    moments = {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    state = {
        "step": step,
        "ema_step": ema.optimization_step,
        "lr_schedule": lr_schedule.state_dict(),
        "extra": extra,
    }
    shutil.rmtree(final, ignore_errors=True)
    try:
        with written_whole(final) as aside:
            save_file(_on_cpu(parameters), aside / TRAINED)
            save_file(_on_cpu(dict(zip(parameters, ema.shadow_params, strict=True))), aside / EMA)
            save_file(_on_cpu(moments), aside / OPTIMIZER)
            write_json(aside / STATE, state)
    except (OSError, SafetensorError) as error:
        reason = f"cannot write the checkpoint of step {step} ({error})"
        raise UserError(
            f"{reason}: free some disk; the same command goes on from the checkpoint before"
        ) from None
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def restore_checkpoint(
    path: Path, *, parameters: dict[str, nn.Parameter], optimizer, lr_schedule, ema
) -> tuple[int, dict]:
    """Put everything back as it was when the checkpoint was written; returns its step and `extra`."""
    state = _read_state(path)
    load_weights(path / TRAINED, parameters)
    for shadow, value in zip(ema.shadow_params, _matching(path / EMA, parameters).values(), strict=True):
        shadow.copy_(value)
    ema.optimization_step = state["ema_step"]
    moments = _load(path / OPTIMIZER)
    for name, parameter in parameters.items():
        own = {
            key.removeprefix(f"{name}/"): value
            for key, value in moments.items()
            if key.startswith(f"{name}/")
        }
        # AdamW keeps its step count on the CPU and its moments beside the parameter.
        optimizer.state[parameter] = {
            key: v if key == "step" else v.to(parameter.device) for key, v in own.items()
        }
    lr_schedule.load_state_dict(state["lr_schedule"])
    for group, lr in zip(optimizer.param_groups, lr_schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    return state["step"], state["extra"]


@torch.no_grad()
def load_weights(file: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Copy the weights of `trained.safetensors` or `ema.safetensors` into parameters of the same names."""
    for name, value in _matching(file, parameters).items():
        parameters[name].copy_(value)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder by step number."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).exists())


def _matching(file: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The file's tensors in the order of `parameters`; raises `UserError` unless names and shapes agree."""
    stored = _load(file)
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
        raise UserError(
            f"cannot read {file} ({error}): delete {file.parent} to go on from the checkpoint before"
        ) from None


def _read_state(path: Path) -> dict:
    try:
        return json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path / STATE} ({error}): delete {path} to go on from the one before"
        ) from None


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
