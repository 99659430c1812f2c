"""Option names of papers and of other trainers, and what they are called here (docs/method.md has the table of them)."""

import os
import re
from typing import Any

from common.errors import UserError

PATCH = 14  # px of DINOv2
SHARED = {
    "lambda": "align.coeff",
    "scheduler": "align.schedule",
    "warmup_steps": "align.warmup_steps",
    "decay_steps": "align.decay_steps",
    "lambda_end": "align.coeff_end",
    "power": "align.power",
    "cutoff_step": "align.cutoff_step",
    "similarity_threshold": "align.similarity_threshold",
    "similarity_ema_decay": "align.similarity_ema_decay",
    "threshold_mode": "align.threshold_mode",
    "model": "teacher.model",
    "encoder": "teacher.model",
    "encoder_image_size": "teacher.grid",
}
# Names that mean the same may stand at the top level of a file or in `key=value`.
RENAMED = {f"{method}_{name}": key for method in ("urepa", "crepa") for name, key in SHARED.items()} | {
    "urepa_manifold_weight": "align.manifold_coeff",
    "crepa_block_index": "align.taps",
    "crepa_spatial_align": "align.spatial",
    "crepa_adjacent_distance": "align.neighbours",
    "crepa_adjacent_tau": "align.neighbour_tau",
    "crepa_cumulative_neighbors": "align.cumulative",
    "crepa_normalize_by_frames": "align.normalize_by_frames",
    "crepa_normalize_neighbour_sum": "align.normalize_neighbours",
    "crepa_use_backbone_features": "teacher.source",
    "crepa_teacher_block_index": "teacher.block",
}
# Switches with the value that says what is so here anyway.
AS_IT_IS = {
    "urepa_enabled": True,
    "crepa_enabled": True,
    "crepa_drop_vae_encoder": True,
    "urepa_use_tae": False,
    "crepa_use_tae": False,
    "crepa_use_backbone_features": False,
}
_OFF = "use align.coeff=0 to switch the alignment off"
_TAE = "use teacher.source=online with teacher.decoder=madebyollin/taesd"
# Names without a direct equal, and what to use.
REFUSED = {
    "urepa_enabled": _OFF,
    "crepa_enabled": _OFF,
    "urepa_use_tae": _TAE,
    "crepa_use_tae": _TAE,
    "crepa_drop_vae_encoder": "a training never encodes pixels, so it loads no VAE encoder: leave it out",
}
# Unknown keys whose error names ours.
SUGGESTED = {
    "lambda": "align.coeff",
    "repa_lambda": "align.coeff",
    "proj_coeff": "align.coeff",
    "align_coeff": "align.coeff",
    "w": "align.manifold_coeff",
    "layer": "align.taps",
    "encoder_depth": "align.taps",
    "enc_type": "teacher.model",
    "projector_dim": "align.head_hidden",
    "pretrained_model_name_or_path": "model.base",
    "model_type": "model.train",
    "data_backend_config": "data.csv",
    "train_batch_size": "data.batch_size",
    "caption_dropout_probability": "data.caption_dropout",
    "learning_rate": "optim.lr",
    "optimizer": "optim.name",
    "lr_warmup_steps": "optim.warmup_fraction",
    "max_grad_norm": "optim.grad_clip",
    "gradient_accumulation_steps": "optim.accumulate",
    "max_train_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "mixed_precision": "train.precision",
    "checkpointing_steps": "train.checkpoint_every",
    "checkpoint_step_interval": "train.checkpoint_every",
    "checkpoints_total_limit": "train.keep_checkpoints",
    "validation_steps": "train.preview_every",
    "validation_step_interval": "train.preview_every",
    "validation_prompt": "train.preview_prompts",
    "validation_guidance": "eval.cfg",
    "validation_num_inference_steps": "eval.sampling_steps",
    "tracker_project_name": "train.wandb",
    "output_dir": "run",
}
# As facebookresearch names DINOv2, and its files; the names on the hub, and the widths of the tokens.
DINOV2 = re.compile(r"dinov2_vit([sblg])14(_reg4?)?(_pretrain\.pth)?")
SIZES = {"s": ("small", 384), "b": ("base", 768), "l": ("large", 1024), "g": ("giant", 1536)}


def own_settings(key: str, value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings {dotted key: value} that a setting is here, and those that it implies where they are not given.

    Raises `UserError` for one without an equal.
    """
    alias = key.removeprefix("--")  # as in other trainers' JSON
    if alias in AS_IT_IS and value is AS_IT_IS[alias]:
        return {}, {
            "align.manifold_coeff": 0.0
        } if alias == "crepa_enabled" else {}  # REPA has no manifold loss
    if alias in REFUSED:
        raise UserError(f"{key} has no direct equal: {REFUSED[alias]}")
    if alias not in RENAMED:
        return {key: value}, {}
    name, implied = RENAMED[alias], {}
    if name == "teacher.model" and isinstance(value, str):
        if known := _dinov2(value):
            implied["teacher.dim"] = SIZES[known[1]][1]
        value = hub_id(value)
    elif name == "teacher.grid" and type(value) is int:
        if value % PATCH:
            raise UserError(f"{key} = {value}: DINOv2 has patches of {PATCH} px, so give a multiple of that")
        value //= PATCH
    elif alias.endswith("_block_index") and type(value) is int:
        value = [f"block{value}"] if name == "align.taps" else f"block{value}"
    elif name == "teacher.source" and value is True:
        value = "backbone"
    return {name: value}, implied


def hub_id(name: str) -> str:
    """Return the Hugging Face id of `dinov2_vitl14_reg` and the like, and of the published files; other names as they are."""
    if not (known := _dinov2(name)):
        return name
    return f"facebook/dinov2-{'with-registers-' if known[2] else ''}{SIZES[known[1]][0]}"


def _dinov2(name: str) -> re.Match | None:
    return DINOV2.fullmatch(os.path.basename(name))


def rename_aliases(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a file with its aliases renamed; raises `UserError` where two names of one setting are given."""
    renamed, given, implied = {}, {}, {}
    for key, value in data.items():
        own, also = own_settings(key, value)
        implied |= also
        if key in own:
            renamed[key] = value
            continue
        for name, value_here in own.items():
            if name in given:
                raise UserError(_same_setting(where, key, given[name][0]))
            given[name] = key, value_here
    for name, (key, value) in given.items():
        section, last = name.split(".")
        settings = renamed.get(section) or {}
        if isinstance(settings, dict):  # the schema says what is wrong with another section
            if last in settings:
                raise UserError(_same_setting(where, key, name))
            renamed[section] = settings | {last: value}
    for name, value in implied.items():
        section, last = name.split(".")
        settings = renamed.get(section) or {}
        if isinstance(settings, dict):
            renamed[section] = {last: value} | settings
    return renamed


def _same_setting(where: str, one: str, other: str) -> str:
    return f"{where}: {one} and {other} are the same setting: give one of them"
