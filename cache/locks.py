"""Locks of a folder that several processes write, on local and network file systems."""

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TAKEN = (errno.EACCES, errno.EAGAIN)
NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class NumberedLocks:
    """Locks 0, 1, 2, … of a folder, kept in its file `.lock`; they end with the process, however it ends.

    They are POSIX locks, which forked decoding workers do not inherit: those may outlive a killed writer by seconds. On file
    systems without locks, they warn and treat every lock as acquired.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = open(folder / ".lock", "a")  # noqa: SIM115 (held until close)

    def take(self, number: int, *, wait: bool = False) -> bool:
        """Whether the lock is now this process's; `wait` until it is."""
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
        """Wait for a lock and give it back at the end of the block."""
        self.take(number, wait=True)
        try:
            yield
        finally:
            with suppress(OSError):  # where there are no locks
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Give all of them back."""
        self._file.close()
