"""Write a file so that it is either whole or absent."""

import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then rename: an interruption leaves no half file.

    The temporary name carries the process id: two processes that write the same file do not tear each
    other's. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
