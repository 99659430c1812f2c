"""Names that others chose, read back by a reference reader of Markdown, and by Python and YAML."""

import ast

import pytest
import yaml
from markdown_it import MarkdownIt

from common.plain_text import code, code_block, markdown, printable, quoted

READER = MarkdownIt("commonmark").enable("table")
NAMES = [
    "a_plain.name-1", "$x$ and $y$", "<b>bold</b>", "a|b", "a&amp;b", "**star**", "_under_", "a_b_c", "`code`", "``", "a`b",
    "ends\\", "[link](http://x)", "![image](x)", "~~gone~~", "two\nlines", "\u202elive", "\x1b[31m", "日本語", "\udcff",
    "\\|", "\\`", "-",
]  # fmt: skip


def texts(source, kind="text"):
    """What a reader shows of the inline tokens of a kind."""
    tokens = [child for token in READER.parse(source) for child in token.children or ()]
    return "".join(token.content for token in tokens if kind in (token.type, "all"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_itself_in_a_line_and_in_a_table(name):
    assert texts(f"# {markdown(name)}", "all") == printable(name)
    table = f"| {markdown(name)} | 2 |\n|---|---|\n| {markdown(name)} | 3 |\n"
    assert texts(table, "all") == f"{printable(name)}2{printable(name)}3"
    assert [token.type for token in READER.parse(table)].count("td_open") == 2
    assert not any(t.type == "html_inline" for token in READER.parse(table) for t in token.children or ())


@pytest.mark.parametrize("name", NAMES)
def test_a_name_does_not_end_the_code_around_it(name):
    assert texts(f"of {code(name)} and more", "code_inline") == printable(name)
    (block,) = READER.parse(code_block(f"{name}\n```\nmore\n", "yaml"))
    assert block.content == f"{name}\n```\nmore\n"


@pytest.mark.parametrize("name", [*NAMES, 'a"b', "\x00\t\x7f", "🙂"])
def test_a_quoted_name_is_the_same_in_python_and_where_yaml_can_hold_it(name):
    assert ast.literal_eval(quoted(name)) == name
    assert quoted(name).isprintable()
    if name != "\udcff":
        assert yaml.safe_load(quoted(name)) == name


def test_what_is_not_shown_as_itself_becomes_an_escape_and_is_kept_where_that_is_asked():
    assert printable("a\u202eb\n\x1b\udcff") == "a\\u202eb\\n\\x1b\\udcff"
    assert printable("a\n\x1b", keep="\n") == "a\n\\x1b"
