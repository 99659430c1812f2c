"""A page of results as ONE HTML file: pictures and films inside, no scripts, no request leaves the reader's machine."""

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.errors import UserError
from common.files import write_atomically
from common.plain_text import printable

# A span between as many backticks, as Markdown has it: two where there is one within.
CODE = re.compile(r"(?<!`)(`+)(?!`)( ?)(.+?)\2(?<!`)\1(?!`)")


class Heading(str):
    """A section starts here."""

    def html(self) -> str:
        return f"<h2>{_literal(self)}</h2>"


class Paragraph(str):
    """Running text; `words between backticks` are set as code, everything else is literal, as in a lead and in captions."""

    def html(self) -> str:
        return f"<p>{_text(self)}</p>"


class Command(str):
    """Preformatted text, such as the command that made the page."""

    def html(self) -> str:
        return f"<pre><code>{_literal(self)}</code></pre>"


@dataclass
class Figure:
    """A PNG file, embedded, with its caption."""

    path: str | Path
    caption: str = ""

    def html(self) -> str:
        try:
            data = Path(self.path).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                kind, size = image.format, image.size
        except OSError as error:
            raise UserError(f"{self.path} cannot be read as a picture ({error})") from None
        if kind != "PNG":
            raise UserError(f"{self.path} is a {kind} file, a PNG is wanted")
        # Our figures are drawn at twice the density of a page's pixel, to stay sharp when enlarged.
        width, height = (math.ceil(side / 2) for side in size)
        wide = ' class="wide"' if width > 760 else ""
        return _captioned(
            f'<div class="card"><img{wide} alt="{_literal(self.caption or Path(self.path).stem)}" '
            f'width="{width}" height="{height}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>',
            self.caption,
        )


@dataclass
class Films:
    """mp4 files by their titles, embedded side by side as players, with a caption."""

    files: Mapping[str, str | Path]
    caption: str = ""

    def html(self) -> str:
        players = []
        for title, path in self.files.items():
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise UserError(f"{path} cannot be read as a film ({error})") from None
            if data[4:8] != b"ftyp":
                raise UserError(f"{path} is no mp4 file")
            film = base64.b64encode(data).decode()
            players.append(
                f'<div><video controls loop muted playsinline src="data:video/mp4;base64,{film}"></video>'
                f"<p>{_literal(title)}</p></div>"
            )
        return _captioned(f'<div class="card films">{"".join(players)}</div>', self.caption)


@dataclass
class Table:
    """A table; numbers are set to four significant digits, None as a dash."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]
    caption: str = ""

    def html(self) -> str:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(self.header)}")
        # A lone arrow at the end of a name ("fd ↓") does not go on a line of its own.
        names = [re.sub(r" (?=\S$)", "\u00a0", name) for name in self.header]
        numeric = [any(isinstance(row[i], int | float) for row in self.rows) for i in range(len(names))]

        def line(tag: str, cells: Sequence[str | int | float | None]) -> str:
            marks = [f'{tag} class="number"' if is_number else tag for is_number in numeric]
            shown = zip(marks, map(_cell, cells), strict=True)
            return f"<tr>{''.join(f'<{mark}>{_literal(cell)}</{tag}>' for mark, cell in shown)}</tr>"

        body = "\n".join(line("td", row) for row in self.rows)
        return _captioned(
            f'<div class="scroll"><table><thead>{line("th", names)}</thead><tbody>{body}</tbody></table></div>',
            self.caption,
        )


Block = Heading | Paragraph | Command | Figure | Films | Table

# No script, no request: the reader's browser enforces what this file promises.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"

CSS = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5a646e; --paper: #fbfbfa; --card: #ffffff;
        --line: #dcdfe3; --code: #f0f2f4; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #a3adb7; --paper: #15181b; --card: #1d2125; --line: #343a40;
          --code: #23282d; --accent: #6cb6e8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.2rem 1.1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.28rem; line-height: 1.3; margin: 2.8rem 0 .6rem; padding-top: .8rem;
     border-top: 1px solid var(--line); }
p { margin: 0 0 1rem; max-width: 46rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .92rem; margin: 1.2rem 0 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
figure { margin: 1.3rem 0 1.6rem; }
.card { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: .7rem;
        overflow-x: auto; width: fit-content; max-width: 100%; }
.films { display: flex; flex-wrap: wrap; gap: .9rem; color: #1c2126; }
.films div { width: 10.5rem; } .films video { display: block; width: 100%; }
.films p { font-size: .8rem; line-height: 1.35; margin: .3rem 0 0; white-space: pre-line; }
.card img { display: block; height: auto; max-width: 100%; }
figcaption { color: var(--soft); font-size: .92rem; margin: .55rem 0 0; max-width: 46rem; }
.scroll { overflow-x: auto; max-width: 100%; width: fit-content; background: var(--card);
          border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .85rem; text-align: left; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal;
     vertical-align: bottom; } tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
pre { background: var(--code); border-radius: 8px; padding: .8rem 1rem; margin: 0 0 1.2rem;
      white-space: pre-wrap; overflow-wrap: anywhere; font-size: .87rem; line-height: 1.5; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; font-size: .92em; }
p code, figcaption code { background: var(--code); border-radius: 4px; padding: .08em .3em; }
@media (max-width: 40rem) { .card img.wide { width: 34rem; max-width: none; } }
"""


def write_page(path: str | Path, *, title: str, lead: str, sections: Sequence[Block]) -> Path:
    """Write title, lead paragraph and the blocks in order; returns the path. All text is escaped.

    A missing or foreign picture is a `UserError`, a ragged table a `ValueError`.
    """
    body, headings = [], []
    for block in sections:
        if isinstance(block, Heading):
            body.append(f'<a id="s{len(headings)}"></a>')
            headings.append(block)
        body.append(block.html())
    links = "".join(f'<a href="#s{i}">{_literal(heading)}</a>' for i, heading in enumerate(headings))
    nav = f"<nav>{links}</nav>" if len(headings) > 2 else ""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_literal(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{_literal(title)}</h1>
<p class="lead">{_text(lead)}</p>
{nav}
{chr(10).join(body)}
</main>
</body>
</html>
"""
    write_atomically(path, page.encode())
    return Path(path)


def _captioned(content: str, caption: str) -> str:
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f"<figure>{content}{below}</figure>"


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    return CODE.sub(r"<code>\3</code>", _literal(text))


def _literal(text: str) -> str:
    return html.escape(printable(text, keep="\n\u00a0"))
