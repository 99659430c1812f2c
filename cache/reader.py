"""Read cached values from shards, straight into memory that the caller owns.

A shard is an LMDB file. The reader finds the byte offset of every value once (`cache/lmdb_pages.py`) and then reads values as
byte ranges of an ordinary file. It maps, locks and shares nothing, so a reader may be forked, pickled or opened twice, and it
works on read-only and network file systems.
"""

import errno
import os
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache.csv_file import read_csv
from cache.lmdb_pages import DamagedFile, value_ranges, will_need
from cache.manifest import MANIFEST, UNREADABLE, UNREADABLE_COLUMNS, FieldSpec, ids_digest, read_manifest
from common.errors import UserError

ANEW = "run the script that wrote it again; only this shard is made anew"


class FieldReader:
    """Reads the values of one finished field, by id or by row. A row is the position of an id in `ids`.

        reader = FieldReader(folder, "tokens")
        tokens = reader.read(["n01440764/n01440764_10026"])       # (1, N, D)

        rows = reader.rows(ids)                                   # once
        reader.read_rows(rows[batch], raw.numpy())                # many times, into uint8 (B, value_bytes)
        tokens = reader.spec.decode(raw)                          # (B, N, D), on whatever device `raw` is

    Raises `UserError` when the folder is unfinished, damaged or of another format, or when its files differ from its manifest.
    """

    def __init__(self, folder: str | Path, field: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, field)
        self.spec = FieldSpec.from_json(self.manifest)
        self._paths = [self.folder / shard["file"] for shard in self.manifest["shards"]]
        for path, shard in zip(self._paths, self.manifest["shards"], strict=True):
            if not path.is_file():
                raise UserError(f"{path} is missing or no file: {ANEW}")
            if (size := path.stat().st_size) != shard["bytes"]:
                raise _damaged(path, f"has {size} bytes, its manifest says {shard['bytes']}")
        self._open: dict[int, object] = {}

    def __len__(self) -> int:
        return self.manifest["num_samples"]

    def __getstate__(self) -> dict:
        # Another process must open the files itself; it makes the dict of rows anew when it needs that.
        return {name: value for name, value in self.__dict__.items() if name != "_row_of"} | {"_open": {}}

    @property
    def unreadable(self) -> list[str]:
        """The ids of the images that script 2 or 3 could not read; they have no value."""
        path = self.folder / UNREADABLE
        if not path.exists():
            return []
        todo = f"delete it and {MANIFEST}, and run the script that wrote it again"
        return [key for _, (key, _, _) in read_csv(path, UNREADABLE_COLUMNS, todo)]

    @property
    def ids(self) -> list[str]:
        """All stored ids; the position of an id in this list is its row."""
        return self._index[0]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Return the rows `(len(ids),)` of these ids; raises `UserError` for an id that the field lacks."""
        row_of = self._row_of
        if lacking := next((key for key in ids if key not in row_of), None):
            raise UserError(f"{self.folder} holds no {lacking}; make it anew for the CSV you train on")
        return np.fromiter((row_of[key] for key in ids), np.int64, len(ids))

    def read(self, ids: Sequence[str]) -> Tensor:
        """Return the values `(len(ids), *shape)` in the order of `ids`."""
        return self.spec.decode(self.read_raw(ids))

    def read_raw(self, ids: Sequence[str]) -> Tensor:
        """Return the stored bytes `(len(ids), value_bytes)` in the order of `ids`."""
        raw = torch.empty(len(ids), self.spec.value_bytes, dtype=torch.uint8)
        self.read_rows(self.rows(ids), raw.numpy())
        return raw

    def read_rows(self, rows: np.ndarray, buffers: Sequence[np.ndarray]) -> None:
        """Read the value of row i into buffer i, uint8 `(value_bytes,)`; the buffers may be the rows of one array."""
        shards, offsets = (column[rows] for column in self._index[1:])
        missing = []
        for place in np.lexsort((offsets, shards)).tolist():
            file, offset, buffer = self._file(int(shards[place])), int(offsets[place]), buffers[place]
            read = _read_from_memory(file, buffer, offset)
            if read < len(buffer):
                will_need(file, offset + read, len(buffer) - read)
                missing.append((file, buffer[read:], offset + read))
        # By now the disk has been asked for everything that was not in memory, so these waits overlap.
        for file, buffer, offset in missing:
            self._fill(file, offset, buffer)

    def damaged_shards(self, progress: Callable[[int], object] = lambda _: None) -> list[str]:
        """Read every value, call `progress(1)` after each, and return the names of shards that differ from their checksums."""
        (ids, shards, offsets), bad = self._index, []
        value = np.empty(self.spec.value_bytes, np.uint8)
        for number, shard in enumerate(self.manifest["shards"]):
            checksum = 0
            for row in np.flatnonzero(shards == number):
                self._fill(self._file(number), int(offsets[row]), value)
                checksum += row_checksum(ids[row].encode(), value)
                progress(1)
            if checksum != shard["checksum"]:
                bad.append(shard["file"])
        return bad

    def _file(self, shard: int) -> int:
        if shard not in self._open:
            file = open(self._paths[shard], "rb", buffering=0)  # noqa: SIM115 (closed with the reader)
            if hasattr(os, "posix_fadvise"):  # switches read-ahead off, which would read unwanted values
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            self._open.setdefault(shard, file)  # another thread may have opened it first
        return self._open[shard].fileno()

    def _fill(self, file: int, offset: int, buffer: np.ndarray) -> None:
        read = 0
        while read < len(buffer):
            more = os.preadv(file, [buffer[read:]], offset + read)
            if not more:
                raise UserError(f"{self.folder}: a shard became shorter while it was read; check the disk")
            read += more

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.ids)}

    @cached_property
    def _index(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The ids, the shard numbers `(n,)` and the byte offsets `(n,)` of all values."""
        ids, shards, offsets, value_bytes = [], [], [], self.spec.value_bytes
        for number, path in enumerate(self._paths):
            try:
                found = list(value_ranges(self._file(number)))
            except DamagedFile as error:
                raise _damaged(path, f"is damaged ({error})") from None
            if any(size != value_bytes for _, _, size in found):
                raise _damaged(path, f"holds values that are not of {value_bytes} bytes")
            starts = [offset for _, offset, _ in found]
            if (np.diff(np.sort(starts)) < value_bytes).any():
                raise _damaged(path, "is damaged (its values overlap)")
            ids += [key.decode(errors="replace") for key, _, _ in found]
            shards += [number] * len(found)
            offsets += starts
        if ids_digest(sorted(ids)) != self.manifest["ids_sha256"]:
            raise UserError(
                f"the shards of {self.folder} hold other images than its manifest says: a file of another cache was put there; "
                "delete the folder and run the script that wrote it again"
            )
        return ids, np.array(shards, np.int32), np.array(offsets, np.int64)


def _read_from_memory(file: int, buffer: np.ndarray, offset: int) -> int:
    """Fill the buffer as far as it is in the page cache, and return the number of bytes; 0 where a system cannot say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 0
    try:
        return os.preadv(file, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        return 0


def row_checksum(key: bytes, value) -> int:
    """Return the checksum of an id and its value. A shard's checksum is the sum over its rows, in any order.

    The two CRCs are multiplied because a CRC of id and value together is linear, and a sum of those could miss that two values
    were swapped between their ids.
    """
    return (zlib.crc32(key) + 1) * (zlib.crc32(value) + 1)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}: delete that file and {ANEW}")
