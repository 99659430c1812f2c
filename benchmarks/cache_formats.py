"""The same samples in every format that people keep caches in, written and read as each format's own manual says.

A sample is a latent (4, 64, 64) and tokens (196, 1024), fp16: 434,176 bytes. Each subclass of `Format` is one way to read them.
"""

import importlib
import math
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import files_of
from benchmarks.synthetic_run import SIZES, write_cache
from cache.batch_stream import BatchStream
from cache.dataset import AlignedDataset

# PyTorch warns of read-only memory; nobody writes into these tensors.
warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")

SHAPES = SIZES["full"]  # SD-1.5 at 512 px, DINOv2-L at 196 px
FIELDS = {name: SHAPES[name] for name in ("latents", "tokens")}
VALUE_BYTES = {name: 2 * math.prod(shape) for name, shape in FIELDS.items()}
SAMPLE_BYTES = sum(VALUE_BYTES.values())
OF_OURS = {"latent": "latents", "dino_tokens": "tokens"}  # names in our batches -> names here
BATCH = 64
Values = dict[str, Tensor]  # of n samples, latents (n, 4, 64, 64) and tokens (n, 196, 1024)
Batches = Sequence[Sequence[int]]
Delivered = tuple[list[int], Values]  # which samples, and their values as one batch in host memory


def random_values(count: int) -> Values:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, *shape, generator=generator).half() for name, shape in FIELDS.items()}


def samples_of(values: Values) -> Iterator[dict[str, np.ndarray]]:
    for latents, tokens in zip(values["latents"].numpy(), values["tokens"].numpy(), strict=True):
        yield {"latents": latents, "tokens": tokens}


def shaped(parts: dict[str, bytes]) -> Values:
    """The bytes of one sample as values, without a copy."""
    return {name: torch.frombuffer(p, dtype=torch.float16).view(FIELDS[name]) for name, p in parts.items()}


class Format(Dataset):
    """Samples in a folder. The files are opened in the process that reads them, when it first does.

    A subclass has `write(values)` and `open()`, of whose result `arrays` takes the values of one sample.
    """

    name: str  # formats of one name read the same files
    needs: str | None = None  # a module that is not in requirements.txt

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def opened(self):
        return self.open()

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        return {name: stored[index] for name, stored in self.opened.items()}

    def __getitem__(self, index: int) -> Values:
        return {name: torch.from_numpy(value) for name, value in self.arrays(index).items()}

    def read(self, batches: Batches, workers: int) -> Iterator[Delivered]:
        """Read by an ordinary DataLoader with PyTorch's own collation; other formats by as many threads."""
        loader = DataLoader(self, batch_sampler=batches, num_workers=workers)
        for indices, batch in zip(batches, loader, strict=True):
            yield indices, {name: batch[name] for name in FIELDS}


class Ours(Format):
    """Our dataset under the names of this file; its items also carry the text embedding of their class."""

    name = "ours"

    def write(self, values: Values) -> None:
        count = len(values["latents"])
        # Few classes: the text table is read when a training starts, not when a batch is.
        how = {"classes": 10, "shard_size": count // 2}
        write_cache(self.folder, SHAPES, count, lambda field, indices: values[field][indices], **how)

    def open(self) -> AlignedDataset:
        return AlignedDataset(*(self.folder / name for name in ("list.csv", "latents", "tokens", "text")))

    def __getitems__(self, indices: list[int]) -> list[Values]:
        items = self.opened.__getitems__(indices)
        return [{OF_OURS.get(name, name): value for name, value in item.items()} for item in items]


class OursStreamed(Ours):
    """Read as training does."""

    def read(self, batches: Iterable[list[int]], threads: int) -> Iterator[Delivered]:
        ours, cpu = self.opened, torch.device("cpu")
        stream = BatchStream(batches, ours.read_batch, ours.value_bytes, ours.decode, threads=threads)
        for batch in stream:
            yield batch.indices, {here: batch.on(cpu, name) for name, here in OF_OURS.items()}


class PickledLmdb(Format):
    """The obvious way: pickled samples, LMDB's own flags, a transaction for each sample."""

    name = "lmdb, pickled"
    encode = staticmethod(pickle.dumps)

    def environment(self, **flags) -> lmdb.Environment:
        return lmdb.open(str(self.folder / "data.lmdb"), subdir=False, lib_version=0, **flags)

    def write(self, values: Values) -> None:
        with self.environment(map_size=1 << 40) as environment:
            for index, sample in enumerate(samples_of(values)):
                with environment.begin(write=True) as transaction:
                    transaction.put(b"%08d" % index, self.encode(sample))

    def open(self):
        return self.environment(readonly=True)

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        with self.opened.begin() as transaction:
            return pickle.loads(transaction.get(b"%08d" % index))


class RawLmdb(PickledLmdb):
    """Raw bytes, no copy before the batch, one long transaction, the flags that blogs recommend."""

    name = "lmdb, raw"
    readahead = False

    @staticmethod
    def encode(sample: dict[str, np.ndarray]) -> bytes:
        return sample["latents"].tobytes() + sample["tokens"].tobytes()

    def open(self):
        environment = self.environment(readonly=True, lock=False, readahead=self.readahead, meminit=False)
        return environment.begin(buffers=True)

    def __getitem__(self, index: int) -> Values:
        record, start = self.opened.get(b"%08d" % index), VALUE_BYTES["latents"]
        return shaped({"latents": record[:start], "tokens": record[start:]})


class RawLmdbReadahead(RawLmdb):
    """The same with the kernel's read-ahead."""

    readahead = True


class FlatFiles(Format):
    """One file for each field, mapped into memory."""

    name = "flat"

    def write(self, values: Values) -> None:
        for name, value in values.items():
            value.numpy().tofile(self.folder / f"{name}.bin")

    def open(self) -> dict[str, np.memmap]:
        maps = {name: np.memmap(self.folder / f"{name}.bin", np.float16, "r") for name in FIELDS}
        return {name: mapped.reshape(-1, *FIELDS[name]) for name, mapped in maps.items()}


class MappedStreamed(FlatFiles):
    """The least that a random read can cost: one copy of a memory map into memory that is used again."""

    def open(self) -> dict:
        maps = super().open().items()
        return {name: mapped.reshape(len(mapped), -1).view(np.uint8) for name, mapped in maps}

    def copy(self, name: str, index: int, out: np.ndarray) -> None:
        out[:] = self.opened[name][index]

    def read(self, batches: Batches, threads: int) -> Iterator[Delivered]:
        def read(indices: Sequence[int], raw: Values) -> None:
            for name in FIELDS:
                for index, out in zip(indices, raw[name].numpy(), strict=True):  # out: (value_bytes,)
                    self.copy(name, index, out)

        _ = self.opened  # before there are threads
        for batch in BatchStream(batches, read, VALUE_BYTES, {}, threads=threads):
            raw = {name: stored.view(torch.float16) for name, stored in batch.raw.items()}
            yield batch.indices, {name: values.view(-1, *FIELDS[name]) for name, values in raw.items()}


class PreadvStreamed(MappedStreamed):
    """The same by system calls, which are safe where a file shrinks or a disk fails; a map ends the process."""

    def open(self) -> dict:
        return {name: open(self.folder / f"{name}.bin", "rb") for name in FIELDS}  # while this object lives

    def copy(self, name: str, index: int, out: np.ndarray) -> None:
        os.preadv(self.opened[name].fileno(), [out], index * VALUE_BYTES[name])


class Mds(Format):
    name, needs = "mds", "streaming"

    def write(self, values: Values) -> None:
        from streaming import MDSWriter

        columns = {name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in FIELDS.items()}
        with MDSWriter(out=str(self.folder / "mds"), columns=columns) as writer:
            for sample in samples_of(values):
                writer.write(sample)

    def open(self):
        from streaming import LocalDataset

        return LocalDataset(str(self.folder / "mds"))

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        return self.opened[index]


class Hdf5(Format):
    """A chunk for each value."""

    name, needs = "hdf5", "h5py"

    def write(self, values: Values) -> None:
        import h5py

        with h5py.File(self.folder / "data.h5", "w") as file:
            for name, value in values.items():
                file.create_dataset(name, data=value.numpy(), chunks=(1, *FIELDS[name]))

    def open(self):
        import h5py

        file = h5py.File(self.folder / "data.h5", "r")
        return {name: file[name] for name in FIELDS}


class Tars(Format):
    """As many batches of whole tar files in random order through a buffer of samples: no random access."""

    name, needs = "tar", "webdataset"

    def write(self, values: Values) -> None:
        import webdataset

        with webdataset.ShardWriter(str(self.folder / "%05d.tar"), maxcount=128, verbose=0) as writer:
            for index, sample in enumerate(samples_of(values)):
                parts = {name: value.tobytes() for name, value in sample.items()}
                writer.write({"__key__": f"{index:08d}"} | parts)

    def read(self, batches: Batches, workers: int) -> Iterator[Delivered]:
        import webdataset

        tars = sorted(map(str, self.folder.glob("*.tar")))
        dataset = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(128).map(_tar_sample)
        loader = DataLoader(dataset.repeat(), batch_size=BATCH, num_workers=workers)
        for batch, _ in zip(loader, batches, strict=False):
            yield batch["index"].tolist(), {name: batch[name] for name in FIELDS}


def _tar_sample(sample: dict) -> dict:
    return shaped({name: sample[name] for name in FIELDS}) | {"index": int(sample["__key__"])}


def write_formats(folder: Path, wanted: Iterable[type[Format]], values: Values) -> tuple[dict, dict]:
    """Write the wanted formats into durable folders; returns these by name, and the reasons why others are absent."""
    folders: dict[str, Path] = {}
    absent: dict[str, str] = {}
    for name, kind in {kind.name: kind for kind in wanted}.items():
        try:
            if kind.needs:
                importlib.import_module(kind.needs)
        except ImportError as error:
            absent[name] = f"{error}; install benchmarks/requirements.txt with --no-deps"
            continue
        folders[name] = folder / name
        folders[name].mkdir()
        kind(folders[name]).write(values)
        for path in files_of(folders[name]):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return folders, absent
