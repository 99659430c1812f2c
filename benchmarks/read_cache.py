"""How fast our cache reads against other formats: from the page cache, from disk, and over many epochs at full size.

    OMP_NUM_THREADS=1 python benchmarks/read_cache.py warm
    OMP_NUM_THREADS=1 python benchmarks/read_cache.py cold
    OMP_NUM_THREADS=1 python benchmarks/read_cache.py full_size

Every arm delivers latents and tokens of 64 random samples as one batch in host memory; the arms of a round are in random
order, and every arm is first checked bit for bit. Peers are in benchmarks/requirements.txt; an arm whose package is absent is
reported as skipped.

warm: the clock starts when workers or threads run and the first batches have come.
cold: the files of an arm are first dropped from the page cache (and found absent with mincore), and the bytes that it reads
from the disk are counted. Only some of the samples are read, as from a data set larger than memory. The disk's own cache, or
that of a virtual machine's host, is not under our control.
full_size: writes thousands of random samples with the cache's own writer, compares the disk taken with the values' own bytes,
compares every checksum, and reads ten epochs as training does and ten with a DataLoader of forked and of spawned workers.
Memory is that of the process and its workers when an epoch has ended; PSS counts a page that several share once.
"""

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import cache_formats as formats
from benchmarks.cache_formats import BATCH, SAMPLE_BYTES, SHAPES, VALUE_BYTES, Batches, Format
from benchmarks.machine import cpu_seconds, disk_bytes, disk_of, drop_from_page_cache, files_of, memory_mb
from benchmarks.report import add_part, publish, target, temporary_folder
from benchmarks.synthetic_run import write_cache
from cache.order import StepSampler
from common.arguments import Parser

WARM_UP = 6  # batches before the clock of `warm` starts: more than any arm reads ahead
GROWTH_MB = 8  # that the allocators may add after the second epoch
OURS, OURS_ONE, WORST = "ours, reader threads", "ours, in the caller", "LMDB txn.get, readahead=False"
OURS_LOADED, NAIVE = "ours, DataLoader (with text)", "naive LMDB, DataLoader"
MAPPED, PREADV = "flat files mapped, reader threads", "flat files by preadv, reader threads"

WARM: dict[str, type[Format]] = {
    OURS: formats.OursStreamed,
    MAPPED: formats.MappedStreamed,
    PREADV: formats.PreadvStreamed,
    OURS_LOADED: formats.Ours,
    NAIVE: formats.PickledLmdb,
    "LMDB without copies, DataLoader": formats.RawLmdb,
    "flat files mapped, DataLoader": formats.FlatFiles,
    "mosaicml-streaming, DataLoader": formats.Mds,
    "HDF5, DataLoader": formats.Hdf5,
    "webdataset, DataLoader (sequential, not random access)": formats.Tars,
}
COLD: dict[str, type[Format]] = {  # all but OURS read in the calling process
    OURS: formats.OursStreamed,
    OURS_ONE: formats.OursStreamed,
    WORST: formats.RawLmdb,
    "LMDB txn.get, readahead=True": formats.RawLmdbReadahead,
    "flat files mapped": formats.FlatFiles,
    "mosaicml-streaming": formats.Mds,
    "HDF5": formats.Hdf5,
}


class Speed(NamedTuple):
    """Medians over the rounds, of all processes, and the best round."""

    median: float  # samples per second
    cpu: float  # seconds per sample
    disk: float  # bytes per sample
    best: float


def main() -> None:
    parser = Parser(__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    readers = (2, "threads of ours, worker processes of a DataLoader")
    add_part(parts, warm, samples=(1152, "in every format: 500 MB"), rounds=(5, "of all arms"),
             passes=(4, "over the samples in an arm"), readers=readers)  # fmt: skip
    add_part(parts, cold, samples=(2304, "in every format: 1 GB"), read=(512, "of them in an arm: 222 MB"),
             rounds=(3, "of all arms"), readers=readers)  # fmt: skip
    add_part(parts, full_size, samples=(5120, "2.2 GB"), shard_size=(2000, "samples in a shard"),
             epochs=(10, "in each way of reading"), steps=(10**9, "batches in an epoch"), readers=readers)  # fmt: skip
    args = parser.parse_args()
    if args.part == "full_size" and args.epochs < 3:
        parser.error("--epochs must be 3 or more: memory is compared with that after the second")
    if args.part == "warm" and args.samples % BATCH:
        parser.error(f"--samples must be a multiple of {BATCH}")
    if args.part == "cold" and (args.read % BATCH or args.read > args.samples):
        parser.error(f"--read must be a multiple of {BATCH} and not exceed --samples")
    args.run(args)


def warm(args: argparse.Namespace) -> None:
    measured, skipped = compare(args, WARM, args.samples, args.passes)
    rows = []
    for arm, speed in measured.items():
        row = {"arm": arm, "samples/s median": speed.median, "samples/s best": speed.best}
        row |= {"GB/s median": speed.median * SAMPLE_BYTES / 1e9, "CPU µs/sample": speed.cpu * 1e6}
        rows.append(row | {"ours / this": measured[OURS].median / speed.median})
    ratio = {row["arm"]: row["ours / this"] for row in rows}
    targets = [
        target("ours / naive LMDB", ratio[NAIVE], at_least=4),
        target("ours / flat files mapped", ratio[MAPPED], at_least=0.8),
        target("ours / flat files by preadv", ratio[PREADV], at_least=0.8),
    ]
    others = [arm for arm in WARM if arm in ratio and arm not in (OURS, OURS_LOADED, NAIVE, MAPPED, PREADV)]
    targets += [target(f"ours / {arm}", ratio[arm], at_least=1) for arm in others]
    publish(args, rows, targets, skipped=skipped)


def cold(args: argparse.Namespace) -> None:
    measured, skipped = compare(args, COLD, args.read, 1)
    rows = []
    for arm, speed in measured.items():
        median, best = (rate * SAMPLE_BYTES / 1e6 for rate in (speed.median, speed.best))
        row = {"arm": arm, "MB/s median": median, "MB/s best": best}
        row |= {"read from disk / wanted": speed.disk / SAMPLE_BYTES}
        rows.append(row | {"CPU µs/sample": speed.cpu * 1e6})
    rate = {row["arm"]: row["MB/s median"] for row in rows}
    targets = [
        target("ours / LMDB txn.get, readahead=False", rate[OURS] / rate[WORST], at_least=15),
        target("the same, both in one thread", rate[OURS_ONE] / rate[WORST], at_least=15),
        target("ours in MB/s (10 steps of 64 samples a second)", rate[OURS], at_least=280),
    ]
    publish(args, rows, targets, skipped=skipped, disk=disk_of(args.dir))


def compare(args: argparse.Namespace, arms: dict, read: int, passes: int) -> tuple[dict[str, Speed], dict]:
    """Measure each arm in every round on `read` random samples, `passes` times.

    Returns the arms' speeds, the fastest first, and which formats were skipped and why.
    """

    def batches(passes: int) -> list[list[int]]:
        orders = (torch.randperm(args.samples)[:read].tolist() for _ in range(passes))
        return [order[i : i + BATCH] for order in orders for i in range(0, read, BATCH)]

    is_cold = args.part == "cold"
    warm_up = 0 if is_cold else WARM_UP
    values = formats.random_values(args.samples)
    with temporary_folder(args.dir) as folder:
        folders, skipped = formats.write_formats(folder, arms.values(), values)
        arms = {arm: kind for arm, kind in arms.items() if kind.name in folders}
        readers = {arm: 0 if is_cold and arm != OURS else args.readers for arm in arms}
        for arm, kind in arms.items():
            check_exact(kind(folders[kind.name]).read(batches(1), readers[arm]), values, read)
        print(f"{len(arms)} arms give every bit as it was written")
        del values
        rounds = {arm: [] for arm in arms}
        for _ in range(args.rounds):
            for arm in random.sample(list(arms), len(arms)):
                where = folders[arms[arm].name]
                gc.collect()  # what is still mapped cannot be dropped
                if is_cold:
                    drop_from_page_cache(where)
                found = measure(arms[arm](where), batches(passes), readers[arm], warm_up)
                rounds[arm].append(found)
                print(f"{arm}: {found[0]:,.0f} samples/s", flush=True)
    for name, reason in skipped.items():
        print(f"skipped: {name} ({reason})")
    speeds = [(arm, Speed(*np.median(found, axis=0), max(found)[0])) for arm, found in rounds.items()]
    return dict(sorted(speeds, key=lambda entry: -entry[1].median)), skipped


def measure(arm: Format, batches: Batches, readers: int, warm_up: int) -> tuple[float, float, float]:
    """Samples per second after the first `warm_up` batches, and CPU seconds and disk bytes of all processes per sample.

    Without a warm-up, opening the files and reading their index is part of it.
    """
    cpu, disk, started = cpu_seconds(), disk_bytes(), time.perf_counter()
    for number, _ in enumerate(delivered := arm.read(batches, readers), 1):
        if number == warm_up:
            cpu, disk, started = cpu_seconds(), disk_bytes(), time.perf_counter()
        if number == len(batches):  # while the workers are still there to be asked
            seconds, cpu, disk = time.perf_counter() - started, cpu_seconds() - cpu, disk_bytes() - disk
    del delivered
    count = sum(map(len, batches[warm_up:]))
    return count / seconds, cpu / count, disk / count


def check_exact(delivered: Iterator[formats.Delivered], values: formats.Values, count: int) -> None:
    """Raise unless `count` samples arrive and every bit of them is what was written."""
    seen = 0
    for indices, batch in delivered:
        seen += len(indices)
        for name, value in batch.items():
            if not torch.equal(value.half().view(torch.int16), values[name][indices].view(torch.int16)):
                raise AssertionError(f"{name} of samples {indices[:4]} … are not what was written")
    if seen != count:
        raise AssertionError(f"{seen} samples arrived, {count} were asked for")


def full_size(args: argparse.Namespace) -> None:
    count, steps, bank = args.samples, min(args.steps, args.samples // BATCH), formats.random_values(1024)

    def values_of(field: str, indices: list[int]) -> Tensor:
        """Other values for each sample, without drawing billions of numbers."""
        return torch.stack([bank[field][i % 1024].roll(i // 1024, -1) for i in indices])

    with temporary_folder(args.dir) as folder:
        started = time.perf_counter()
        write_cache(folder, SHAPES, count, values_of, classes=1000, shard_size=args.shard_size)
        seconds = time.perf_counter() - started
        ours = formats.OursStreamed(folder)
        dataset = ours.opened
        taken = {
            field: sum(path.stat().st_blocks * 512 for path in files_of(folder / field))
            for field in VALUE_BYTES
        }
        written = {"samples": count, "shards": len(dataset.latents.manifest["shards"])}
        written |= {"GB": sum(taken.values()) / 1e9, "samples/s written": count / seconds}
        for field, size in VALUE_BYTES.items():
            written[f"{field}: disk over values"] = taken[field] / (count * size) - 1
        print(", ".join(f"{key} {value:,.4g}" for key, value in written.items()))
        started = time.perf_counter()
        damaged = [name for reader in (dataset.latents, dataset.tokens) for name in reader.damaged_shards()]
        written["seconds to compare all checksums"] = time.perf_counter() - started

        order = partial(StepSampler, len(dataset), batch_size=BATCH, seed=0, first_step=0)

        def in_loader(method: str) -> Iterator[dict[str, Tensor]]:
            """The batches of one epoch after another."""
            how = {"num_workers": args.readers, "persistent_workers": True, "multiprocessing_context": method}
            loader = DataLoader(dataset, batch_sampler=order(last_step=steps), **how)
            while True:
                yield from loader

        ways = {
            "BatchStream": ours.read(order(last_step=steps * args.epochs), args.readers),
            "DataLoader, fork": in_loader("fork"),
            "DataLoader, spawn": in_loader("spawn"),
        }
        rows = [read_epochs(name, way, args.epochs, steps) for name, way in ways.items()]
    targets = [
        target("disk over values", sum(taken.values()) / (count * SAMPLE_BYTES) - 1, at_most=0.03),
        target("shards whose checksum differs", len(damaged), at_most=0),
    ]
    for row in rows:
        what = f"{row['reader']}: PSS of the last epochs over that after the second, MB"
        targets.append(target(what, row["growth MB"], at_most=GROWTH_MB))
    publish(args, rows, targets, written=written)


def read_epochs(name: str, batches: Iterator, epochs: int, steps: int) -> dict:
    """Read so many epochs of so many steps, and note the memory after each."""
    rates, memory = [], []
    for _ in range(epochs):
        started = time.perf_counter()
        for _ in islice(batches, steps):
            pass
        rates.append(steps * BATCH / (time.perf_counter() - started))
        memory.append(memory_mb())
    batches.close()  # ends workers and threads
    print(f"{name}: {statistics.median(rates):,.0f} samples/s", flush=True)
    last, pss = memory[-1], [entry["Pss"] for entry in memory]
    speed = {"samples/s median": statistics.median(rates), "samples/s first epoch": rates[0]}
    used = {"processes": last["processes"], "RSS MB": last["Rss"], "PSS MB": last["Pss"]}
    used["PSS after each epoch"] = " ".join(f"{value:.0f}" for value in pss)
    return {"reader": name, **speed, **used, "growth MB": max(pss[-2:]) - pss[1]}


if __name__ == "__main__":
    main()
