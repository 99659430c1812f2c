"""The option names that users of other trainers know, `urepa_*`, and what they are called here (docs/method.md has the table).

An alias stands at the top level of a YAML file or in `key=value`. Where the meaning is the same it is renamed; the rest are
refused with the name to use.
"""

from collections.abc import Callable
from typing import Any

from common.errors import UserError

PREFIX = "urepa_"
RENAMED = {
    "urepa_lambda": "align.coeff",
    "urepa_manifold_weight": "align.manifold_coeff",
    "urepa_scheduler": "align.schedule",
    "urepa_warmup_steps": "align.warmup_steps",
    "urepa_decay_steps": "align.decay_steps",
    "urepa_lambda_end": "align.coeff_end",
    "urepa_power": "align.power",
    "urepa_cutoff_step": "align.cutoff_step",
    "urepa_similarity_threshold": "align.similarity_threshold",
    "urepa_similarity_ema_decay": "align.similarity_ema_decay",
    "urepa_threshold_mode": "align.threshold_mode",
}
REFUSED: dict[str, Callable[[Any], str]] = {
    "urepa_enabled": lambda _: "use align.coeff=0 to switch the alignment off",
    "urepa_model": lambda name: (
        f"the cache decides: run script 3 with --teacher {hub_id(name)}, and set teacher.model, teacher.dim and teacher.grid"
    ),
    "urepa_encoder": lambda name: REFUSED["urepa_model"](name),
    "urepa_encoder_image_size": lambda size: (
        f"use teacher.grid={size // 14}, tokens per side (image size / patch 14), as script 3's --grid"
        if type(size) is int
        else "use teacher.grid, tokens per side (image size / patch 14), as script 3's --grid"
    ),
    "urepa_use_tae": lambda _: "use teacher.source=online with teacher.decoder=madebyollin/taesd",
}
SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}


def hub_id(name: Any) -> str:
    """`dinov2_vitl14_reg` and the like as a Hugging Face id; other names as they are."""
    word = str(name)
    if not word.startswith("dinov2_vit") or word[10:11] not in SIZES:
        return word
    return f"facebook/dinov2-{'with-registers-' if '_reg' in word else ''}{SIZES[word[10]]}"


def own_name(key: str, value: Any) -> tuple[str, Any]:
    """The key under which a setting is known here, and its value; raises `UserError` for an alias without an equal."""
    if key in RENAMED:
        return RENAMED[key], value
    if key in REFUSED:
        raise UserError(f"{key} has no direct equal: {REFUSED[key](value)}")
    return key, value


def rename_aliases(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a file with its aliases renamed; raises `UserError` where both names are given."""
    renamed = {key: value for key, value in data.items() if not str(key).startswith(PREFIX)}
    for alias, value in data.items():
        if alias in renamed or (
            alias == "urepa_enabled" and value is True
        ):  # as everything here is, unless λ is 0
            continue
        key, value = own_name(alias, value)
        section, _, name = key.partition(".")
        if not name:  # an unknown urepa_ name: the schema says so
            renamed[key] = value
            continue
        settings = renamed.get(section)
        if not isinstance(settings, dict | None):  # the schema says what is wrong with it
            continue
        settings = dict(settings or {})
        if name in settings:
            raise UserError(f"{where}: {alias} and {key} are the same setting: give one of them")
        renamed[section] = settings | {name: value}
    return renamed
