"""The same samples in every format that people keep caches in, written and read as its own manual says.

`FORMATS` is the table.
"""

import importlib
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from benchmarks.our_cache import FIELDS, VALUE_BYTES, Delivered, OursPerItem, Values, files_of, write_cache
from cache.batch_stream import BatchStream

# PyTorch warns of read-only memory; nobody writes into these tensors.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")


class LazyDataset(Dataset):
    """Opens its files in the process that reads them, when it first does."""

    def __init__(self, folder: Path):
        self.folder, self._opened = folder, None

    @property
    def opened(self):
        if self._opened is None:
            self._opened = self.open()
        return self._opened


def write_ours(folder: Path, values: Values) -> None:
    count = len(values["latents"])
    # Few classes: the text table is read when a training starts, not when a batch is.
    write_cache(folder, count, lambda field, rows: values[field][rows], count // 2, classes=10)


def write_lmdb(folder: Path, records: Iterator[bytes]) -> None:
    with lmdb.open(str(folder / "data.lmdb"), subdir=False, map_size=1 << 40, lib_version=0) as environment:
        for index, record in enumerate(records):
            with environment.begin(write=True) as transaction:
                transaction.put(b"%08d" % index, record)


def write_pickled_lmdb(folder: Path, values: Values) -> None:
    rows = zip(values["latents"].numpy(), values["tokens"].numpy(), strict=True)
    write_lmdb(folder, (pickle.dumps({"latents": latent, "tokens": tokens}) for latent, tokens in rows))


def write_raw_lmdb(folder: Path, values: Values) -> None:
    rows = zip(values["latents"].numpy(), values["tokens"].numpy(), strict=True)
    write_lmdb(folder, (latent.tobytes() + tokens.tobytes() for latent, tokens in rows))


class PickledLmdb(LazyDataset):
    """What one writes first: pickled samples, LMDB's own flags, a transaction for each sample."""

    def open(self):
        return lmdb.open(str(self.folder / "data.lmdb"), subdir=False, readonly=True, lib_version=0)

    def __getitem__(self, index: int) -> Values:
        with self.opened.begin() as transaction:
            sample = pickle.loads(transaction.get(b"%08d" % index))
        return {name: torch.from_numpy(value) for name, value in sample.items()}


class RawLmdb(LazyDataset):
    """Raw bytes, no copy before the batch, one long transaction, the flags that blogs recommend."""

    readahead = False

    def open(self):
        environment = lmdb.open(
            str(self.folder / "data.lmdb"), subdir=False, readonly=True, lock=False, readahead=self.readahead,
            meminit=False, lib_version=0,
        )  # fmt: skip
        return environment.begin(buffers=True)

    def __getitem__(self, index: int) -> Values:
        return split(self.opened.get(b"%08d" % index))


class RawLmdbReadahead(RawLmdb):
    readahead = True


def split(record: bytes | memoryview) -> Values:
    """Both values of a record, without a copy."""
    latents = torch.frombuffer(record, dtype=torch.float16, count=VALUE_BYTES["latents"] // 2)
    tokens = torch.frombuffer(record, dtype=torch.float16, offset=VALUE_BYTES["latents"])
    return {"latents": latents.view(FIELDS["latents"]), "tokens": tokens.view(FIELDS["tokens"])}


def write_flat(folder: Path, values: Values) -> None:
    for name, value in values.items():
        value.numpy().tofile(folder / f"{name}.bin")


class FlatFiles(LazyDataset):
    """One file for each field, mapped into memory."""

    def open(self) -> dict[str, np.memmap]:
        maps = {name: np.memmap(self.folder / f"{name}.bin", np.float16, "r") for name in FIELDS}
        return {name: mapped.reshape(-1, *FIELDS[name]) for name, mapped in maps.items()}

    def __getitem__(self, index: int) -> Values:
        return {name: torch.from_numpy(mapped[index]) for name, mapped in self.opened.items()}

    def read_batch(self, indices: Sequence[int], raw: Values) -> None:
        for name, mapped in self.opened.items():
            out = raw[name].view(torch.float16).view(-1, *FIELDS[name]).numpy()
            for place, index in enumerate(indices):
                out[place] = mapped[index]


def stream_flat(
    folder: Path, batches: Sequence[list[int]], threads: int, *, mapped: bool
) -> Iterator[Delivered]:
    """The least that a random read can cost: one copy, into memory that is used again, by memory map or by system call."""
    dataset = FlatFiles(folder)
    with ExitStack() as files:
        opened = {name: files.enter_context(open(folder / f"{name}.bin", "rb")).fileno() for name in FIELDS}

        def read_by_calls(indices: Sequence[int], raw: Values) -> None:
            for name, size in VALUE_BYTES.items():
                out = raw[name].numpy()
                for place, index in enumerate(indices):
                    os.preadv(opened[name], [out[place]], index * size)

        _ = dataset.opened
        read = dataset.read_batch if mapped else read_by_calls
        for batch in BatchStream(batches, read, VALUE_BYTES, {}, threads=threads):
            values = {
                name: raw.view(torch.float16).view(-1, *FIELDS[name]) for name, raw in batch.raw.items()
            }
            yield batch.indices, values


def write_mds(folder: Path, values: Values) -> None:
    from streaming import MDSWriter

    columns = {name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in FIELDS.items()}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for latent, tokens in zip(values["latents"].numpy(), values["tokens"].numpy(), strict=True):
            writer.write({"latents": latent, "tokens": tokens})


class Mds(LazyDataset):
    def open(self):
        from streaming import LocalDataset

        return LocalDataset(str(self.folder / "mds"))

    def __getitem__(self, index: int) -> Values:
        return {name: torch.from_numpy(value) for name, value in self.opened[index].items()}


def write_hdf5(folder: Path, values: Values) -> None:
    import h5py

    with h5py.File(folder / "data.h5", "w") as file:
        for name, value in values.items():
            file.create_dataset(name, data=value.numpy(), chunks=(1, *FIELDS[name]))


class Hdf5(LazyDataset):
    """A chunk for each value."""

    def open(self):
        import h5py

        file = h5py.File(self.folder / "data.h5", "r")
        return {name: file[name] for name in FIELDS}

    def __getitem__(self, index: int) -> Values:
        return {name: torch.from_numpy(stored[index]) for name, stored in self.opened.items()}


def write_tars(folder: Path, values: Values) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=128, verbose=0) as writer:
        for index, (latent, tokens) in enumerate(
            zip(values["latents"].numpy(), values["tokens"].numpy(), strict=True)
        ):
            writer.write({"__key__": f"{index:08d}", "latents": latent.tobytes(), "tokens": tokens.tobytes()})


def open_tars(folder: Path) -> IterableDataset:
    """Whole tar files in random order, then a buffer of samples to draw from: no random access."""
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    return webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(128).map(_tar_sample)


def _tar_sample(sample: dict) -> Values:
    values = {name: torch.frombuffer(sample[name], dtype=torch.float16) for name in FIELDS}
    return {name: value.view(FIELDS[name]) for name, value in values.items()} | {
        "index": int(sample["__key__"])
    }


@dataclass(frozen=True)
class Format:
    write: Callable[[Path, Values], None]
    dataset: Callable[[Path], Dataset]
    needs: str | None = None  # a module that is not in requirements.txt


FORMATS = {
    "ours": Format(write_ours, OursPerItem),
    "lmdb, pickled": Format(write_pickled_lmdb, PickledLmdb),
    "lmdb, raw": Format(write_raw_lmdb, RawLmdb),
    "flat": Format(write_flat, FlatFiles),
    "mds": Format(write_mds, Mds, "streaming"),
    "hdf5": Format(write_hdf5, Hdf5, "h5py"),
    "tar": Format(write_tars, open_tars, "webdataset"),
}


def write_formats(
    folder: Path, names: Sequence[str], values: Values
) -> tuple[dict[str, Path], dict[str, str]]:
    """Write each format into a folder of its own and make it durable; returns the folders, and why others are absent."""
    folders, absent = {}, {}
    for name in names:
        try:
            if FORMATS[name].needs:
                importlib.import_module(FORMATS[name].needs)
        except ImportError as error:
            absent[name] = f"{error}; install benchmarks/requirements.txt with --no-deps"
            continue
        folders[name] = folder / name.replace(", ", "-")
        folders[name].mkdir()
        FORMATS[name].write(folders[name], values)
        for path in files_of(folders[name]):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return folders, absent


def load(dataset: Dataset, batches: Sequence[list[int]], workers: int) -> Iterator[Delivered]:
    """An ordinary DataLoader with PyTorch's own collation."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    for indices, batch in zip(batches, loader, strict=True):
        yield indices, {name: batch[name] for name in FIELDS}


def load_tars(folder: Path, count: int, batch_size: int, workers: int) -> Iterator[Delivered]:
    """So many samples, in the order in which the tar files give them."""
    loader = DataLoader(open_tars(folder).repeat(), batch_size=batch_size, num_workers=workers)
    for batch, _ in zip(loader, range(count // batch_size), strict=False):
        yield batch["index"].tolist(), {name: batch[name] for name in FIELDS}
