"""The on-disk format of the cache. The only file that knows LMDB.

A *field* is one cached quantity: `latents` or `tokens`, one value of fixed shape and dtype per image. Its folder holds

    settings.json        written first: what this folder is for, so that no other settings are mixed in
    shard-00000.lmdb     10,000 values, key = image id, value = raw little-endian bytes; nothing is pickled
    shard-00000.json     count, bytes and checksum of that shard
    manifest.json        written last: what the values are, from which model, shape, dtype, counts, ids, shards

A shard is written as `shard-00000.lmdb.partial` in synchronous transactions and renamed when it is complete, so a file named
`.lmdb` is always whole. A folder without `manifest.json` is not a cache yet.
"""

import fcntl
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import lmdb
import numpy as np

from errors import UserError
from files import sync_folder, write_json
from preprocessing.manifest import (
    MANIFEST,
    SETTINGS,
    FieldSpec,
    ids_digest,
    insist_same,
    read_json,
    read_manifest,
)

SHARD_SIZE = 10_000
MAX_KEY_BYTES = 511


class FieldWriter:
    """Write one field for a list of ids, shard by shard; a second writer with the same settings goes on where one stopped.

        writer = FieldWriter(folder, spec, ids)
        for shard, batch in writer.pending(batch_size):   # fixed batches, so a resumed run encodes the same ones
            writer.put(shard, batch, values)              # durable on return
        writer.finish()                                   # seals what is open, writes the manifest

    `put` may be given fewer ids than the batch (an unreadable image is left out). Raises `UserError` when the folder holds a
    cache of other settings.
    """

    def __init__(
        self, folder: str | Path, spec: FieldSpec, ids: Sequence[str], *, shard_size: int = SHARD_SIZE
    ):
        self.folder, self.spec, self.ids, self.shard_size = Path(folder), spec, list(ids), shard_size
        self._open: tuple[int, lmdb.Environment] | None = None
        settings = spec.as_json() | {"shard_size": shard_size, "ids_sha256": ids_digest(self.ids)}
        if long := [key for key in self.ids if len(key.encode()) > MAX_KEY_BYTES]:
            raise UserError(
                f"the id {long[0]} is longer than {MAX_KEY_BYTES} bytes, LMDB's limit: rename that file"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write the folder {self.folder}: {error.strerror}") from None
        # LMDB's own lock is off, as readers on shared file systems need it; two writers would ruin a shard.
        try:
            self._lock = open(self.folder / ".lock", "a")  # noqa: SIM115 (held until close)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {self.folder}: wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to the folder {self.folder}: {error.strerror}") from None
        if (self.folder / SETTINGS).exists():
            insist_same(self.folder, read_json(self.folder / SETTINGS), settings)
        else:
            write_json(self.folder / SETTINGS, settings)
        self.complete = (self.folder / MANIFEST).exists()
        if self.complete:
            self.close()

    def shards(self) -> list[list[str]]:
        return [self.ids[i : i + self.shard_size] for i in range(0, len(self.ids), self.shard_size)]

    def pending(self, batch_size: int) -> list[tuple[int, list[str]]]:
        """The batches `(shard number, ids)` that are not durable yet, in order; `[]` when the field is complete."""
        if self.complete:
            return []
        batches = []
        for number, ids in enumerate(self.shards()):
            if self._path(number).exists():
                continue
            durable = self._durable(number)
            chunks = (ids[i : i + batch_size] for i in range(0, len(ids), batch_size))
            batches += [(number, chunk) for chunk in chunks if not durable.issuperset(chunk)]
        return batches

    def put(self, shard: int, ids: Sequence[str], values: np.ndarray) -> None:
        """Store `values (len(ids), *shape)` in one synchronous transaction; finite and of the spec's shape and dtype."""
        expected = (len(ids), *self.spec.shape)
        if values.shape != expected or values.dtype != np.dtype(self.spec.dtype):
            raise ValueError(
                f"{self.spec.field}: expected {expected} {self.spec.dtype}, got {values.shape} {values.dtype}"
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self.spec.field}: values that are not finite, for one of {', '.join(ids[:4])} …"
            )
        try:
            with self._environment(shard).begin(write=True) as transaction:
                for key, value in zip(ids, values, strict=True):
                    transaction.put(key.encode(), value.tobytes())
        except lmdb.Error as error:
            raise UserError(
                f"cannot write to {self.folder}: {error}; free some disk and run the same command"
            ) from None

    def missing(self) -> set[str]:
        """The ids that are not stored, once every batch was put: their images could not be read."""
        stored: set[str] = set()
        for number in range(len(self.shards())):
            path = self._path(number)
            stored |= set(_keys(path)) if path.exists() else self._durable(number)
        return set(self.ids) - stored

    def finish(self) -> dict:
        """Seal every shard and write the manifest; returns it."""
        if self.complete:
            return read_manifest(self.folder, self.spec.field)
        stored: list[str] = []
        shards = []
        for number in range(len(self.shards())):
            if not self._path(number).exists():
                self._seal(number)
            shards.append(read_json(self._path(number).with_suffix(".json")))
            stored += _keys(self._path(number))
        manifest = self.spec.as_json() | {
            "shard_size": self.shard_size,
            "num_samples": len(stored),
            "ids_sha256": ids_digest(sorted(stored)),
            "num_requested": len(self.ids),  # more than num_samples when images were unreadable
            "shards": shards,
        }
        write_json(self.folder / MANIFEST, manifest)
        self.complete = True
        self.close()
        return manifest

    def close(self) -> None:
        """Let go of the folder; what was put is durable."""
        self._close_shard()
        self._lock.close()

    def _close_shard(self) -> None:
        if self._open:
            self._open[1].close()
            self._open = None

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.lmdb"

    def _environment(self, shard: int) -> lmdb.Environment:
        """The open partial shard; going on to the next one seals the one before."""
        if self._open and self._open[0] != shard:
            self._seal(self._open[0])
        if not self._open:
            partial = self._path(shard).with_suffix(".lmdb.partial")
            # LMDB wants its room ahead; on disk it is sparse.
            room = int(self.shard_size * self.spec.value_bytes * 1.25) + (64 << 20)
            self._open = (
                shard,
                lmdb.open(str(partial), subdir=False, map_size=room, lock=False, lib_version=0),
            )
        return self._open[1]

    def _durable(self, shard: int) -> set[str]:
        partial = self._path(shard).with_suffix(".lmdb.partial")
        if not partial.exists():
            return set()
        with self._environment(shard).begin() as transaction:
            keys = {key.decode() for key in transaction.cursor().iternext(values=False)}
        self._close_shard()
        return keys

    def _seal(self, shard: int) -> None:
        with self._environment(shard).begin() as transaction:
            count = transaction.stat()["entries"]
            checksum = _checksum(transaction)
        self._close_shard()
        path = self._path(shard)
        partial = path.with_suffix(".lmdb.partial")
        # The description goes first: a shard that carries its final name always has one.
        write_json(
            path.with_suffix(".json"),
            {"file": path.name, "count": count, "bytes": partial.stat().st_size, "crc32": checksum},
        )
        os.replace(partial, path)
        sync_folder(self.folder)


class FieldReader:
    """Read values of one finished field by id.

    Refuses a folder that is unfinished, of another format, or whose shards differ in size from the manifest (a truncated
    LMDB file would otherwise end the process with SIGBUS). Files are opened lazily, once per process, without locks.
    """

    def __init__(self, folder: str | Path, field: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, field)
        self.spec = FieldSpec.from_json(self.manifest)
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.exists() else 0
            if size != shard["bytes"]:
                raise UserError(
                    f"{path} has {size} bytes, its manifest says {shard['bytes']}: delete {self.folder}/{MANIFEST} and that "
                    "shard's two files, and run the script that wrote it again"
                )
        self._index: dict[str, Path] | None = None

    def __len__(self) -> int:
        return self.manifest["num_samples"]

    @property
    def ids(self) -> Iterable[str]:
        return self._shard_of().keys()

    def read(self, ids: Sequence[str]) -> np.ndarray:
        """Values `(len(ids), *shape)` in the order of `ids`; raises `UserError` for an id that the field lacks."""
        values = np.empty((len(ids), *self.spec.shape), self.spec.dtype)
        shard_of = self._shard_of()
        for position, key in enumerate(ids):
            if key not in shard_of:
                raise UserError(
                    f"{self.folder} holds no {key}; run the script that wrote it for the CSV you train on"
                )
            with _environment(shard_of[key]).begin(buffers=True) as transaction:
                value = np.frombuffer(transaction.get(key.encode()), self.spec.dtype)
                values[position] = value.reshape(self.spec.shape)
        return values

    def damaged_shards(self) -> list[str]:
        """Compare every checksum; returns the files whose content is not what was written. Reads everything."""
        bad = []
        for shard in self.manifest["shards"]:
            with _environment(self.folder / shard["file"]).begin() as transaction:
                if _checksum(transaction) != shard["crc32"]:
                    bad.append(shard["file"])
        return bad

    def _shard_of(self) -> dict[str, Path]:
        if self._index is None:
            paths = [self.folder / shard["file"] for shard in self.manifest["shards"]]
            self._index = {key: path for path in paths for key in _keys(path)}
        return self._index


# LMDB allows one environment per file and process, and none may cross a fork; so all readers of a process share these.
_environments: dict[Path, lmdb.Environment] = {}
_environments_pid = os.getpid()


def _environment(path: Path) -> lmdb.Environment:
    global _environments_pid
    if _environments_pid != os.getpid():
        _environments.clear()
        _environments_pid = os.getpid()
    path = path.resolve()
    if path not in _environments:
        # readahead stays on: without it a cold value costs one serial page fault per 4 KB.
        _environments[path] = lmdb.open(str(path), subdir=False, readonly=True, lock=False, lib_version=0)
    return _environments[path]


def _keys(path: Path) -> list[str]:
    with _environment(path).begin() as transaction:
        return [key.decode() for key in transaction.cursor().iternext(values=False)]


def _checksum(transaction: lmdb.Transaction) -> int:
    checksum = 0
    for key, value in transaction.cursor():
        checksum = zlib.crc32(value, zlib.crc32(key, checksum))
    return checksum
