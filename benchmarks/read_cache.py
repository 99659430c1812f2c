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
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import cache_formats as formats
from benchmarks.cache_formats import BATCH, SAMPLE_BYTES, VALUE_BYTES, Delivered, Read, loaded
from benchmarks.machine import cpu_seconds, disk_bytes, disk_of, drop_from_page_cache, files_of, memory_mb
from benchmarks.report import Target, add_counts, benchmark_parser, publish, temporary_folder
from cache.dataset import AlignedDataset
from cache.order import StepSampler

WARM_UP = 6  # batches before the clock of `warm` starts: more than any arm reads ahead
GROWTH_MB = 8  # that the allocators may add after the second epoch
OURS, OURS_ONE, WORST = "ours, reader threads", "ours, in the caller", "LMDB txn.get, readahead=False"
NAIVE, MAPPED = "naive LMDB, DataLoader", "flat files mapped, reader threads"
PREADV = "flat files by preadv, reader threads"


def in_caller(read: Read) -> Read:
    return lambda folder, batches, _: read(folder, batches, 0)


# An arm, its format, and how it is read.
WARM: dict[str, tuple[str, Read]] = {
    OURS: ("ours", formats.stream_ours),
    MAPPED: ("flat", formats.stream_mapped),
    PREADV: ("flat", formats.stream_preadv),
    "ours, DataLoader (with text)": ("ours", loaded(formats.Ours)),
    NAIVE: ("lmdb, pickled", loaded(formats.PickledLmdb)),
    "LMDB without copies, DataLoader": ("lmdb, raw", loaded(formats.RawLmdb)),
    "flat files mapped, DataLoader": ("flat", loaded(formats.FlatFiles)),
    "mosaicml-streaming, DataLoader": ("mds", loaded(formats.Mds)),
    "HDF5, DataLoader": ("hdf5", loaded(formats.Hdf5)),
    "webdataset, DataLoader (sequential, not random access)": ("tar", formats.load_tars),
}
COLD: dict[str, tuple[str, Read]] = {
    OURS: ("ours", formats.stream_ours),
    OURS_ONE: ("ours", in_caller(formats.stream_ours)),
    WORST: ("lmdb, raw", in_caller(loaded(formats.RawLmdb))),
    "LMDB txn.get, readahead=True": ("lmdb, raw", in_caller(loaded(formats.RawLmdbReadahead))),
    "flat files mapped": ("flat", in_caller(loaded(formats.FlatFiles))),
    "mosaicml-streaming": ("mds", in_caller(loaded(formats.Mds))),
    "HDF5": ("hdf5", in_caller(loaded(formats.Hdf5))),
}


def main() -> None:
    parser, parts = benchmark_parser(__doc__, warm, cold, full_size)
    readers = (2, "threads of ours, worker processes of a DataLoader")
    add_counts(parts["warm"], samples=(1152, "in every format: 500 MB"), rounds=(5, "of all arms"),
               passes=(4, "over the samples in an arm"), readers=readers)  # fmt: skip
    add_counts(parts["cold"], samples=(2304, "in every format: 1 GB"), read=(512, "of them in an arm: 222 MB"),
               rounds=(3, "of all arms"), readers=readers)  # fmt: skip
    add_counts(parts["full_size"], samples=(5120, "2.2 GB"), shard_size=(2000, "samples in a shard"),
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
    speed = {arm: median_of("samples/s", found) for arm, found in measured.items()}
    rows = [
        {
            "arm": arm,
            "samples/s median": speed[arm],
            "samples/s best": max(entry["samples/s"] for entry in found),
            "GB/s median": speed[arm] * SAMPLE_BYTES / 1e9,
            "CPU µs/sample": median_of("cpu", found) * 1e6,
            "ours / this": speed[OURS] / speed[arm],
        }
        for arm, found in measured.items()
    ]
    rows.sort(key=lambda row: -row["samples/s median"])
    targets = [
        Target("ours / naive LMDB", speed[OURS] / speed[NAIVE], at_least=4),
        Target("ours / flat files mapped", speed[OURS] / speed[MAPPED], at_least=0.8),
        Target("ours / flat files by preadv", speed[OURS] / speed[PREADV], at_least=0.8),
    ]
    others = [arm for arm in measured if not arm.startswith("ours") and arm not in (NAIVE, MAPPED, PREADV)]
    targets += [Target(f"ours / {arm}", speed[OURS] / speed[arm], at_least=1) for arm in others]
    publish(args, rows, targets, skipped=skipped)


def cold(args: argparse.Namespace) -> None:
    measured, skipped = compare(args, COLD, args.read, 1)
    speed = {arm: median_of("samples/s", found) * SAMPLE_BYTES / 1e6 for arm, found in measured.items()}
    rows = [
        {
            "arm": arm,
            "MB/s median": speed[arm],
            "MB/s best": max(entry["samples/s"] for entry in found) * SAMPLE_BYTES / 1e6,
            "read from disk / wanted": median_of("disk", found) / SAMPLE_BYTES,
            "CPU µs/sample": median_of("cpu", found) * 1e6,
        }
        for arm, found in measured.items()
    ]
    rows.sort(key=lambda row: -row["MB/s median"])
    targets = [
        Target("ours / LMDB txn.get, readahead=False", speed[OURS] / speed[WORST], at_least=15),
        Target("the same, both in one thread", speed[OURS_ONE] / speed[WORST], at_least=15),
        Target("ours in MB/s (10 steps of 64 samples a second)", speed[OURS], at_least=280),
    ]
    publish(args, rows, targets, skipped=skipped, disk=disk_of(args.dir))


def compare(
    args: argparse.Namespace, arms: dict[str, tuple[str, Read]], read: int, passes: int
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Measure each arm in every round on `read` random samples, `passes` times; returns that, and what was skipped and why."""

    def batches(passes: int) -> list[list[int]]:
        orders = (torch.randperm(args.samples)[:read].tolist() for _ in range(passes))
        return [order[i : i + BATCH] for order in orders for i in range(0, read, BATCH)]

    values = formats.random_values(args.samples)
    with temporary_folder(args.dir) as folder:
        wanted = dict.fromkeys(name for name, _ in arms.values())
        folders, skipped = formats.write_formats(folder, wanted, values)
        arms = {arm: (folders[name], way) for arm, (name, way) in arms.items() if name in folders}
        for where, way in arms.values():
            check_exact(way(where, batches(1), args.readers), values, read)
        print(f"{len(arms)} arms give every bit as it was written")
        del values
        measured = {arm: [] for arm in arms}
        for _ in range(args.rounds):
            for arm in random.sample(list(arms), len(arms)):
                where, way = arms[arm]
                gc.collect()  # what is still mapped cannot be dropped
                if args.part == "cold":
                    drop_from_page_cache(where)
                warm_up = WARM_UP if args.part == "warm" else 0
                found = measure(partial(way, where), batches(passes), args.readers, warm_up)
                measured[arm].append(found)
                print(f"{arm}: {found['samples/s']:,.0f} samples/s", flush=True)
    for name, reason in skipped.items():
        print(f"skipped: {name} ({reason})")
    return measured, skipped


def measure(read: Callable, batches: list[list[int]], readers: int, warm_up: int) -> dict[str, float]:
    """Samples per second after the first `warm_up` batches, and CPU seconds and disk bytes of all processes per sample.

    Without a warm-up, opening the files and reading their index is part of it.
    """
    cpu, disk, started = cpu_seconds(), disk_bytes(), time.perf_counter()
    for number, _ in enumerate(delivered := read(batches, readers), 1):
        if number == warm_up:
            cpu, disk, started = cpu_seconds(), disk_bytes(), time.perf_counter()
        if number == len(batches):  # while the workers are still there to be asked
            seconds, cpu, disk = time.perf_counter() - started, cpu_seconds() - cpu, disk_bytes() - disk
    del delivered
    count = sum(map(len, batches[warm_up:]))
    return {"samples/s": count / seconds, "cpu": cpu / count, "disk": disk / count}


def median_of(key: str, measured: list[dict]) -> float:
    return statistics.median(entry[key] for entry in measured)


def check_exact(delivered: Iterator[Delivered], values: formats.Values, count: int) -> None:
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
    steps = min(args.steps, args.samples // BATCH)

    with temporary_folder(args.dir) as folder:
        started = time.perf_counter()
        values_of = different_values()
        formats.write_random(folder, args.samples, values_of, args.shard_size, classes=1000)
        del values_of
        seconds = time.perf_counter() - started
        dataset = formats.Ours(folder).opened
        overhead = {
            field: on_disk(folder / field) / (args.samples * size) - 1 for field, size in VALUE_BYTES.items()
        }
        total = sum(on_disk(folder / field) for field in VALUE_BYTES)
        written = {
            "samples": args.samples,
            "shards": len(dataset.latents.manifest["shards"]),
            "GB": total / 1e9,
            "samples/s written": args.samples / seconds,
            **{f"{field}: disk over values": share for field, share in overhead.items()},
        }
        print(", ".join(f"{key} {value:,.4g}" for key, value in written.items()))
        started = time.perf_counter()
        damaged = [name for reader in (dataset.latents, dataset.tokens) for name in reader.damaged_shards()]
        written["seconds to compare all checksums"] = time.perf_counter() - started

        order = partial(StepSampler, len(dataset), batch_size=BATCH, seed=0, first_step=0)
        ways = {
            "BatchStream": formats.stream_ours(folder, order(last_step=steps * args.epochs), args.readers),
            "DataLoader, fork": in_loader(dataset, order(last_step=steps), "fork", args.readers),
            "DataLoader, spawn": in_loader(dataset, order(last_step=steps), "spawn", args.readers),
        }
        rows = [read_epochs(name, way, args.epochs, steps) for name, way in ways.items()]
    targets = [
        Target("disk over values", total / (args.samples * SAMPLE_BYTES) - 1, at_most=0.03),
        Target("shards whose checksum differs", len(damaged), at_most=0),
    ]
    targets += [
        Target(f"{row['reader']}: PSS of the last epochs over that after the second, MB", row["growth MB"],
               at_most=GROWTH_MB)
        for row in rows
    ]  # fmt: skip
    publish(args, rows, targets, written=written)


def different_values() -> Callable[[str, list[int]], Tensor]:
    """Other values for each sample, without drawing billions of numbers."""
    bank = formats.random_values(1024)

    def values_of(field: str, indices: list[int]) -> Tensor:
        stored = bank[field]
        return torch.stack([stored[i % len(stored)].roll(i // len(stored), -1) for i in indices])

    return values_of


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in files_of(folder))


def in_loader(
    dataset: AlignedDataset, order: StepSampler, method: str, workers: int
) -> Iterator[dict[str, Tensor]]:
    """The batches of one epoch after another."""
    loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, persistent_workers=True,
                        multiprocessing_context=method)  # fmt: skip
    while True:
        yield from loader


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
    pss = [entry["Pss"] for entry in memory]
    return {
        "reader": name,
        "samples/s median": statistics.median(rates),
        "samples/s first epoch": rates[0],
        "processes": memory[-1]["processes"],
        "RSS MB": memory[-1]["Rss"],
        "PSS MB": pss[-1],
        "PSS after each epoch": " ".join(f"{value:.0f}" for value in pss),
        "growth MB": max(pss[-2:]) - pss[1],
    }


if __name__ == "__main__":
    main()
