"""What every benchmark does around its measurement: options, a folder for its data, a table, targets, and a JSON file."""

import argparse
import datetime
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.machine import machine
from common.arguments import Parser, positive
from common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "docs" / "performance.md")


def target(what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict:
    """A measured number and the bound that it is held against."""
    if at_most is None:
        return {"what": what, "value": value, "at_least": at_least, "pass": value >= at_least}
    return {"what": what, "value": value, "at_most": at_most, "pass": value <= at_most}


def benchmark_parser(doc: str, **counts: tuple[int, str]) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, and `counts` of its own: positive numbers, their defaults and meanings."""
    return add_options(Parser(doc), counts)


def add_part(parts, run: Callable[[argparse.Namespace], None], **counts: tuple[int, str]) -> None:
    """Add a part of a benchmark to its subparsers: what `run` does, under its name, with options as above."""
    add_options(parts.add_parser(run.__name__), counts).set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser, counts: dict) -> argparse.ArgumentParser:
    data = ROOT / "data"
    parser.add_argument("--dir", type=Path, default=data, help="disk for temporary data (default data/)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON that is written")
    for name, (default, meaning) in counts.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, default=default, help=f"{meaning} (default {default})")
    return parser


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder on the disk of `parent` that vanishes with its content."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=parent) as folder:
        yield Path(folder)


def publish(args: argparse.Namespace, rows: list[dict], targets: list[dict], **also) -> None:
    """Print rows as a table and targets with PASS or FAIL, and write both, with where and how they arose, as JSON."""
    script = Path(sys.argv[0]).stem
    file = args.results / (f"{script}_{args.part}.json" if "part" in args else f"{script}.json")
    print("", table(rows), *map(format_target, targets), sep="\n")
    options = vars(args).items()
    content = {
        "command": shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "options": {k: v for k, v in options if not isinstance(v, Path) and k not in ("part", "run")},
    }
    write_json(file, content | also | {"rows": rows, "targets": targets})
    print(f"\n{file}")
    if args.results == RESULTS:
        for page in PAGES:
            page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")


def refreshed(page: str) -> str:
    """Returns the page with every block `<!-- NAME -->` … `<!-- end -->` made anew of results/NAME.json."""

    def block(match: re.Match) -> str:
        file = RESULTS / f"{match[1]}.json"
        if not file.exists():
            return match[0]
        result = json.loads(file.read_text(encoding="utf-8"))
        here = result["machine"]
        where = f"{here['cores']} cores ({here['cpu']}), {here['memory_gb']} GB, {here['gpu'] or 'no GPU'}"
        versions = f"Python {here['python']}, torch {here['packages']['torch']}"
        head = f"{result['date'][:10]}, {where}, {versions}: `{result['command']}`"
        body = "\n".join([head, "", table(result["rows"]), "", *map(format_target, result["targets"])])
        return f"<!-- {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def format_target(target: dict) -> str:
    """One target as a line of a Markdown list."""
    bound = next(name for name in ("at_least", "at_most") if name in target)
    verdict = "PASS" if target["pass"] else "**FAIL**"
    number = f"{_shown(target['value'])} ({bound.replace('_', ' ')} {target[bound]:g})"
    return f"- {verdict} {target['what']}: {number}"


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells)
    head, *body = (f"| {' | '.join(line)} |" for line in padded)
    return "\n".join([head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *body])


def _shown(value) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
