"""Samples per second into a batch in host memory, from the page cache, in random order: our reader against others.

    OMP_NUM_THREADS=1 python benchmarks/read_warm.py

Every arm delivers latents and tokens of 64 random samples as one batch. The clock starts when workers or threads run and
the first batches have come; the arms of a round are in random order, and every arm is first checked bit for bit. Peers are
in benchmarks/requirements.txt; an arm whose package is absent is reported as skipped.
"""

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import torch

from benchmarks.cache_formats import FORMATS, load, load_tars, stream_flat, write_formats
from benchmarks.our_cache import BATCH, SAMPLE_BYTES, Delivered, insist_exact, random_values, stream_ours
from benchmarks.report import Target, benchmark_parser, cpu_seconds, publish, temporary_folder
from preprocessing.options import positive

WARM_UP = 6  # batches before the clock starts: more than any arm reads ahead
OURS, NAIVE, LIMIT = "ours, reader threads", "naive LMDB, DataLoader", "flat files mapped, reader threads"
LIMIT_OF_CALLS = "flat files by preadv, reader threads"  # safe where a file shrinks or a disk fails; a map ends the process


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--samples", type=positive, default=1152, help="in every format (default 1152: 500 MB)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="(default 5)")
    parser.add_argument("--passes", type=positive, default=4, help="over the samples in an arm (default 4)")
    parser.add_argument(
        "--readers",
        type=positive,
        default=2,
        help="threads of ours, worker processes of the others (default 2)",
    )
    args = parser.parse_args()
    if args.samples % BATCH:
        parser.error(f"--samples must be a multiple of {BATCH}")

    values = random_values(args.samples)
    with temporary_folder(args.dir) as folder:
        folders, absent = write_formats(folder, list(FORMATS), values)
        arms = make_arms(folders, args.readers)
        for arm in arms.values():
            insist_exact(arm(random_batches(args.samples, 1)), values, args.samples)
        print(f"{len(arms)} arms give every bit as it was written")
        measured = {name: [] for name in arms}
        for _ in range(args.rounds):
            for name in random.sample(list(arms), len(arms)):
                measured[name].append(rate(arms[name], random_batches(args.samples, args.passes)))
                print(f"{name}: {measured[name][-1][0]:,.0f} samples/s", flush=True)
    rows = [row(name, measured[name], measured[OURS]) for name in arms]
    rows.sort(key=lambda entry: -entry["samples/s median"])
    for name, reason in absent.items():
        print(f"skipped: {name} ({reason})")
    speed = {entry["arm"]: entry["samples/s median"] for entry in rows}
    targets = [
        Target("ours / naive LMDB", speed[OURS] / speed[NAIVE], at_least=4),
        Target("ours / flat files mapped", speed[OURS] / speed[LIMIT], at_least=0.8),
        Target("ours / flat files by preadv", speed[OURS] / speed[LIMIT_OF_CALLS], at_least=0.8),
    ]
    others = [
        name for name in arms if not name.startswith("ours") and name not in (NAIVE, LIMIT, LIMIT_OF_CALLS)
    ]
    targets += [Target(f"ours / {name}", speed[OURS] / speed[name], at_least=1) for name in others]
    publish(args, rows, targets, skipped=absent)


def make_arms(
    folders: dict[str, Path], readers: int
) -> dict[str, Callable[[list[list[int]]], Iterator[Delivered]]]:
    def in_loader(name: str):
        return lambda batches: load(FORMATS[name].dataset(folders[name]), batches, readers)

    arms = {
        OURS: lambda batches: stream_ours(folders["ours"], batches, readers),
        LIMIT: lambda batches: stream_flat(folders["flat"], batches, readers, mapped=True),
        LIMIT_OF_CALLS: lambda batches: stream_flat(folders["flat"], batches, readers, mapped=False),
        "ours, DataLoader (with text)": in_loader("ours"),
        NAIVE: in_loader("lmdb, pickled"),
        "LMDB without copies, DataLoader": in_loader("lmdb, raw"),
        "flat files mapped, DataLoader": in_loader("flat"),
    }
    if "mds" in folders:
        arms["mosaicml-streaming, DataLoader"] = in_loader("mds")
    if "hdf5" in folders:
        arms["HDF5, DataLoader"] = in_loader("hdf5")
    if "tar" in folders:
        arms["webdataset, DataLoader (sequential, not random access)"] = lambda batches: load_tars(
            folders["tar"], sum(map(len, batches)), BATCH, readers
        )
    return arms


def random_batches(samples: int, passes: int) -> list[list[int]]:
    orders = (torch.randperm(samples).tolist() for _ in range(passes))
    return [order[i : i + BATCH] for order in orders for i in range(0, samples, BATCH)]


def rate(
    arm: Callable[[list[list[int]]], Iterator[Delivered]], batches: list[list[int]]
) -> tuple[float, float]:
    """Samples per second, and CPU seconds of all processes per sample, after the first batches."""
    gc.collect()
    for number, _ in enumerate(delivered := arm(batches)):
        if number == WARM_UP - 1:
            started, cpu = time.perf_counter(), cpu_seconds()
        if number == len(batches) - 1:  # while the workers are still there to be asked
            seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    del delivered
    timed = (len(batches) - WARM_UP) * BATCH
    return timed / seconds, cpu / timed


def row(name: str, measured: list[tuple[float, float]], ours: list[tuple[float, float]]) -> dict:
    rates = [samples for samples, _ in measured]
    median = statistics.median(rates)
    return {
        "arm": name,
        "samples/s median": median,
        "samples/s best": max(rates),
        "GB/s median": median * SAMPLE_BYTES / 1e9,
        "CPU µs/sample": statistics.median(cpu for _, cpu in measured) * 1e6,
        "ours / this": statistics.median(samples for samples, _ in ours) / median,
    }


if __name__ == "__main__":
    main()
