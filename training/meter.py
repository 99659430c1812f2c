"""Measure a training: the means of its metrics, kept on the device until they are logged, and how fast it runs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Reduce = Callable[[list[Tensor]], None]
Measured = tuple[str, Tensor, Tensor | float]  # name, sum, weight
# The rates that a line of metrics may have.
RATES = ("it_per_s", "images_per_s", "tflop_per_s", "data_wait", "mfu", "hfu", "memory_gb")
# Dense bf16 operations per second with fp32 sums, by a part of the device's name; the first that fits. From NVIDIA's data
# sheets, which give some of them twice as high, with sparsity.
PEAKS = {
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "H200 NVL": 835e12, "H200": 989e12, "B200": 2250e12, "RTX 4090": 165e12,
}  # fmt: skip


class Means:
    """Weighted means by name since the last `read`, each over the steps that measured that name.

    Nothing waits for the device until `read`. A vector has one mean for each of its entries, which `read` names `name/1`,
    `name/2`, …; an entry whose weights add up to 0 is left out.
    """

    def __init__(self) -> None:
        # From the (name, length) pairs of one `add` to a tensor (2, n): the weighted sums, and the sums of the weights. They
        # are fp64, in which sums of fp32 values are almost exact, so that neither an interruption nor another number of ranks
        # changes the means.
        self._totals: dict[tuple[tuple[str, int], ...], Tensor] = {}

    def add(self, measured: Sequence[Measured], skip: Tensor | None = None) -> None:
        """Add sums and their weights, each scalars or vectors of one length; add 0 where `skip`, a scalar bool, is true."""
        names = tuple((name, total.numel()) for name, total, _ in measured)
        totals = [total.detach().reshape(-1) for _, total, _ in measured]
        weights = [
            weight.detach().reshape(-1) if isinstance(weight, Tensor) else torch.full_like(total, weight)
            for total, (_, _, weight) in zip(totals, measured, strict=True)
        ]
        pair = torch.cat([*totals, *weights]).double().view(2, -1)  # (2, n)
        if skip is not None:
            pair = torch.where(skip, 0.0, pair)
        self._totals[names] = self._totals[names] + pair if names in self._totals else pair

    def state_dict(self, reduce: Reduce | None = None) -> list:
        """Return all sums as JSON can hold them.

        `reduce` adds a list of tensors over all processes, in place; without it the sums are those of this process.
        """
        if not self._totals:
            return []
        values = torch.cat(list(self._totals.values()), dim=1)  # (2, Σn)
        if reduce is not None:
            reduce([values])
        parts = values.cpu().split([pair.shape[1] for pair in self._totals.values()], dim=1)
        return [
            [list(map(list, names)), part.tolist()] for names, part in zip(self._totals, parts, strict=True)
        ]

    def load_state_dict(self, state: list, device: torch.device, *, zero: bool = False) -> None:
        """Continue from saved sums. All processes but one pass `zero`: they get the same names with sums of 0."""
        self._totals = {}
        for names, values in state:
            pair = torch.tensor(values, dtype=torch.float64, device=device)
            self._totals[tuple(map(tuple, names))] = pair.zero_() if zero else pair

    def read(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return the means and reset the sums."""
        sums: dict[str, list[float]] = {}
        for names, (totals, weights) in self.state_dict(reduce):
            entries = [
                name if size == 1 else f"{name}/{i}" for name, size in names for i in range(1, size + 1)
            ]
            for entry, total, weight in zip(entries, totals, weights, strict=True):
                before = sums.get(entry, [0.0, 0.0])
                sums[entry] = [before[0] + total, before[1] + weight]
        self._totals.clear()
        return {entry: total / weight for entry, (total, weight) in sums.items() if weight > 0}


def peak_of(device: torch.device) -> float | None:
    """Return the device's peak of bf16 operations per second, or None where `PEAKS` does not list the device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Meter:
    """Measures rates between one reading and the next.

    Args:
        flops: operations of one step on this process, those of its results alone.
        done: the same with what gradient checkpointing computes again; None where that is nothing.
        images: images of one step on all processes.
        device: the device that the training runs on.
        stream: an object whose `waited` is the number of seconds spent waiting for data so far.
    """

    def __init__(self, flops: float, images: int, device: torch.device, stream, *, done: float | None = None):
        self.flops, self.images, self.device, self.stream = flops, images, device, stream
        self.done = flops if done is None else done
        self.peak = peak_of(device)
        self._steps, self._since, self._waited = 0, time.perf_counter(), stream.waited

    def step(self) -> None:
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

        These are it/s, images/s, TFLOP/s (all that were computed) and the share of the time spent waiting for data; where the
        device's peak is known, the share of it that the results alone took (MFU) and, where activations are computed again,
        that with these (HFU); and on a GPU the peak memory of the training so far in GB.
        """
        now, waited = time.perf_counter(), self.stream.waited
        seconds = max(now - self._since, 1e-9)
        rate = self._steps / seconds
        line = {
            "it_per_s": rate,
            "images_per_s": rate * self.images,
            "tflop_per_s": rate * self.done / 1e12,
            "data_wait": (waited - self._waited) / seconds,
        }
        if self.peak is not None:
            line["mfu"] = rate * self.flops / self.peak
            if self.done > self.flops:
                line["hfu"] = rate * self.done / self.peak
        if self.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self._steps, self._since, self._waited = 0, now, waited
        return line
