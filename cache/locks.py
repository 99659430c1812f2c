"""Locks for a folder that several processes write, on local and network file systems."""

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TAKEN = (errno.EACCES, errno.EAGAIN)
NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class NumberedLocks:
    """Locks 0, 1, 2, … of a folder, in its file `.lock`. The system releases them when the process ends, however it ends.

    They are POSIX locks because forked decoding workers, which may outlive a killed writer by seconds, do not inherit those. On
    file systems without locks, a warning is printed and every lock counts as acquired.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = open(folder / ".lock", "a")  # noqa: SIM115 (held until close)

    def take(self, number: int, *, wait: bool = False) -> bool:
        """Try to acquire a lock and return whether this process now has it; with `wait`, block until it has."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except OSError as error:
            if error.errno in TAKEN:
                return False
            if error.errno not in NOT_SUPPORTED:
                raise
            print(
                f"{self._folder}: no file locks here, so start no second writer for a shard", file=sys.stderr
            )
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
