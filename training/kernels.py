"""How kernels are chosen and kept: cuDNN's search for the fastest convolutions, and the cache of torch.compile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

CACHE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def searched_convolutions() -> Iterator[None]:
    """Let cuDNN try its convolutions for each new shape and take the fastest; for loops in which shapes stay the same."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def to_channels_last(network: torch.nn.Module) -> None:
    """Lay out the weights of 2-D convolutions with their channels last; those of 3-D ones, of clips, stay as they are."""
    for weight in network.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.to(memory_format=torch.channels_last)


def keep_compiled() -> None:
    """Keep what torch.compile makes in `~/.cache/torch/inductor`, unless the user names a folder in `TORCHINDUCTOR_CACHE_DIR`.

    PyTorch's own place is below /tmp, which a restart empties. Where no folder can be made there, PyTorch's place stays.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "torch" / "inductor"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault(CACHE, str(folder))
