"""Names that others chose, written so that they change nothing around them. It imports nothing of ours.

A run's folder or a class may be called anything. `printable` is for terminals, pages and figures, which have their own ways to
escape markup; `markdown`, `code` and `code_block` are for Markdown, `quoted` for a string of Python or YAML.
"""

import json
import re

# What has a meaning in Markdown, anywhere in a line; an underscore has none within a word.
MARKUP = re.compile(r"[\\`*|<\[\]&~$]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: object, keep: str = "") -> str:
    """Return a text with an escape, such as \\u202e, in place of each character that is not shown as itself.

    These are line breaks, control characters, marks that turn the direction of what follows, and halves of surrogate pairs.
    Characters in `keep` stay as they are.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def markdown(text: object) -> str:
    """Return a text for a line or a table's cell of Markdown that shows it literally."""
    return MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))


def code(text: object) -> str:
    """Return a text as a Markdown code span, which a backtick in it does not end."""
    shown = printable(text)
    ticks, pad = _ticks(shown, 1), " " if shown[:1] == "`" or shown[-1:] == "`" else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def code_block(text: str, language: str = "") -> str:
    """Return lines as a fenced block of Markdown, which no line in them ends."""
    ticks = _ticks(text, 3)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def quoted(text: object) -> str:
    """Return a text between double quotes, as Python and YAML read it."""
    return printable(json.dumps(str(text), ensure_ascii=False))


def _ticks(text: str, least: int) -> str:
    """As many backticks as a code span or block around `text` needs."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
