"""What every benchmark does around its measurement: options, a folder for its data, a table, targets, and a JSON file."""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import write_json
from preprocessing.options import new_parser

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "docs" / "performance.md")
PACKAGES = ["torch", "numpy", "lmdb", "diffusers", "transformers", "mosaicml-streaming", "webdataset", "h5py"]


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

    def __str__(self) -> str:
        bound = f"at least {self.at_least:g}" if self.at_most is None else f"at most {self.at_most:g}"
        return f"{'PASS' if self.met else 'FAIL'}  {self.what}: {self.value:.3g} ({bound})"


def benchmark_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = new_parser(doc)
    parser.add_argument(
        "--dir",
        type=Path,
        default=ROOT / "data",
        help="disk for temporary data, removed at the end (default data/)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of the JSON that is written",
    )
    return parser


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder on the disk of `parent` that vanishes with its content."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=parent) as folder:
        yield Path(folder)


def publish(args: argparse.Namespace, rows: list[dict], targets: list[Target], **also) -> None:
    """Print rows as a table and targets with PASS or FAIL, and write both, with where and how they arose, as JSON."""
    name = Path(sys.argv[0]).stem
    print()
    print(table(rows))
    for target in targets:
        print(target)
    content = {
        "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "options": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
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
    """The page with every block `<!-- NAME -->` … `<!-- end -->` made anew of results/NAME.json: nothing there is typed in."""

    def block(match: re.Match) -> str:
        if not (RESULTS / f"{match[1]}.json").exists():
            return match[0]
        result = json.loads((RESULTS / f"{match[1]}.json").read_text(encoding="utf-8"))
        here = result["machine"]
        where = f"{here['cores']} cores ({here['cpu']}), {here['memory_gb']} GB, {here['gpu'] or 'no GPU'}"
        versions = f"Python {here['python']}, torch {here['packages']['torch']}"
        head = f"{result['date'][:10]}, {where}, {versions}: `{result['command']}`"
        targets = [
            f"- {'PASS' if target['pass'] else '**FAIL**'} {target['what']}: {_shown(target['value'])} "
            f"(at {'least' if 'at_least' in target else 'most'} {target.get('at_least', target.get('at_most')):g})"
            for target in result["targets"]
        ]
        body = "\n".join([head, "", table(result["rows"]), "", *targets])
        return f"<!-- {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


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


def machine() -> dict:
    """What the numbers depend on and the code does not decide."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def family() -> list[int]:
    """This process and its living children, such as a DataLoader's workers."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children())]


def cpu_seconds() -> float:
    """CPU time of the family so far, all threads, to a hundredth of a second."""
    ticks = 0
    for pid in family():
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")
