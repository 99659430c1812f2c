"""What the writers of a folder agree on: its settings, the assignment of images to shards in `plan.json`, and locks.

The assignment is made before the first shard is written. More images may be added to it later, but an image never moves.
"""

import errno
import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.manifest import FOLDER_AGAIN, MANIFEST, SETTINGS, Settings, check_same, read_settings
from common.errors import UserError
from common.files import open_lock, write_json
from common.reading import JsonRecord, read_record

PLAN = "plan.json"
SHARD_SIZE = 10_000
LOCK_TAKEN = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Plan(JsonRecord):
    """plan.json."""

    shards: list[list[str]]  # the ids of each


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file path of a complete shard."""
    return folder / f"shard-{shard:05d}.lmdb"


def check_settings(folder: Path, settings: dict, shard_size: int | None) -> Settings:
    """Write a new folder's settings, or check an existing folder's, and return them; raises `UserError` where they differ."""
    path = folder / SETTINGS
    if path.exists():
        known = read_settings(folder)
        check_same(folder, known, settings)
        if shard_size not in (None, size := known["shard_size"]):
            raise UserError(f"{folder} has shards of {size} images: leave --shard-size out")
        return known
    if (folder / PLAN).exists() or (folder / MANIFEST).exists():
        raise UserError(f"{folder} has lost its {SETTINGS}: restore it, or delete the folder")
    settings = settings | {"shard_size": SHARD_SIZE if shard_size is None else shard_size}
    write_json(path, settings)
    return settings


def read_plan(folder: Path) -> list[list[str]]:
    """Return the ids of every shard, in order; the list is empty for a new folder."""
    path = folder / PLAN
    return read_record(path, Plan, FOLDER_AGAIN)["shards"] if path.exists() else []


def extend_plan(folder: Path, ids: Sequence[str], shard_size: int) -> list[list[str]]:
    """Add ids to the assignment and return it; ids that are already assigned keep their places.

    The new list must contain every assigned id, or else be a part of them that covers all unfinished shards. Any other list
    probably belongs to another folder, so `UserError` is raised instead of mixing the two.
    """
    plan = read_plan(folder)
    wanted, planned = set(ids), {key for shard in plan for key in shard}
    lacking = planned - wanted
    if wanted <= planned:  # sealed shards need no images
        sealed = (shard for n, shard in enumerate(plan) if shard_path(folder, n).exists())
        lacking -= {key for shard in sealed for key in shard}
    if lacking:
        raise UserError(
            f"{folder} was begun for other images too ({min(lacking)}, for one): give the list that it was begun with or one "
            "that contains it, or choose another --out"
        )
    if new := [key for key in ids if key not in planned]:
        plan += [new[i : i + shard_size] for i in range(0, len(new), shard_size)]
        write_json(folder / PLAN, {"shards": plan})
    return plan


class NumberedLocks:
    """Locks 0, 1, 2, … of a folder, in its file `.lock`. The system releases them when the process ends, however it ends.

    They are POSIX locks because forked decoding workers, which may outlive a killed writer by seconds, do not inherit those. On
    file systems without locks, a warning is printed and every lock counts as acquired.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = open_lock(folder / ".lock")

    def take(self, number: int, *, wait: bool = False) -> bool:
        """Try to acquire a lock and return whether this process now has it; with `wait`, block until it has."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except OSError as error:
            if error.errno in LOCK_TAKEN:
                return False
            if error.errno not in NO_LOCKS:
                raise
            print(f"{self._folder}: no file locks here: start no second writer", file=sys.stderr)
        return True

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Wait for a lock and release it at the end of the block."""
        self.take(number, wait=True)
        try:
            yield
        finally:
            with suppress(OSError):  # fails on file systems without locks
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Release all locks."""
        self._file.close()
