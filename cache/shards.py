"""The on-disk format of the cache, and its writer. No other file uses the LMDB library.

A *field* is one cached quantity, `latents`, `tokens` or `text`, with one value of fixed size for each image or prompt. Its
folder contains

    settings.json        written first: the specification of the values, so that no other settings are mixed in
    plan.json            the ids of each shard; the file grows when images are added, and never changes otherwise
    shard-00000.lmdb     up to 10,000 values, key = id, value = raw bytes (`cache/encodings.py`); no pickle
    shard-00000.json     count, bytes and checksum of that shard, and the images that could not be read
    unreadable.csv       those images, of all shards, if there are any
    manifest.json        written last: meaning, model, shape and dtype of the values, their counts, digest of ids, shards

The writer fills `shard-00000.lmdb.partial` in synchronous transactions. It *seals* a complete shard: it writes the description
and renames the file, so a file named `.lmdb` is always whole. Until then `shard-00000.begun` has the digest of the settings and
the images that could not be read (`cache/partial_shard.py`), and the file locks on `.lock` keep a second writer out. A folder
without `manifest.json` is not a cache yet. Several processes may write one field if each has its own shards (`part`); the one
that seals the last shard writes the manifest. `cache/reader.py` reads the shards without LMDB.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb
from torch import Tensor

from cache.csv_file import write_csv
from cache.manifest import (
    MANIFEST,
    UNREADABLE,
    UNREADABLE_COLUMNS,
    FieldSpec,
    ShardEntry,
    digest_of,
    ids_digest,
    read_manifest,
    write_manifest,
)
from cache.partial_shard import PAGE, PARTIAL, PartialShard
from cache.reader import row_checksum
from cache.shard_plan import NumberedLocks, check_settings, extend_plan, read_plan, shard_path
from common.errors import UserError
from common.files import sync_folder, write_json
from common.reading import read_record

MAX_KEY_BYTES = 511
PAGE_HEADER = 16
PLANNING = 0  # the number of the lock for the folder's JSON files; shard n has lock n + 1


class Sealed(ShardEntry):
    """shard-00000.json."""

    unreadable: dict[str, str]  # from ids to reasons


class FieldWriter:
    """Writes one field for a list of ids, shard by shard. A new writer with the same settings resumes an interrupted one.

        writer = FieldWriter(folder, spec, ids)
        for shard, batch in writer.pending(batch_size):      # the batches do not depend on where a run stopped
            writer.put(shard, batch, spec.encode(values))    # durable on return
        writer.finish()                                      # seals the open shards and writes the manifest

    A list that contains all images of a finished field and more adds shards and rewrites none. `shard_size` defaults to that of
    the folder, or 10,000 for a new one. With `part = (i, n)` this writer writes only the shards i, i + n, i + 2n, … `also`
    has further entries of the manifest.
    Raises `UserError` when the folder contains a cache of other settings or images, or when another process is writing one of
    this writer's shards.
    """

    def __init__(
        self, folder: str | Path, spec: FieldSpec, ids: Sequence[str], *,
        shard_size: int | None = None, part: tuple[int, int] = (0, 1), also: Mapping[str, object] | None = None,
    ):  # fmt: skip
        self.folder, self.spec, self._also = Path(folder), spec, also or {}
        self._open: tuple[int, lmdb.Environment] | None = None
        self._checksum: int | None = None  # of the open shard; None if it had rows when it was opened
        if long := next((key for key in ids if len(key.encode()) > MAX_KEY_BYTES), None):
            raise UserError(f"the id {long:.60} … is longer than {MAX_KEY_BYTES} bytes: rename that file")
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = NumberedLocks(self.folder)
            with self._locks.held(PLANNING):
                settings = check_settings(self.folder, spec.as_json(), shard_size)
                self._settings_sha256 = digest_of(settings)
                self.plan = extend_plan(self.folder, ids, settings["shard_size"])
        self.mine = [number for number in range(len(self.plan)) if number % part[1] == part[0]]
        self.complete = self._is_complete()

    def pending(self, batch_size: int) -> list[tuple[int, list[str]]]:
        """Return this writer's batches `(shard, ids)` that are not on disk yet, in order. `close` unlocks their shards."""
        batches = []
        for number in self.mine:
            if self.complete or self._path(number).exists():
                continue
            # LMDB's own locks are off, because readers on shared file systems need that.
            if not self._locks.take(number + 1):
                raise UserError(
                    f"another process is writing {self._path(number)}: wait for it, or give each process its own --shard i/n"
                )
            if self._path(number).exists():  # another process has just sealed it
                continue
            ids, durable = self.plan[number], self._durable(number)
            chunks = (ids[i : i + batch_size] for i in range(0, len(ids), batch_size))
            batches += [(number, chunk) for chunk in chunks if not durable.issuperset(chunk)]
        return batches

    def put(
        self, shard: int, ids: Sequence[str], raw: Tensor, unreadable: Mapping[str, str] | None = None
    ) -> None:
        """Store `raw (len(ids), value_bytes)`, made by `spec.encode` and moved to the CPU, in one synchronous transaction.

        `unreadable` maps the ids of the batch whose images could not be read to the reason; the shard will lack them.
        """
        if raw.shape != (expected := (len(ids), self.spec.value_bytes)):
            raise ValueError(f"{self.spec.field}: expected {expected}, got {tuple(raw.shape)}")
        if not self.spec.is_finite(raw):
            again = "" if self.spec.field == "text" else "run again with --precision fp32, or "
            raise UserError(
                f"the {self.spec.field} of one of {', '.join(ids[:4])} … are not finite numbers as {self.spec.form}: {again}"
                "store them with another --dtype in another folder"
            )
        rows = raw.numpy()
        with self._writing():
            environment = self._environment(shard)
            if unreadable:
                self._partial(shard).note(self._partial(shard).unreadable | dict(unreadable))
            with environment.begin(write=True) as transaction:
                for key, value in zip(ids, rows, strict=True):
                    transaction.put(key.encode(), value.data)
        if self._checksum is not None:
            self._checksum += sum(row_checksum(key.encode(), row) for key, row in zip(ids, rows, strict=True))

    def finish(self) -> dict | None:
        """Seal this writer's shards and return the manifest, or None while shards of other writers are missing."""
        with self._writing():
            for number in self.mine:
                if not self._path(number).exists():
                    self._seal(number)
            with self._locks.held(PLANNING):
                self.plan = read_plan(self.folder)  # another process may have added images
                self.complete = self._is_complete()
                if not self.complete and self._all_sealed():
                    self._write_manifest()
                    self.complete = True
        self.close()
        return read_manifest(self.folder, self.spec.field) if self.complete else None

    def close(self) -> None:
        """Release the files and locks of the folder; everything that was put is already on disk."""
        self._close_shard()
        self._locks.close()

    @property
    def bytes_to_write(self) -> int:
        """The bytes of disk that all unfinished shards still need, those of other writers included."""
        unsealed = [n for n in range(len(self.plan)) if not self._path(n).exists()]
        written = sum(p.stat().st_blocks * 512 for n in unsealed if (p := self._path(n, PARTIAL)).exists())
        return max(0, sum(self._stored_bytes(len(self.plan[n])) for n in unsealed) - written)

    def _all_sealed(self) -> bool:
        return all(self._path(number).exists() for number in range(len(self.plan)))

    def _is_complete(self) -> bool:
        """Return whether every assigned shard is sealed and the manifest describes exactly these shards."""
        if not (self._all_sealed() and (self.folder / MANIFEST).exists()):
            return False
        manifest = read_manifest(self.folder, self.spec.field)
        same = all(manifest[name] == value for name, value in self._also.items())
        return same and manifest["shards"] == [shard for shard, _ in self._sealed()]

    def _sealed(self) -> list[tuple[ShardEntry, dict[str, str]]]:
        """Return for every shard its manifest entry and {id: reason} of its unreadable images."""
        shards = []
        for number in range(len(self.plan)):
            path = self._path(number)
            anew = f"restore it, or delete {path} and run the same command; only this shard is made anew"
            shard = read_record(self._path(number, ".json"), Sealed, anew)
            unreadable = shard.pop("unreadable")
            if (size := path.stat().st_size) != shard["bytes"]:
                written = f"has {size} bytes, {shard['bytes']} were written"
                anew = "delete that file and run the same command; only this shard is made anew"
                raise UserError(f"{path} {written}: {anew}")
            shards.append((shard, unreadable))
        return shards

    def _path(self, shard: int, suffix: str = ".lmdb") -> Path:
        return shard_path(self.folder, shard).with_suffix(suffix)

    def _stored_bytes(self, count: int) -> int:
        """Estimate the bytes that LMDB needs for `count` values: whole pages for each, and twice 64 bytes for its tree."""
        pages = -(-(PAGE_HEADER + self.spec.value_bytes) // PAGE)
        return count * (pages * PAGE + 2 * 64) + 16 * PAGE

    def _environment(self, shard: int) -> lmdb.Environment:
        """Return this partial shard, opened. If another shard was open, close it, and seal it if it is complete."""
        if self._open and self._open[0] != shard:
            self._seal(self._open[0], only_if_complete=True)
        if not self._open:
            path = self._path(shard, PARTIAL)
            self._checksum = 0 if self._stored(shard) is None else None
            if self._checksum == 0:
                self._partial(shard).note({})
            # LMDB must know the largest size beforehand; the file is sparse, so the unused rest takes no disk.
            room = int(self._stored_bytes(len(self.plan[shard])) * 1.25) + (64 << 20)
            try:
                environment = lmdb.open(str(path), subdir=False, map_size=room, lock=False, lib_version=0)
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError):
                raise UserError(f"{path} is damaged: delete it and run the same command") from None
            self._open = (shard, environment)
        return self._open[1]

    def _close_shard(self) -> None:
        if self._open:
            self._open[1].close()
            self._open = None

    def _partial(self, shard: int) -> PartialShard:
        return PartialShard(self._path(shard), self._settings_sha256)

    def _stored(self, shard: int) -> set[str] | None:
        return self._partial(shard).stored(self.plan[shard], self.spec.value_bytes)

    def _durable(self, shard: int) -> set[str]:
        """Return the ids of a partial shard that are stored or known to be unreadable."""
        with self._writing():
            stored = self._stored(shard)
        # Notes may remain from a shard that somebody deleted; the new shard starts without them.
        return set() if stored is None else stored | self._partial(shard).unreadable.keys()

    def _seal(self, shard: int, *, only_if_complete: bool = False) -> None:
        planned = set(self.plan[shard])
        with self._environment(shard).begin() as transaction:
            stored = {key.decode() for key in transaction.cursor().iternext(values=False)}
            # An image noted as unreadable may have been repaired before a later run; a stored value takes precedence.
            noted = self._partial(shard).unreadable.items()
            unreadable = {key: why for key, why in noted if key not in stored}
            if stored | unreadable.keys() != planned:
                if not only_if_complete:
                    raise ValueError(f"sealed too early: {len(stored)} of {len(planned)} values of {shard}")
                transaction.abort()
                return self._close_shard()
            checksum = self._checksum
            if checksum is None:
                checksum = sum(row_checksum(key, value) for key, value in transaction.cursor())
        self._close_shard()
        path, partial = self._path(shard), self._path(shard, PARTIAL)
        size = partial.stat().st_size
        about = {"file": path.name, "count": len(stored), "bytes": size, "checksum": checksum}
        # The description is written first, so that a shard with its final name always has one.
        write_json(self._path(shard, ".json"), about | {"unreadable": unreadable})
        os.replace(partial, path)
        self._partial(shard).forget()
        sync_folder(self.folder)

    def _write_manifest(self) -> None:
        sealed = self._sealed()
        unreadable = {key: (shard["file"], why) for shard, bad in sealed for key, why in bad.items()}
        stored = sorted({key for shard in self.plan for key in shard} - unreadable.keys())
        if unreadable:  # written before the manifest, so that a finished field always lists what it lacks
            rows = ((key, *where) for key, where in unreadable.items())
            write_csv(self.folder / UNREADABLE, UNREADABLE_COLUMNS, rows)
        else:
            (self.folder / UNREADABLE).unlink(missing_ok=True)
        counts = {"num_samples": len(stored), "num_unreadable": len(unreadable)}
        listed = {"ids_sha256": ids_digest(stored), "shards": [shard for shard, _ in sealed]}
        write_manifest(self.folder, self.spec.as_json() | counts | listed | self._also)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn errors such as a full disk or a read-only folder into a one-line `UserError`."""
        try:
            yield
        except (lmdb.Error, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot write to {self.folder}: {reason}; nothing finished is lost: mend that (free some disk, allow writing) "
                "and run the same command"
            ) from None
