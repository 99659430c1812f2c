"""Measure how fast a training runs: steps, images and operations per second, and the time spent waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

RATES = (
    "it_per_s",
    "images_per_s",
    "tflop_per_s",
    "data_wait",
    "mfu",
    "memory_gb",
)  # the rates that a line of metrics may have
# Dense bf16 operations per second, by a part of the device's name (NVIDIA's data sheets).
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}


def peak_of(device: torch.device) -> float | None:
    """Return the device's peak of bf16 operations per second, or None where `PEAKS` does not list the device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Meter:
    """Measures rates between one reading and the next.

    Args:
        flops: operations of one step on this process.
        images: images of one step on all processes.
        device: the device that the training runs on.
        stream: an object whose `waited` is the number of seconds spent waiting for data so far.
    """

    def __init__(self, flops: float, images: int, device: torch.device, stream):
        self.flops, self.images, self.device, self.stream = flops, images, device, stream
        self.peak = peak_of(device)
        self._steps, self._since, self._waited = 0, time.perf_counter(), stream.waited

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out of the rates; it is used for checkpoints and previews."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # work that was launched before counts as part of the steps
        since, waited = time.perf_counter(), self.stream.waited
        yield
        self._since += time.perf_counter() - since
        self._waited += self.stream.waited - waited

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading, and start a new one.

        These are it/s, images/s, TFLOP/s and the share of the time spent waiting for data; where the device's peak is known the
        MFU (share of that peak), and on a GPU the peak memory of the training so far in GB.
        """
        now, waited = time.perf_counter(), self.stream.waited
        seconds = max(now - self._since, 1e-9)
        rate = self._steps / seconds
        line = {
            "it_per_s": rate,
            "images_per_s": rate * self.images,
            "tflop_per_s": rate * self.flops / 1e12,
            "data_wait": (waited - self._waited) / seconds,
        }
        if self.peak is not None:
            line["mfu"] = rate * self.flops / self.peak
        if self.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self._steps, self._since, self._waited = 0, now, waited
        return line
