"""Option names of papers and of other trainers, and what they are called here (docs/method.md has the table of `urepa_*`)."""

from typing import Any

from common.errors import UserError

# Names that mean the same may stand at the top level of a YAML file or in `key=value`.
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
_TEACHER = "the cache decides: run script 3 with --teacher {hub_id}, and set teacher.model, teacher.dim and teacher.grid"
# Names without a direct equal, and what to use, in which {hub_id} and {grid} are made of the value.
REFUSED = {
    "urepa_model": _TEACHER,
    "urepa_encoder": _TEACHER,
    "urepa_enabled": "use align.coeff=0 to switch the alignment off",
    "urepa_encoder_image_size": "use teacher.grid{grid}, tokens per side (image size / patch 14), as script 3's --grid",
    "urepa_use_tae": "use teacher.source=online with teacher.decoder=madebyollin/taesd",
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
}
SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}


def own_name(key: str, value: Any) -> str:
    """Returns the key under which a setting is known here; raises `UserError` for one without an equal."""
    if key in REFUSED:
        grid = f"={value // 14}" if type(value) is int else ""
        raise UserError(f"{key} has no direct equal: {REFUSED[key].format(hub_id=hub_id(value), grid=grid)}")
    return RENAMED.get(key, key)


def hub_id(name: Any) -> str:
    """`dinov2_vitl14_reg` and the like as a Hugging Face id; other names as they are."""
    word = f"{name!s:.80}"
    if not word.startswith("dinov2_vit") or word[10:11] not in SIZES:
        return word
    return f"facebook/dinov2-{'with-registers-' if '_reg' in word else ''}{SIZES[word[10]]}"


def rename_aliases(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a file with its aliases renamed; raises `UserError` where both names are given."""
    aliases = [key for key in data if key in RENAMED or key in REFUSED]
    renamed = {key: value for key, value in data.items() if key not in aliases}
    for alias in aliases:
        if alias == "urepa_enabled" and data[alias] is True:  # as it always is here, unless λ is 0
            continue
        key = own_name(alias, data[alias])
        section, name = key.split(".")
        settings = renamed.get(section) or {}
        if isinstance(settings, dict):  # the schema says what is wrong with another section
            if name in settings:
                raise UserError(f"{where}: {alias} and {key} are the same setting: give one of them")
            renamed[section] = settings | {name: data[alias]}
    return renamed
