"""Write files and folders so that they are either whole or absent. Every room may import this."""

import fcntl
import glob
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

FRESH = 10  # seconds


def expand_home(text: str) -> str:
    """Return a file path with the home folder in place of a leading `~`; raises `UserError` for the home of nobody."""
    if text.startswith("~"):
        text, given = os.path.expanduser(text), text
        if text.startswith("~"):
            raise UserError(f"there is no home folder for {given}: give the path from the root")
    elif os.path.normpath(text).startswith("~"):  # ./~x, of which pathlib would make ~x
        return os.path.abspath(text)
    return text


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a file, all of it or nothing; missing parent folders are created."""
    with file_written_whole(path) as file:
        file.write(data)


@contextmanager
def file_written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Yield an open temporary file beside `path`; when the block ends, it is synced to disk and renamed to `path`.

    An interrupted write leaves no partial file, and two processes that write the same file do not mix their contents. Missing
    parent folders are created; a symbolic link is followed. Raises `UserError` where something else than a file is there.
    """
    path = _place_for(path, "regular file", Path.is_file)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
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
    """Yield a temporary folder that is renamed to `target` when the block ends, and deleted when the block fails.

    A symbolic link is followed. Raises `UserError` where something else than a folder is in the place.
    """
    target = _place_for(target, "folder", Path.is_dir)
    partial = _temporary(target)
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        partial.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that is to be written, `.NAME.lock` beside it; wait while another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path.with_name(f".{path.name}.lock")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_lock(path: Path) -> BinaryIO:
    """Open a file to lock it, which changes nothing in it; raises `UserError` for a FIFO or a device, which would wait."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is no regular file: remove it")
    return open(handle, "ab")


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames in it survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _place_for(path: str | Path, what: str, fits: Callable[[Path], bool]) -> Path:
    """Return where to write: a path without links, because a rename would replace the link, free of what was left there."""
    try:
        place = Path(os.path.realpath(path))
    except ValueError:
        raise UserError(f"{str(path)!r} can be no file name") from None
    if place.exists() and not fits(place):
        raise UserError(f"{path} is no {what} and is not replaced: choose another name")
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    return place


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _sweep(path: Path) -> None:
    """Remove what killed processes left beside `path`; whoever still writes holds the lock of its own.

    A fresh one is let alone, unless it has our own name: its owner may be about to lock it.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):  # its owner has it, or has just renamed it
            if left != _temporary(path) and time.time() - left.lstat().st_mtime < FRESH:
                continue
            handle = os.open(left, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)
