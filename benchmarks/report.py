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
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import machine
from common.files import write_json
from preprocessing.options import new_parser, positive

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "docs" / "performance.md")


@dataclass(frozen=True)
class Target:
    """A bound that a measured number is held against."""

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def as_json(self) -> dict:
        bound = {"at_least": self.at_least} if self.at_most is None else {"at_most": self.at_most}
        return {"what": self.what, "value": self.value} | bound | {"pass": self.met}


def benchmark_parser(
    doc: str, *parts: Callable[[argparse.Namespace], None]
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """A parser, and that of each part by its name, which is the first argument; a chosen part is `part`, and `run`."""
    parser = new_parser(doc)
    subparsers = parser.add_subparsers(dest="part", required=True) if parts else None
    found = {part.__name__: subparsers.add_parser(part.__name__) for part in parts}
    for part in parts:
        found[part.__name__].set_defaults(run=part)
    for each in found.values() or [parser]:
        each.add_argument(
            "--dir", type=Path, default=ROOT / "data", help="disk for temporary data (default data/)"
        )
        each.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON that is written")
    return parser, found


def add_counts(parser: argparse.ArgumentParser, **counts: tuple[int, str]) -> None:
    """Add options that are positive numbers, each with its default and its meaning."""
    for name, (default, meaning) in counts.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, default=default, help=f"{meaning} (default {default})")


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder on the disk of `parent` that vanishes with its content."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=parent) as folder:
        yield Path(folder)


def publish(args: argparse.Namespace, rows: list[dict], targets: list[Target], **also) -> None:
    """Print rows as a table and targets with PASS or FAIL, and write both, with where and how they arose, as JSON."""
    script, part = Path(sys.argv[0]).stem, getattr(args, "part", None)
    name = f"{script}_{part}" if part else script
    print()
    print(table(rows))
    for target in targets:
        print(format_target(target.as_json()))
    content = {
        "command": shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "options": {
            key: value
            for key, value in vars(args).items()
            if not isinstance(value, Path) and key not in ("part", "run")
        },
        **also,
        "rows": rows,
        "targets": [target.as_json() for target in targets],
    }
    write_json(args.results / f"{name}.json", content)
    print(f"\n{args.results / f'{name}.json'}")
    if args.results == RESULTS:
        for page in PAGES:
            page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")


def refreshed(page: str) -> str:
    """Returns the page with every block `<!-- NAME -->` … `<!-- end -->` made anew of results/NAME.json."""

    def block(match: re.Match) -> str:
        if not (RESULTS / f"{match[1]}.json").exists():
            return match[0]
        result = json.loads((RESULTS / f"{match[1]}.json").read_text(encoding="utf-8"))
        here = result["machine"]
        where = f"{here['cores']} cores ({here['cpu']}), {here['memory_gb']} GB, {here['gpu'] or 'no GPU'}"
        versions = f"Python {here['python']}, torch {here['packages']['torch']}"
        head = f"{result['date'][:10]}, {where}, {versions}: `{result['command']}`"
        targets = map(format_target, result["targets"])
        body = "\n".join([head, "", table(result["rows"]), "", *targets])
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
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _shown(value) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
