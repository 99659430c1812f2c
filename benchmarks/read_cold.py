"""Megabytes per second from disk, in random order, with nothing in the page cache: our reader against others.

    OMP_NUM_THREADS=1 python benchmarks/read_cold.py

Before each arm its files are dropped from the page cache (and found absent with mincore), and what it really read from the
disk is counted. Of the samples on disk only some are read, 64 at a time, as from a data set larger than memory: what the
kernel reads beside them is lost. Everything reads in one process; ours with as many threads as training uses, and once with
none. The disk's own cache, or that of a virtual machine's host, is not under our control.
"""

import ctypes
import gc
import mmap
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, the root is not on the path

import numpy as np
import torch

from benchmarks.cache_formats import FORMATS, FlatFiles, RawLmdb, RawLmdbReadahead, load, write_formats
from benchmarks.our_cache import (
    BATCH,
    SAMPLE_BYTES,
    Delivered,
    files_of,
    insist_exact,
    random_values,
    stream_ours,
)
from benchmarks.report import Target, benchmark_parser, cpu_seconds, family, publish, temporary_folder
from preprocessing.options import positive

OURS, OURS_ONE, WORST = "ours, reader threads", "ours, in the caller", "LMDB txn.get, readahead=False"
Arm = tuple[Path, Callable[[list[list[int]]], Iterator[Delivered]]]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--samples", type=positive, default=2304, help="in every format (default 2304: 1 GB)")
    parser.add_argument("--read", type=positive, default=512, help="of them in an arm (default 512: 222 MB)")
    parser.add_argument("--rounds", type=positive, default=3, help="(default 3)")
    parser.add_argument("--threads", type=positive, default=2, help="of our reader (default 2)")
    args = parser.parse_args()
    if args.read % BATCH or args.read > args.samples:
        parser.error(f"--read must be a multiple of {BATCH} and not exceed --samples")

    values = random_values(args.samples)
    with temporary_folder(args.dir) as folder:
        names = ["ours", "lmdb, raw", "flat", "mds", "hdf5"]
        folders, absent = write_formats(folder, names, values)
        arms = make_arms(folders, args.threads)
        for _, read in arms.values():
            insist_exact(read(random_batches(args.samples, args.read)), values, args.read)
        print(f"{len(arms)} arms give every bit as it was written")
        del values
        measured = {name: [] for name in arms}
        for _ in range(args.rounds):
            for name in random.sample(list(arms), len(arms)):
                measured[name].append(cold_pass(arms[name], random_batches(args.samples, args.read)))
                print(f"{name}: {measured[name][-1]['MB/s']:,.0f} MB/s", flush=True)
    rows = [row(name, measured[name]) for name in arms]
    rows.sort(key=lambda entry: -entry["MB/s median"])
    for name, reason in absent.items():
        print(f"skipped: {name} ({reason})")
    speed = {entry["arm"]: entry["MB/s median"] for entry in rows}
    targets = [
        Target("ours / LMDB txn.get, readahead=False", speed[OURS] / speed[WORST], at_least=15),
        Target("the same, both in one thread", speed[OURS_ONE] / speed[WORST], at_least=15),
        Target("ours in MB/s (10 steps of 64 samples a second)", speed[OURS], at_least=280),
    ]
    publish(args, rows, targets, skipped=absent, disk=disk_of(args.dir))


def make_arms(folders: dict[str, Path], threads: int) -> dict[str, Arm]:
    def in_caller(folder: str, dataset) -> Arm:
        return folders[folder], lambda batches: load(dataset(folders[folder]), batches, workers=0)

    arms = {
        OURS: (folders["ours"], lambda batches: stream_ours(folders["ours"], batches, threads)),
        OURS_ONE: (folders["ours"], lambda batches: stream_ours(folders["ours"], batches, 0)),
        WORST: in_caller("lmdb, raw", RawLmdb),
        "LMDB txn.get, readahead=True": in_caller("lmdb, raw", RawLmdbReadahead),
        "flat files mapped": in_caller("flat", FlatFiles),
    }
    if "mds" in folders:
        arms["mosaicml-streaming"] = in_caller("mds", FORMATS["mds"].dataset)
    if "hdf5" in folders:
        arms["HDF5"] = in_caller("hdf5", FORMATS["hdf5"].dataset)
    return arms


def random_batches(samples: int, count: int) -> list[list[int]]:
    order = torch.randperm(samples)[:count].tolist()
    return [order[i : i + BATCH] for i in range(0, count, BATCH)]


def cold_pass(arm: Arm, batches: list[list[int]]) -> dict:
    """Read some batches from disk; opening the files and reading their index is part of it."""
    folder, read = arm
    gc.collect()  # what is still mapped cannot be dropped
    drop_from_page_cache(folder)
    read_before, cpu_before, started = disk_bytes(), cpu_seconds(), time.perf_counter()
    for _ in read(batches):
        pass
    seconds = time.perf_counter() - started
    wanted = sum(map(len, batches)) * SAMPLE_BYTES
    return {
        "MB/s": wanted / 1e6 / seconds,
        "amplification": (disk_bytes() - read_before) / wanted,
        "cpu": (cpu_seconds() - cpu_before) / sum(map(len, batches)),
    }


def row(name: str, measured: list[dict]) -> dict:
    def median(key: str) -> float:
        return statistics.median(entry[key] for entry in measured)

    return {
        "arm": name,
        "MB/s median": median("MB/s"),
        "MB/s best": max(entry["MB/s"] for entry in measured),
        "read from disk / wanted": median("amplification"),
        "CPU µs/sample": median("cpu") * 1e6,
    }


def drop_from_page_cache(folder: Path) -> None:
    """Raise when more than a hundredth of the files stays in memory."""
    files = [path for path in files_of(folder) if path.stat().st_size]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a dirty page cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    resident, size = sum(map(resident_bytes, files)), sum(path.stat().st_size for path in files)
    if resident > size / 100:
        raise RuntimeError(
            f"{resident:,} of {size:,} bytes of {folder} are still in memory: is it on a tmpfs?"
        )


def resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    view = np.frombuffer(mapped, np.uint8)
    pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped)), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((np.frombuffer(pages, np.uint8) & 1).sum()) * mmap.PAGESIZE


def disk_bytes() -> int:
    """What this process and its children had to fetch from a disk so far."""
    lines = [line for pid in family() for line in Path(f"/proc/{pid}/io").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def disk_of(folder: Path) -> dict:
    """The device under a folder and how far its kernel reads ahead."""
    number = os.stat(folder).st_dev
    name = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not name.exists():
        return {"device": f"{os.major(number)}:{os.minor(number)}"}
    queue = next((at / "queue" for at in (name, name.resolve().parent) if (at / "queue").exists()), None)
    readahead = (queue / "read_ahead_kb").read_text().strip() if queue else None
    return {"device": name.resolve().name, "read_ahead_kb": readahead}


if __name__ == "__main__":
    main()
