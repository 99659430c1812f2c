"""What the operating system says of this machine, and of the time, memory and disk that this process and its children took."""

import ctypes
import importlib.metadata
import mmap
import multiprocessing
import os
import platform
import re
from pathlib import Path

import numpy as np
import psutil
import torch

PACKAGES = ["torch", "numpy", "lmdb", "diffusers", "transformers", "mosaicml-streaming", "webdataset", "h5py"]


def machine() -> dict:
    """What the numbers depend on and the code does not decide."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    packages = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in PACKAGES}
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package.version for name, package in packages.items() if package},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def family() -> list[psutil.Process]:
    """This process and its living children, such as a DataLoader's workers."""
    children = multiprocessing.active_children()
    return [psutil.Process(), *(psutil.Process(child.pid) for child in children)]


def cpu_seconds() -> float:
    """CPU time of the family so far, all threads, to a hundredth of a second."""
    return sum(sum(process.cpu_times()[:2]) for process in family())  # user, system


def memory_mb() -> dict[str, float]:
    """Resident memory of the family, and the same with shared pages divided among those who share them."""
    found = [process.memory_full_info() for process in family()]
    rss, pss = sum(used.rss for used in found), sum(used.pss for used in found)
    return {"Rss": rss / 1e6, "Pss": pss / 1e6, "processes": len(found)}


def disk_bytes() -> int:
    """What this process and its children had to fetch from a disk so far."""
    return sum(process.io_counters().read_bytes for process in family())


def disk_of(folder: Path) -> dict:
    """The device under a folder and how far its kernel reads ahead."""
    number = os.stat(folder).st_dev
    name = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not name.exists():
        return {"device": f"{os.major(number)}:{os.minor(number)}"}
    queue = next((at / "queue" for at in (name, name.resolve().parent) if (at / "queue").exists()), None)
    readahead = (queue / "read_ahead_kb").read_text().strip() if queue else None
    return {"device": name.resolve().name, "read_ahead_kb": readahead}


def drop_from_page_cache(folder: Path) -> None:
    """Raise when more than a hundredth of the files stays in memory."""
    files = [path for path in files_of(folder) if path.stat().st_size]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a dirty page cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    resident, size = sum(map(resident_bytes, files)), sum(path.stat().st_size for path in files)
    if resident > size / 100:
        raise RuntimeError(f"{resident:,} of {size:,} bytes of {folder} are still in memory: a tmpfs?")


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


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
