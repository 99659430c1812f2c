"""Write files and folders so that they are either whole or absent. Every room may import this; it imports nothing of ours."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a file, all of it or nothing; missing parent folders are created."""
    with file_written_whole(path) as file:
        file.write(data)


@contextmanager
def file_written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Yield an open temporary file beside `path`; when the block ends, it is synced to disk and renamed to `path`.

    An interrupted write leaves no partial file, and two processes that write the same file do not mix their contents.
    Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: str | Path, content) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `target` when the block ends, and deleted when the block fails."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process may have left it
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        partial.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames in it survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
