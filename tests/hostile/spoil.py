"""Ways to spoil files. Each replaces the file and never writes into it, because it may be a link to the house's own."""

import json
import os
from collections.abc import Callable
from pathlib import Path

Spoil = Callable[[Path], object]


def put(path: Path, data: bytes | str) -> None:
    """Replace a file."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def only(folder: Path, pattern: str) -> Path:
    """The first path of a pattern."""
    return min(folder.glob(pattern))


def write(pattern: str, data: bytes | str) -> Spoil:
    """Put these bytes into the file of this pattern, or into a new file of this name."""
    return lambda folder: put(only(folder, pattern) if any(folder.glob(pattern)) else folder / pattern, data)


def cut(pattern: str, share: float = 0.5) -> Spoil:
    """Truncate a file."""

    def spoil(folder: Path) -> None:
        path = only(folder, pattern)
        data = path.read_bytes()
        put(path, data[: int(len(data) * share)])

    return spoil


def edit(pattern: str, change: Callable[[dict], object]) -> Spoil:
    """Change the content of a JSON file in place."""

    def spoil(folder: Path) -> None:
        path = only(folder, pattern)
        content = json.loads(path.read_text())
        change(content)
        put(path, json.dumps(content))

    return spoil


def edit_line(pattern: str, change: Callable[[dict], object]) -> Spoil:
    """Change the first line of a log of JSON lines."""

    def spoil(folder: Path) -> None:
        path = only(folder, pattern)
        first, *rest = path.read_text().splitlines(keepends=True)
        content = json.loads(first)
        change(content)
        put(path, json.dumps(content) + "\n" + "".join(rest))

    return spoil


def set_key(*keys, to) -> Callable[[dict], None]:
    """A change for `edit`: another value under a nested key."""

    def change(content) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


def drop_key(*keys) -> Callable[[dict], None]:
    """A change for `edit`: no such key."""

    def change(content) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def replace(pattern: str, old: str, new: str) -> Spoil:
    """Replace a text in a file."""

    def spoil(folder: Path) -> None:
        path = only(folder, pattern)
        text = path.read_text()
        assert old in text
        put(path, text.replace(old, new, 1))

    return spoil


def remove(pattern: str) -> Spoil:
    """Remove a file."""
    return lambda folder: only(folder, pattern).unlink()


def fifo(name: str) -> Spoil:
    """Put a FIFO in a file's place."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def link(name: str, to: str) -> Spoil:
    """Put a symbolic link in a file's place."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda folder: [spoil(folder) for spoil in spoils]


def nothing(folder: Path) -> None:
    """Leave everything as it is: the command is what is wrong."""
