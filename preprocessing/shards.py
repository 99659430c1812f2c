"""The on-disk format of the cache, and its writer. The only file that uses the LMDB library.

A *field* is one cached quantity: `latents` or `tokens`, one value of fixed size per image. Its folder holds

    settings.json        written first: what this folder is for, so that no other settings are mixed in
    plan.json            which ids go to which shard; grows when images are added, and never changes otherwise
    shard-00000.lmdb     up to 10,000 values, key = image id, value = raw bytes (`preprocessing/encodings.py`); no pickle
    shard-00000.json     count, bytes and checksum of that shard, and the images that could not be read
    unreadable.csv       those images, of all shards, if there are any
    manifest.json        written last: what the values are, from which model, shape, dtype, counts, digest of ids, shards

A shard is written as `shard-00000.lmdb.partial` in synchronous transactions and renamed when it is complete, so a file named
`.lmdb` is always whole. A folder without `manifest.json` is not a cache yet. Several processes may write one field, each its
own shards (`part`); whoever seals the last one writes the manifest. `preprocessing/reader.py` reads all this without LMDB.
"""

import csv
import errno
import fcntl
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import lmdb
import torch
from torch import Tensor

from errors import UserError
from files import sync_folder, write_atomically, write_json
from preprocessing.manifest import (
    MANIFEST,
    SETTINGS,
    UNREADABLE,
    FieldSpec,
    ids_digest,
    insist_same,
    read_json,
    read_manifest,
)
from preprocessing.reader import row_checksum

SHARD_SIZE = 10_000
PLAN = "plan.json"
MAX_KEY_BYTES = 511
PAGE, PAGE_HEADER = 4096, 16
PLANNING = 0  # the byte of .lock for the folder's own files; byte n + 1 stands for shard n


class FieldWriter:
    """Write one field for a list of ids, shard by shard; a second writer with the same settings goes on where one stopped.

        writer = FieldWriter(folder, spec, ids)
        for shard, batch in writer.pending(batch_size):      # fixed batches, so a resumed run encodes the same ones
            writer.put(shard, batch, spec.encode(values))    # durable on return
        writer.finish()                                      # seals what is open, writes the manifest

    A list that holds all images of a finished field and more adds shards and rewrites none. With `part = (i, n)` only the
    shards i, i + n, i + 2n, … are this writer's. Raises `UserError` when the folder holds a cache of other settings or images,
    or another process writes one of its shards.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: FieldSpec,
        ids: Sequence[str],
        *,
        shard_size: int = SHARD_SIZE,
        part: tuple[int, int] = (0, 1),
    ):
        self.folder, self.spec = Path(folder), spec
        self._open: tuple[int, lmdb.Environment] | None = None
        self._checksum: int | None = None  # of the open shard, while every row of it was put by this process
        if long := next((key for key in ids if len(key.encode()) > MAX_KEY_BYTES), None):
            raise UserError(
                f"the id {long} is longer than {MAX_KEY_BYTES} bytes, LMDB's limit: rename that file"
            )
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "a")  # noqa: SIM115 (held until close)
            self._claim(PLANNING, wait=True)
            settings = spec.as_json() | {"shard_size": shard_size}
            if (self.folder / SETTINGS).exists():
                insist_same(self.folder, read_json(self.folder / SETTINGS), settings)
            else:
                write_json(self.folder / SETTINGS, settings)
            self.plan = self._planned(list(ids), shard_size)
            self._release(PLANNING)
        self.mine = [number for number in range(len(self.plan)) if number % part[1] == part[0]]
        self.complete = self._is_complete()

    def pending(self, batch_size: int) -> list[tuple[int, list[str]]]:
        """The batches `(shard, ids)` of this writer that are not durable yet, in order; claims their shards until `close`."""
        batches = []
        for number in self.mine:
            if self.complete or self._path(number).exists():
                continue
            self._claim(number + 1)
            ids, durable = self.plan[number], self._durable(number)
            chunks = (ids[i : i + batch_size] for i in range(0, len(ids), batch_size))
            batches += [(number, chunk) for chunk in chunks if not durable.issuperset(chunk)]
        return batches

    def put(
        self, shard: int, ids: Sequence[str], raw: Tensor, unreadable: Mapping[str, str] | None = None
    ) -> None:
        """Store `raw (len(ids), value_bytes)` (`spec.encode`, on the CPU) in one synchronous transaction.

        `unreadable` maps the other ids of the batch to what is wrong with their images; they are left out for good.
        """
        if raw.shape != (len(ids), self.spec.value_bytes):
            raise ValueError(
                f"{self.spec.field}: expected ({len(ids)}, {self.spec.value_bytes}), got {tuple(raw.shape)}"
            )
        # The extremes carry any NaN or infinity, and cost a thirtieth of isfinite() on fp16.
        if len(ids) and not torch.stack(torch.aminmax(self.spec.decode(raw))).isfinite().all():
            raise UserError(
                f"the {self.spec.field} of one of {', '.join(ids[:4])} … are not finite numbers in {self.spec.dtype}: run "
                "again with --precision fp32, or store them with another --dtype in another folder"
            )
        rows = raw.numpy()
        with self._writing():
            if unreadable:
                known = self._unreadable(shard)
                write_json(self._path(shard).with_suffix(".unreadable"), known | dict(unreadable))
            with self._environment(shard).begin(write=True) as transaction:
                for key, value in zip(ids, rows, strict=True):
                    transaction.put(key.encode(), value.data)
        if self._checksum is not None:
            self._checksum += sum(row_checksum(key.encode(), row) for key, row in zip(ids, rows, strict=True))

    def finish(self) -> dict | None:
        """Seal this writer's shards; returns the manifest, or None while shards of other writers are missing."""
        with self._writing():
            for number in self.mine:
                if not self._path(number).exists():
                    self._seal(number)
            if not self.complete and all(self._path(n).exists() for n in range(len(self.plan))):
                self._claim(PLANNING, wait=True)
                self._write_manifest()
                self._release(PLANNING)
                self.complete = True
        self.close()
        return read_manifest(self.folder, self.spec.field) if self.complete else None

    def close(self) -> None:
        """Let go of the folder; what was put is durable."""
        if self._open:
            self._open[1].close()
            self._open = None
        self._lock.close()

    @property
    def bytes_to_write(self) -> int:
        """Disk that all unfinished shards of the field still need, of this writer and of others."""
        unsealed = [n for n in range(len(self.plan)) if not self._path(n).exists()]
        written = sum(p.stat().st_blocks * 512 for n in unsealed if (p := self._partial(n)).exists())
        return max(0, sum(self._stored_bytes(len(self.plan[n])) for n in unsealed) - written)

    def _planned(self, ids: list[str], shard_size: int) -> list[list[str]]:
        """The plan after these ids were added to it; ids that it holds keep their places."""
        path = self.folder / PLAN
        plan = read_json(path)["shards"] if path.exists() else []
        wanted, planned = set(ids), {key for shard in plan for key in shard}
        if wanted <= planned:
            unfinished = {key for n, shard in enumerate(plan) if not self._path(n).exists() for key in shard}
            lacking = unfinished - wanted
        else:
            lacking = planned - wanted
        if lacking:
            raise UserError(
                f"{self.folder} was begun for other images too ({min(lacking)}, for one): give the list that it was begun with "
                "or one that contains it, or choose another --out"
            )
        new = [key for key in ids if key not in planned]
        if new:
            plan += [new[i : i + shard_size] for i in range(0, len(new), shard_size)]
            write_json(path, {"shards": plan})
        return plan

    def _is_complete(self) -> bool:
        """Whether the manifest describes the shards that are there, and all of the plan."""
        manifest = self.folder / MANIFEST
        whole = all(self._path(number).exists() for number in range(len(self.plan)))
        return whole and manifest.exists() and read_json(manifest).get("shards") == self._sealed()[0]

    def _sealed(self) -> tuple[list[dict], dict[str, str]]:
        """What every shard says of itself, and all images that could not be read."""
        shards = [read_json(self._path(number).with_suffix(".json")) for number in range(len(self.plan))]
        return shards, {key: why for shard in shards for key, why in shard.pop("unreadable").items()}

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.lmdb"

    def _partial(self, shard: int) -> Path:
        return self._path(shard).with_suffix(".lmdb.partial")

    def _stored_bytes(self, count: int) -> int:
        """What LMDB needs for so many values: whole pages for each, and about 64 bytes in its tree."""
        pages = -(-(PAGE_HEADER + self.spec.value_bytes) // PAGE)
        return count * (pages * PAGE + 2 * 64) + 16 * PAGE

    def _environment(self, shard: int) -> lmdb.Environment:
        """The open partial shard; going on to the next one seals the one before."""
        if self._open and self._open[0] != shard:
            self._seal(self._open[0])
        if not self._open:
            # LMDB wants its room ahead; on disk it is sparse.
            room = int(self._stored_bytes(len(self.plan[shard])) * 1.25) + (64 << 20)
            path = self._partial(shard)
            self._checksum = None if path.exists() else 0
            self._open = (shard, lmdb.open(str(path), subdir=False, map_size=room, lock=False, lib_version=0))
        return self._open[1]

    def _unreadable(self, shard: int) -> dict[str, str]:
        path = self._path(shard).with_suffix(".unreadable")
        return read_json(path) if path.exists() else {}

    def _durable(self, shard: int) -> set[str]:
        """The ids of a partial shard that need no more work."""
        if not self._partial(shard).exists():
            return set()
        with self._writing():
            with self._environment(shard).begin() as transaction:
                keys = {key.decode() for key in transaction.cursor().iternext(values=False)}
            self._open[1].close()
            self._open = None
        return keys | self._unreadable(shard).keys()

    def _seal(self, shard: int) -> None:
        unreadable, planned = self._unreadable(shard), self.plan[shard]
        with self._environment(shard).begin() as transaction:
            count = transaction.stat()["entries"]
            checksum = self._checksum
            if checksum is None:
                checksum = sum(row_checksum(key, value) for key, value in transaction.cursor())
        if count + len(unreadable) != len(planned):
            raise ValueError(f"shard {shard} has {count} of {len(planned)} values: sealed too early")
        self._open[1].close()
        self._open = None
        path, partial = self._path(shard), self._partial(shard)
        # The description goes first: a shard that carries its final name always has one.
        write_json(
            path.with_suffix(".json"),
            {"file": path.name, "count": count, "bytes": partial.stat().st_size, "checksum": checksum}
            | {"unreadable": unreadable},
        )
        os.replace(partial, path)
        path.with_suffix(".unreadable").unlink(missing_ok=True)
        sync_folder(self.folder)

    def _write_manifest(self) -> None:
        sealed, unreadable = self._sealed()
        stored = sorted({key for shard in self.plan for key in shard} - unreadable.keys())
        if unreadable:  # before the manifest, so that a finished field always says what it lacks
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([("id", "problem"), *unreadable.items()])
            write_atomically(self.folder / UNREADABLE, text.getvalue().encode())
        counts = {
            "num_samples": len(stored),
            "num_unreadable": len(unreadable),
            "ids_sha256": ids_digest(stored),
        }
        write_json(self.folder / MANIFEST, self.spec.as_json() | counts | {"shards": sealed})

    def _claim(self, place: int, *, wait: bool = False) -> None:
        """Lock one byte of `.lock`: LMDB's own lock is off, as readers on shared file systems need it."""
        try:
            # POSIX locks, which forked decoding workers do not inherit: they may outlive a killed writer by seconds.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"another process is writing {self._path(place - 1)}: wait for it, or give each process its own --shard i/n"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(
                f"{self.folder}: no file locks here, so start no second writer for a shard", file=sys.stderr
            )

    def _release(self, place: int) -> None:
        with suppress(OSError):  # where there are no locks
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, place)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell of a full disk or a read-only folder in one line."""
        try:
            yield
        except (lmdb.Error, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot write to {self.folder}: {reason}; nothing finished is lost: mend that (free some disk, allow writing) "
                "and run the same command"
            ) from None
