"""Configs are read by the core schema of YAML 1.2, and nothing else is read; the tables are those of the specification."""

import random
import time
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from configs.dialect import DEPTH, LIMIT, NODES, parse_yaml, read_yaml_file, write_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
# YAML 1.2.2, chapter 10.3.2 with its example 10.9, and what YAML 1.1 would take for something else than text.
PLAIN = {
    "null": None, "Null": None, "NULL": None, "~": None, "": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "0": 0, "0o7": 7, "0x3A": 58, "-19": -19, "+12": 12, "010": 10, "0o10": 8, "0x10": 16, "09": 9,
    "0.": 0.0, "-0.0": -0.0, ".5": 0.5, "+12e03": 12000.0, "-2E+05": -200000.0, "1e-4": 1e-4, "2.0e-4": 2e-4, "1e3": 1000.0,
    ".inf": float("inf"), "-.Inf": -float("inf"), "+.INF": float("inf"),
    "yes": "yes", "no": "no", "on": "on", "Off": "Off", "y": "y", "tRUE": "tRUE", "nULL": "nULL",
    "1_0": "1_0", "0b1": "0b1", "-0x1": "-0x1", "0o8": "0o8", "0x_": "0x_", "1:30": "1:30", "1:30.5": "1:30.5", "=": "=",
    "2024-02-30": "2024-02-30", "2024-02-20": "2024-02-20", "2001-12-14 21:59:43.10": "2001-12-14 21:59:43.10",
    "1e": "1e", "e5": "e5", ".": ".", "-": [None], "1.2.3": "1.2.3", ".e1": ".e1", "inf": "inf", "nan": "nan", "٣": "٣",
    "'3'": "3", '"true"': "true", "!!str 3": "3", "!!int '3'": 3, "!!float 3": 3.0, "!!null ''": None, "!!bool 'true'": True,
    '"\\ud83d\\ude00"': "\N{GRINNING FACE}",  # as JSON writes it
    "[mid, 1]": ["mid", 1], "{a: {b: 1.5}}": {"a": {"b": 1.5}}, "!!map {a: !!seq [b]}": {"a": ["b"]}, "a # b": "a",
}  # fmt: skip
REFUSED = {
    "<<: {a: 1}": "merge keys", "{a: &a {b: 1}, c: {<<: *a}}": "merge keys",
    "a: 1\na: 2": "a is given twice", '{a: 1, "a": 2}': "a is given twice",
    "1: 2": "a key must be a name, not 1", "true: 2": "a key must be a name", "? [a]\n: 2": "a key must be a name",
    f"{'a' * 1000}: 2": "a key must be a name",
    "!!int x": "x is no int", "!!int 1.5": "1.5 is no int", "!!bool yes": "yes is no bool", "!!null x": "x is no null",
    "!!float 1:30": "1:30 is no float",
    "!!set {a}": "the tag", "!!omap [a: 1]": "the tag", "!!binary YQ==": "the tag", "!!timestamp 2024-02-20": "the tag",
    "!!python/object/apply:os.system [x]": "the tag", "!mine x": "the tag", "! 12": "the tag !", "!!seq x": "the tag",
    "9" * 5000: "too long a number", "0x" + "f" * 5000: "too long a number", "1." + "0" * 5000: "too long a number",
    "&a [*a]": "alias of itself", "*a": "undefined alias",
    "[" * 3000: "levels", "{a: " * 3000: "levels", "- " * 3000: "levels", "[" * (DEPTH + 1) + "]" * (DEPTH + 1): "levels",
    "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]": "values",
    "[" + "x," * (NODES + 1) + "]": "values", "x" * (LIMIT + 1): "longer",
    "a: 1\n--- \nb: 2": "single document", "[a": "expected", "a: b: c": "mapping values", "a:\n\tb: 1": "\\t",
    '"\\ud800"': "ud800", '"\\0"': "x00", "a\0": "#x0000", '"\\UFFFFFFFF"': "", f"%YAML {'9' * 5000}.1\n--- a": "",
}  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_means_what_the_core_schema_says(text):
    found = parse_yaml(text, "it")
    assert (found, type(found)) == (PLAIN[text], type(PLAIN[text]))


def test_not_a_number_is_a_number():
    for text in (".nan", ".NaN", ".NAN"):
        assert str(parse_yaml(text, "it")) == "nan"


@pytest.mark.parametrize("text", REFUSED, ids=[repr(text)[:40] for text in REFUSED])
def test_every_other_text_is_one_line_within_a_second(text):
    began = time.process_time()
    with pytest.raises(UserError, match=r"^bad\.yaml is not valid YAML: [^\n]+$") as error:
        parse_yaml(text, "bad.yaml")
    assert time.process_time() - began < 1
    assert REFUSED[text] in str(error.value)
    assert len(str(error.value)) < 400


def test_what_is_written_is_read_as_the_same():
    for value in (value for value in PLAIN.values() if value is not None):
        assert parse_yaml(write_yaml({"a": value, "b": [value]}), "it") == {"a": value, "b": [value]}
    for text in PLAIN:  # also as text, for which both versions of YAML need quotes
        assert parse_yaml(write_yaml([text]), "it") == yaml.safe_load(write_yaml([text])) == [text]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_a_committed_config_means_the_same_to_other_readers(path):
    assert read_yaml_file(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_a_damaged_config_is_read_or_is_one_line():
    bits = [*"[]{}:,!&*'|>\n\t\x85\ud800", "- ", "<<", "---", "0x", "!!", "&a", "*a", "%TAG", '"\\U']
    dice = random.Random(0)
    whole = CONFIGS[0].read_text(encoding="utf-8")[:300]
    for _ in range(2000):
        text = whole
        for _ in range(dice.randint(1, 5)):
            at = dice.randrange(len(text))
            text = text[:at] + dice.choice(bits) + text[at + dice.randint(0, 3) :]
        try:
            parse_yaml(text, "it")
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
