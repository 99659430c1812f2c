"""A cache of thousands of full-size samples: what it takes on disk, how fast it reads, and whether memory stays flat.

    OMP_NUM_THREADS=1 python benchmarks/full_size_cache.py

Writes random values with the cache's own writer, compares the disk taken with the values' own bytes, compares every checksum,
and then reads ten epochs as training does and ten with an ordinary DataLoader of forked and of spawned workers. Memory is
that of the process and its workers when an epoch has ended; PSS counts a page that several share once.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.our_cache import (
    BATCH,
    SAMPLE_BYTES,
    VALUE_BYTES,
    files_of,
    open_ours,
    random_values,
    write_cache,
)
from benchmarks.report import Target, benchmark_parser, family, publish, temporary_folder
from cache.batch_stream import BatchStream
from cache.dataset import AlignedDataset
from cache.order import StepSampler
from preprocessing.options import positive

GROWTH_MB = 8  # that the allocators may add after the second epoch


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--samples", type=positive, default=5120, help="(default 5120: 2.2 GB)")
    parser.add_argument("--shard-size", type=positive, default=2000, help="(default 2000)")
    parser.add_argument("--epochs", type=positive, default=10, help="in each way of reading (default 10)")
    parser.add_argument("--steps", type=positive, help="at most so many batches in an epoch (default: all)")
    parser.add_argument("--readers", type=positive, default=2, help="threads or workers (default 2)")
    args = parser.parse_args()
    if args.epochs < 3:
        parser.error("--epochs must be 3 or more: memory is compared with that after the second")
    steps = min(args.steps or args.samples, args.samples // BATCH)

    with temporary_folder(args.dir) as folder:
        started = time.perf_counter()
        values_of = different_values()
        write_cache(folder, args.samples, values_of, args.shard_size, classes=1000)
        del values_of
        seconds = time.perf_counter() - started
        dataset = open_ours(folder)
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

        ways = {
            "BatchStream": in_stream(dataset, steps, args.epochs, args.readers),
            "DataLoader, fork": in_loader(dataset, steps, "fork", args.readers),
            "DataLoader, spawn": in_loader(dataset, steps, "spawn", args.readers),
        }
        rows = [measure(name, way, args.epochs) for name, way in ways.items()]
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
    bank = random_values(1024)

    def values_of(field: str, indices: list[int]) -> Tensor:
        stored = bank[field]
        return torch.stack([stored[i % len(stored)].roll(i // len(stored), -1) for i in indices])

    return values_of


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in files_of(folder))


def in_stream(dataset: AlignedDataset, steps: int, epochs: int, threads: int) -> Iterator[int]:
    """Ends an epoch with each `next`, which gives the number of samples read."""
    order = StepSampler(len(dataset), batch_size=BATCH, seed=0, first_step=0, last_step=steps * epochs)
    stream = BatchStream(order, dataset.read_batch, dataset.value_bytes, dataset.decode, threads=threads)
    cpu = torch.device("cpu")
    for step, batch in enumerate(stream, 1):
        for name in dataset.readers:
            batch.on(cpu, name)
        if step % steps == 0:
            yield steps * BATCH


def in_loader(dataset: AlignedDataset, steps: int, method: str, workers: int) -> Iterator[int]:
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(dataset), batch_size=BATCH, seed=0, first_step=0, last_step=steps),
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context=method,
    )
    while True:
        for _ in loader:
            pass
        yield steps * BATCH


def measure(name: str, epochs: Iterator[int], count: int) -> dict:
    """Read so many epochs; memory is taken after each."""
    rates, memory = [], []
    for _ in range(count):
        started = time.perf_counter()
        samples = next(epochs)
        rates.append(samples / (time.perf_counter() - started))
        memory.append(memory_mb())
    epochs.close()  # ends workers and threads
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


def memory_mb() -> dict[str, float]:
    """Resident memory of the family, and the same with shared pages divided among those who share them."""
    total = {"Rss": 0.0, "Pss": 0.0, "processes": len(family())}
    for pid in family():
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in ("Rss", "Pss"):
                total[key] += int(rest.split()[0]) / 1000
    return total


if __name__ == "__main__":
    main()
