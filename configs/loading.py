"""Read a config: YAML is the truth (JSON too), `key=value` overrides it, and an unknown key is an error that names the nearest.

config = load_config("configs/A.yaml", ["align.coeff=0", "run=runs/A_baseline"])
config = load_config(["configs/A.yaml", "configs/ablations/token_only.yaml"], ["run=runs/A_token_only"])
"""

import difflib
import functools
import math
import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from common.errors import UserError
from common.files import expand_home
from common.reading import UnreadableFile
from configs.aliases import SUGGESTED, own_settings, rename_aliases
from configs.dialect import check_writable, parse_yaml, read_yaml_file, write_yaml
from configs.evaluation import Eval
from configs.schema import Config

A_NAME = "a name was expected"
# What stands in place of pydantic's words for types that a config has no names for.
EXPECTED = {
    "string_type": A_NAME,
    "is_instance_of": A_NAME,
    "tuple_type": "a list was expected, such as [a, b]",
    "model_type": "a section was expected, with its settings below its name",
}


def load_config(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, apply dotted `key=value` overrides, check everything; raise `UserError` with one line.

    Of several files each is laid over the ones before it.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    data = functools.reduce(_overlay, map(read_yaml, paths))
    return parse_config(data, overrides, where=" + ".join(map(str, paths)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping in YAML or JSON; `extends: other.yaml` lays it over another file, given from where this one is."""
    layers, read, above = [], set(), ""
    while path is not None:
        if os.path.realpath(path) in read:
            raise UserError(f"{path} extends itself")
        try:
            data = read_yaml_file(path)
        except UnreadableFile as error:
            raise UserError(f"{above}{error}") from None
        if not isinstance(data, dict):
            raise UserError(f"{above}{path} holds no settings (a YAML mapping was expected)")
        read.add(os.path.realpath(path))
        extends = data.pop("extends", None)
        if not isinstance(extends, str | None) or extends == "":
            raise UserError(f"{path}: extends = {extends!r:.80}: give the name of a file")
        layers.append(rename_aliases(data, str(path)))
        above = f"{path} extends {extends}: "
        path = None if extends is None else Path(path).parent / expand_home(extends)
    return functools.reduce(_overlay, reversed(layers))


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay `above` over `below`, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def parse_config(data: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "config") -> Config:
    """Check a mapping of settings against the schema, after applying dotted `key=value` overrides."""
    wanted, implied = [], {}
    for override in overrides:
        settings, also = _parse_override(override)
        wanted += ((override, *setting) for setting in settings.items())
        implied |= also
    given = {key for _, key, _ in wanted}
    wanted += ((key, key, value) for key, value in implied.items() if key not in given)
    for override, key, value in wanted:
        node = data
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"'{override:.80}': {section} is a value, not a section")
        node[name] = value
    return _checked(data, given | implied.keys(), where)


def _parse_override(override: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings {dotted key: value} of a `key=value`, under the names that they have here, and those that they imply."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override:.80}' is not of the form key=value, for instance align.coeff=0")
    try:
        value = check_writable(text) if " #" in text else parse_yaml(text, "it")  # a path, not a comment
    except (UserError, ValueError) as error:
        raise UserError(f"cannot read the value of '{override:.80}': {error}") from None
    return own_settings(key, value)


def eval_changes(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` overrides of `eval` as {dotted key: value}; raises `UserError` for unknown keys and for other sections."""
    changes = {}
    for override in overrides:
        changes |= _parse_override(override)[0]
    for key in changes:
        check_key(key)
        if not key.startswith("eval."):
            raise UserError(
                f"{key} is a setting of the training: an evaluation takes settings of eval alone, for instance eval.cfg=7.5"
            )
    return changes


def check_key(key: str) -> None:
    """Raise `UserError` for the dotted key of no setting."""
    if key in Config.model_fields and key not in knobs():
        one = next(name for name in knobs() if name.startswith(f"{key}."))
        raise UserError(f"{key} is a section: name one of its settings, such as {one}")
    if key not in knobs():
        raise UserError(_unknown_key(key))


def with_settings(config: Config, changes: dict[str, Any]) -> Config:
    """Returns the config with other values under these dotted keys, checked as a whole; raises `UserError` with one line."""
    data = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        data[section][name] = value
    return _checked(data, set(changes), "config")


def eval_settings(changes: dict[str, Any]) -> Eval:
    """Returns settings of `eval` for where there is no run, by their dotted keys; raises `UserError` with one line."""
    try:
        return Eval.model_validate({key.removeprefix("eval."): value for key, value in changes.items()})
    except ValidationError as error:
        raise UserError(_first_problem(error, prefix="eval.")) from None


def _checked(data: dict[str, Any], given: set[str], where: str) -> Config:
    """Check these settings; an error names the file, unless it is about one of those `given` by hand."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        place = _key_of(error.errors()[0]["loc"], levels=2)
        by_hand = place in given or any(key.startswith(f"{place}.") for key in given)
        raise UserError(f"{'' if by_hand else f'{where}: '}{_first_problem(error)}") from None


def resolved_yaml(config: Config) -> str:
    """The full config, defaults included, as YAML."""
    return write_yaml(config.model_dump(mode="json"))


def knobs(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key with its pydantic field, in schema order."""
    found = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= knobs(field.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field
    return found


def knobs_help(section: str | None = None) -> str:
    """Each knob's key, default, choices and meaning, of one section or of all, for `--help`."""
    lines, last = [], section or ""
    for key, field in knobs().items():
        if section is not None and not key.startswith(f"{section}."):
            continue
        if "." in key and (here := key.split(".")[0]) != last:
            lines.append("")
            last = here
        default = "required" if field.is_required() else yaml_value(field.default)
        choices = f" ({' | '.join(options)})" if (options := _choices(field.annotation)) else ""
        lines.append(f"  {key} = {default}{choices}\n      {field.description}")
    return "\n".join(lines)


def yaml_value(value) -> str:
    """A value as one would write it in a file."""
    plain = list(value) if isinstance(value, tuple) else value
    text = write_yaml(plain, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n...\n").strip()


def _choices(annotation) -> list[str]:
    if get_origin(annotation) is Literal:
        return [yaml_value(option) for option in get_args(annotation)]
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        return [choice for argument in get_args(annotation) for choice in _choices(argument)]
    return []


def _unknown_key(key: str) -> str:
    """The complaint about a key that is not known, with the one that was probably meant."""
    known = list(knobs()) + [name for name in Config.model_fields if name not in knobs()]
    if key in known:
        return f"'{key}' in a file is written nested, as configs/A.yaml does, not with a dot"
    last = key.rsplit(".", 1)[-1].removeprefix("--")
    near = [SUGGESTED[last]] if last in SUGGESTED else difflib.get_close_matches(key, known, n=1)
    if not near:  # the right name in the wrong section
        near = [name for name in known if name.rsplit(".", 1)[-1] == last]
    return f"unknown key '{key:.80}'" + (
        f"; did you mean '{near[0]}'?" if near else "; --help lists all keys"
    )


def _first_problem(error: ValidationError, prefix: str = "") -> str:
    """The first of pydantic's complaints, as one line that says what to do; `prefix` is the section that was checked."""
    problem = error.errors()[0]
    place = _key_of(problem["loc"], levels=1 if prefix else 2)
    key = place and f"{prefix}{place}"
    if problem["type"] == "extra_forbidden":
        return _unknown_key(key)
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return f"{key} = {problem['input']!r:.80}: it needs more values"
    if problem["type"] == "missing" and key in knobs():
        return f"'{key}' is missing ({knobs()[key].description})"
    if problem["type"] == "missing":
        return f"section '{key}' is missing"
    message = EXPECTED.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if message == A_NAME and isinstance(problem["input"], int | float):
        message += ": write a number in quotes, such as '\"7\"'"
    of_one_key = key in knobs() or (key and problem["type"] != "value_error")
    return f"{key} = {problem['input']!r:.80}: {message}" if of_one_key else message


def _key_of(place: Sequence[str | int], levels: int) -> str:
    """The dotted key of a complaint's place, without the kind that pydantic adds where a value may be of several."""
    return ".".join([part for part in place if isinstance(part, str)][:levels])
