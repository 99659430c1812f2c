"""Run a command on spoiled input in a forked process, and check that the program keeps its promise.

The promise: one line that begins with `error:` and says what is wrong, an exit code that is not 0, no traceback, no hang, and
every file that was there still there with the same bytes.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fork_server import said, start

PATIENCE = 5.0  # seconds on an idle machine, within which a command must have said what is wrong
# What a refused command may write: locks, and nothing else.
LOCKS = (".lock",)
LARGE = 2**14  # bytes


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: what is wrong, in a few words.
        spoil: makes it wrong in a copy of the house; the working folder is that copy.
        command: `train …`, `evaluate …`, or a script's number and its arguments, as one would type them.
        says: parts that the line must contain.
        goes_on: the command must succeed; `says` then stand anywhere in what it prints.
        loses: files that the command may change or remove, as prefixes of their paths.
        check: looks at the folder afterwards.
    """

    name: str
    spoil: Callable[[Path], object]
    command: str
    says: tuple[str, ...] = ()
    goes_on: bool = False
    loses: tuple[str, ...] = ()
    check: Callable[[Path], object] | None = field(default=None)


@dataclass(frozen=True)
class Outcome:
    code: int | None  # None where the command did not end in time
    out: str
    err: str


def run(command: str, folder: Path, patience: float = PATIENCE) -> Outcome:
    """Run a command in `folder`, in a process forked after the imports; `patience` grows with the load of the machine."""
    patience *= max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    process = start(command, folder)
    process.join(patience)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    return Outcome(None if hung else process.exitcode, *said(folder))


def copy_house(source: Path, target: Path) -> Path:
    """A copy whose large files are hard links: `write` and the like replace them, and never write into them."""

    def copy(a: str, b: str) -> None:
        (os.link if os.path.getsize(a) >= LARGE else shutil.copy2)(a, b)

    return shutil.copytree(source, target, copy_function=copy, symlinks=True)


def contents(folder: Path) -> dict[str, object]:
    """What tells that a regular file is as it was, for every one below a folder, by its path."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.name not in (".out", ".err", *LOCKS):
            about = path.stat()
            large = about.st_size >= LARGE
            found[str(path.relative_to(folder))] = (
                (about.st_ino, about.st_size, about.st_mtime_ns)
                if large
                else hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found


def check(case: Case, folder: Path) -> None:
    """Spoil the copy in `folder`, run the command, and fail unless the promise is kept."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        case.spoil(folder)
    finally:
        os.chdir(here)
    before = contents(folder)
    outcome = run(case.command, folder, patience=60 if case.goes_on else PATIENCE)
    said = outcome.err + outcome.out
    assert outcome.code is not None, f"{case.name}: still running after {PATIENCE:g} s\n{said}"
    assert "Traceback" not in said, f"{case.name}: a traceback\n{said}"
    if case.goes_on:
        assert outcome.code == 0, f"{case.name}: exit code {outcome.code}\n{said}"
    else:
        assert outcome.code == 2, f"{case.name}: exit code {outcome.code}\n{said}"
        lines = [line for line in outcome.err.replace("\r", "\n").split("\n") if "error: " in line]
        assert len(lines) == 1, f"{case.name}: {len(lines)} lines of error\n{said}"
        assert len(lines[0]) < 700, f"{case.name}: a line of {len(lines[0])} characters\n{said}"
        said = lines[0]
    for part in case.says:
        assert part in said, f"{case.name}: does not say {part!r}\n{said}"
    after = contents(folder)
    lost = [
        name
        for name, digest in before.items()
        if after.get(name) != digest and not name.startswith(case.loses)
    ]
    assert not lost, f"{case.name}: lost or changed {lost}\n{said}"
    if case.check is not None:
        case.check(folder)
