"""The one dialect of YAML that configs and the values of `key=value` are written in: the core schema of YAML 1.2.

Only true and false are booleans, 010 is ten, 0o10 and 0x8 are eight, 1e-4 is a number; `yes`, 1:30, 1_0 and dates are text.
There are no merge keys (<<) and no tags but those of the core schema. Any text that is not of this dialect, or too large to be
a config, raises `UserError`. Nothing else of this program knows PyYAML.
"""

import copy
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from common.errors import UserError
from common.reading import read_text

LIMIT = 2**16  # bytes of a text: PyYAML reads some 100,000 a second, and a config has 3,000
DEPTH = 20  # levels
NODES = 10_000  # values of a text, with those that aliases repeat
DIGITS = 100  # characters of a number
CORE = "tag:yaml.org,2002:"
# Plain scalars by the core schema (YAML 1.2.2, chapter 10.3.2): form, characters that each may begin with, and value.
SCALARS = {
    "null": (r"null|Null|NULL|~|", ["~", "n", "N", ""], lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF"), lambda text: text.lower() == "true"),
    "int": (
        r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        list("-+0123456789"),
        lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
        lambda text: float(text.replace(".", "") if text[-1] in "fFnN" else text),
    ),
}
UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # can be in no name, and in no file


class _Loader(yaml.SafeLoader):
    """PyYAML up to the nodes, which knows the core schema's scalars alone."""

    yaml_implicit_resolvers: ClassVar = {}
    _level = 0

    def compose_node(self, parent, index):
        if self._level > DEPTH:
            raise _NotRead(f"it has more than {DEPTH} levels")
        if getattr(self.peek_event(), "tag", None) == "!":  # text by the specification, which PyYAML forgets
            raise _NotRead("the tag ! is not read here: use quotes")
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""

    yaml_implicit_resolvers: ClassVar = copy.deepcopy(yaml.SafeDumper.yaml_implicit_resolvers)


for _name, (_pattern, _first, _) in SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"{CORE}{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read_yaml_file(path: str | Path) -> Any:
    """Return the value of a file, JSON too; raises `UserError` with the file."""
    text = read_text(path, LIMIT)
    if Path(path).suffix == ".json":  # a tab is a blank there, and cannot be in a string
        text = text.replace("\t", " ")
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a text; raises `UserError`, which names the text as `where`."""
    try:
        if len(text) > LIMIT:
            raise _NotRead(f"it is longer than {LIMIT:,} characters")
        node = _Loader(text).get_single_node()
        return None if node is None else _Values().of(node, 1)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML raises ValueError and OverflowError for characters that are none, and for a version of too many digits.
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
    raise UserError(f"{where} is not valid YAML: {reason:.300}") from None


def write_yaml(value: Any, **style: Any) -> str:
    """Return YAML that `parse_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)


def check_writable(text: str) -> str:
    """Return the text; raises `ValueError` where it holds NUL or a lone surrogate."""
    if found := UNWRITABLE.search(text):
        raise ValueError(f"the character {found[0]!a} can be in no name")
    return text


class _NotRead(yaml.YAMLError):
    """What YAML has, and this dialect has not."""

    def __init__(self, reason: str, node: yaml.Node | None = None):
        super().__init__(reason if node is None else f"{reason} (line {node.start_mark.line + 1})")


class _Values:
    """The values of nodes; counts them, those that aliases repeat as often as they are repeated."""

    def __init__(self):
        self._count = 0

    def of(self, node: yaml.Node, depth: int) -> Any:
        self._count += 1
        if depth > DEPTH:
            raise _NotRead(f"it has more than {DEPTH} levels, or an alias of itself", node)
        if self._count > NODES:
            raise _NotRead(f"it has more than {NODES:,} values")
        name = node.tag.removeprefix(CORE)
        match node:
            case yaml.ScalarNode() if name in SCALARS or name == "str":
                return _scalar(name, node)
            case yaml.SequenceNode() if name == "seq":
                return [self.of(item, depth + 1) for item in node.value]
            case yaml.MappingNode() if name == "map":
                return self._mapping(node, depth)
        raise _NotRead(f"the tag {node.tag:.80} is not read here: leave it out", node)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        found = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{CORE}str" or len(key.value) > DIGITS:
                what = f", not {key.value:.80}" if isinstance(key, yaml.ScalarNode) else ""
                raise _NotRead(f"a key must be a name{what}", key)
            name = _scalar("str", key)
            if name == "<<":
                raise _NotRead("merge keys (<<) are not read here: write them out, or use extends", key)
            if name in found:
                raise _NotRead(f"{name} is given twice", key)
            found[name] = self.of(value, depth + 1)
        return found


def _scalar(name: str, node: yaml.ScalarNode) -> bool | int | float | str | None:
    text = node.value
    if name == "str":  # in which JSON writes a character beyond 16 bits as two escapes
        return check_writable(text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"))
    if len(text) > DIGITS:
        raise _NotRead(f"{text[:20]}… is too long a number", node)
    if not re.fullmatch(SCALARS[name][0], text):  # after a tag, such as !!int x
        raise _NotRead(f"{text} is no {name}", node)
    return SCALARS[name][2](text)
