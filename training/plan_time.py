"""Predict the time of a step from what its operators compute and move, and from what cards reach of their data sheets.

The shares are estimates for bf16, made before any GPU was measured: they are no promise.
"""

from collections import Counter
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from configs.schema import Config
from training.meter import PEAKS, peak_of
from training.run_folder import RunFolder
from training.self_test import say

# Bytes per second of a card's memory, by the names of `PEAKS`, from NVIDIA's data sheets.
BANDWIDTHS = {
    "A100": 2.0e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H100": 3.35e12,
    "H200 NVL": 4.8e12, "H200": 4.8e12, "B200": 8.0e12, "RTX 4090": 1.0e12,
}  # fmt: skip
SHOWN = ("RTX 4090", "A100", "H100", "H200")  # where no card is at hand
# What kernels reach: of the peak, and of the bandwidth for all that only moves numbers (norms, activations, sums, copies).
SHARES = {"convolutions": 0.5, "linear layers": 0.5, "attention": 0.35, "the rest": 0.8}
PADDED = 32  # kernels of attention fill head dimensions up to a multiple of this: SD-1.5's 40 to 64
FUSED = 0.5  # of what only moves numbers, torch.compile leaves about half
# Bytes of a step for each trained weight: AdamW 28, clipping and the moving average 12 each, gradients and weights between
# bf16 and their masters 12.
UPDATE_BYTES = 64
_KINDS = {
    "convolution": "convolutions",
    "scaled_dot_product": "attention",
}  # by a part of the operator's name


def count_work(forward: Callable[[int], Tensor], again: float = 0.0) -> dict[str, float]:
    """Count the work of `forward(1)` and its backward on "meta": operations by the kinds of `SHARES`, bytes of the rest.

    Attention counts with its padding; views move nothing. `again` is the share of the forward that backward repeats.
    """
    with _Work() as work:
        loss = forward(1)
        there = dict(work.done)
        loss.backward()
    return {kind: count + again * there.get(kind, 0.0) for kind, count in work.done.items()}


class _Work(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        count = flop_registry.get(operator.overloadpacket)
        if count is None:
            if "empty" not in str(operator):  # which reads and writes nothing
                self.done["the rest"] += _moved((args, kwargs), result)
            return result
        kind = next((kind for part, kind in _KINDS.items() if part in str(operator)), "linear layers")
        flops = count(*args, **kwargs, out_val=result)
        if kind == "attention":
            head = args[0].shape[-1]
            flops *= -(-head // PADDED) * PADDED / head
        self.done[kind] += flops
        return result


def _moved(given: object, result: object) -> int:
    """Return the bytes that an operator reads and writes; 0 for a view."""
    read, written = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (given, result))
    known = {x.untyped_storage()._cdata for x in read}
    if all(x.untyped_storage()._cdata in known for x in written):
        return 0
    return sum(x.numel() * x.element_size() for x in (*read, *written))


def seconds_by_kind(
    work: dict[str, float], images: int, trained: int, peak: float, bandwidth: float, *, compiled: bool
) -> dict[str, float]:
    """Return the seconds of a step by kind of operator, from the `work` of an image and the number of trained weights."""
    speeds = {kind: share * peak for kind, share in SHARES.items()}
    speeds["the rest"] = SHARES["the rest"] * bandwidth / (FUSED if compiled else 1.0)
    seconds = {kind: work.get(kind, 0.0) * images / speed for kind, speed in speeds.items()}
    return seconds | {"update": UPDATE_BYTES * trained / (SHARES["the rest"] * bandwidth)}


def card_of(device: torch.device) -> str | None:
    """Return the name of this device in `PEAKS`, or None where it has none."""
    if peak_of(device) is None:
        return None
    name = torch.cuda.get_device_name(device)
    return next(part for part in PEAKS if part in name)


def plan_time(
    config: Config,
    work: dict[str, float],
    flops: tuple[float, float],
    trained: int,
    device: torch.device,
    read: float,
) -> None:
    """Print what a step should take on some cards, or on the one at hand, and what it took if the run has begun.

    `flops` are operations of an image: of its results, and with what checkpointing computes again. `read` are bytes an image.
    """
    images = config.data.batch_size * config.optim.accumulate
    if flops[1] * images < 1e12:
        reason = "a step this small is bound by launching its kernels, not by their operations"
        say("time", f"no estimate: {reason}")
        return
    compiled = config.train.compile != "none"
    here = card_of(device)
    for card in SHOWN if here is None else (here,):
        peak = PEAKS[card]
        found = seconds_by_kind(work, images, trained, peak, BANDWIDTHS[card], compiled=compiled)
        seconds = sum(found.values())
        listed = ", ".join(f"{kind} {1e3 * part:.3g}" for kind, part in found.items())
        shares = [f"MFU {flops[0] * images / seconds / peak:.0%}"]
        if flops[1] > flops[0]:
            shares.append(f"HFU {flops[1] * images / seconds / peak:.0%}")
        hours = f"{config.train.steps * seconds / 3600:.1f} h for {config.train.steps:,} steps"
        reading = f", reading {images / seconds * read / 1e6:.0f} MB/s" if read else ""
        say(
            card,
            f"about {1e3 * seconds:.0f} ms a step ({listed}): {1 / seconds:.2f} it/s, {images / seconds:,.0f} images/s, "
            f"{hours}, {', '.join(shares)}{reading}",
        )
    say("time", "estimates from the rates in training/plan_time.py, which no GPU has confirmed")
    if compiled:
        say(
            "compile",
            "minutes more before the first step; kept for the next start (train.compile=none does without)",
        )


def plan_measured(config: Config) -> None:
    """Print the step that the run's own log has measured, if it has begun."""
    lines = RunFolder(config.run, config).metrics()[1:]  # in the first the network was compiled
    rates = [line["it_per_s"] for line in lines if line.get("it_per_s", 0.0) > 0]
    if rates:
        rate = median(rates)
        shares = [
            f", {median(found):.1%} {what}"
            for name, what in (("mfu", "MFU"), ("data_wait", "of it waiting for data"))
            if (found := [line[name] for line in lines if name in line])
        ]
        how = f"(this run, {len(rates)} lines of its log)"
        say("measured", f"{1e3 / rate:.0f} ms a step, {rate:.2f} it/s{''.join(shares)} {how}")
