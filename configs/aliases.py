"""The option names of papers and of other trainers, and what they are called here (docs/method.md has the table of `urepa_*`).

A name of the kind "renamed" may stand at the top level of a YAML file or in `key=value`, because it means the same. One that
is "refused" has no direct equal, and the error says what to use. One that is "suggested" is an unknown key whose error names
ours.
"""

from typing import Any, Literal, NamedTuple

from common.errors import UserError


class Foreign(NamedTuple):
    kind: Literal["renamed", "refused", "suggested"]
    here: str  # our key, or for "refused" the advice, in which {hub_id} and {grid} are made of the value


_TEACHER = Foreign(
    "refused",
    "the cache decides: run script 3 with --teacher {hub_id}, and set teacher.model, teacher.dim and teacher.grid",
)
FOREIGN = {
    "urepa_lambda": Foreign("renamed", "align.coeff"),
    "urepa_manifold_weight": Foreign("renamed", "align.manifold_coeff"),
    "urepa_scheduler": Foreign("renamed", "align.schedule"),
    "urepa_warmup_steps": Foreign("renamed", "align.warmup_steps"),
    "urepa_decay_steps": Foreign("renamed", "align.decay_steps"),
    "urepa_lambda_end": Foreign("renamed", "align.coeff_end"),
    "urepa_power": Foreign("renamed", "align.power"),
    "urepa_cutoff_step": Foreign("renamed", "align.cutoff_step"),
    "urepa_similarity_threshold": Foreign("renamed", "align.similarity_threshold"),
    "urepa_similarity_ema_decay": Foreign("renamed", "align.similarity_ema_decay"),
    "urepa_threshold_mode": Foreign("renamed", "align.threshold_mode"),
    "urepa_enabled": Foreign("refused", "use align.coeff=0 to switch the alignment off"),
    "urepa_model": _TEACHER,
    "urepa_encoder": _TEACHER,
    "urepa_encoder_image_size": Foreign(
        "refused", "use teacher.grid{grid}, tokens per side (image size / patch 14), as script 3's --grid"
    ),
    "urepa_use_tae": Foreign("refused", "use teacher.source=online with teacher.decoder=madebyollin/taesd"),
    "lambda": Foreign("suggested", "align.coeff"),
    "repa_lambda": Foreign("suggested", "align.coeff"),
    "proj_coeff": Foreign("suggested", "align.coeff"),
    "align_coeff": Foreign("suggested", "align.coeff"),
    "w": Foreign("suggested", "align.manifold_coeff"),
    "layer": Foreign("suggested", "align.taps"),
    "encoder_depth": Foreign("suggested", "align.taps"),
    "enc_type": Foreign("suggested", "teacher.model"),
    "projector_dim": Foreign("suggested", "align.head_hidden"),
}
SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}


def own_name(key: str, value: Any) -> str:
    """Returns the key under which a setting is known here; raises `UserError` for one without an equal."""
    kind, here = FOREIGN.get(key, Foreign("suggested", key))
    if kind == "refused":
        grid = f"={value // 14}" if type(value) is int else ""
        raise UserError(f"{key} has no direct equal: {here.format(hub_id=hub_id(value), grid=grid)}")
    return here if kind == "renamed" else key


def suggestion(key: str) -> str | None:
    """Returns our key for an unknown one that others use, in whatever section it stands."""
    kind, here = FOREIGN.get(key.rsplit(".", 1)[-1], Foreign("renamed", ""))
    return here if kind == "suggested" else None


def hub_id(name: Any) -> str:
    """`dinov2_vitl14_reg` and the like as a Hugging Face id; other names as they are."""
    word = str(name)
    if not word.startswith("dinov2_vit") or word[10:11] not in SIZES:
        return word
    return f"facebook/dinov2-{'with-registers-' if '_reg' in word else ''}{SIZES[word[10]]}"


def rename_aliases(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a file with its aliases renamed; raises `UserError` where both names are given."""
    renamed = {key: value for key, value in data.items() if key not in FOREIGN}
    for alias in (key for key in data if key in FOREIGN):
        if alias == "urepa_enabled" and data[alias] is True:  # as it always is here, unless λ is 0
            continue
        section, _, name = (key := own_name(alias, data[alias])).partition(".")
        settings = renamed.get(section) or {}
        if not name:  # the schema says what is wrong with the key
            renamed[key] = data[alias]
        elif isinstance(settings, dict):  # the schema says what is wrong with another section
            if name in settings:
                raise UserError(f"{where}: {alias} and {key} are the same setting: give one of them")
            renamed[section] = settings | {name: data[alias]}
    return renamed
