"""Read batches ahead of their use, in threads, into buffers that are reused.

Reader threads fill the buffers straight from the shards. There are no worker processes, no pickling and no fresh memory: these
would cost more than the reading itself (`benchmarks/`). On a machine with a GPU the buffers are pinned, and a buffer is filled
again only after the copy from it has ended.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

Read = Callable[[Sequence[int], dict[str, Tensor]], None]


@dataclass
class Batch:
    """One batch: the dataset's `indices (B,)`, and the stored bytes of each field, uint8 `(B, value_bytes)`, in `raw`.

    The bytes are valid until the next batch is requested. `on` moves the bytes of a field to a device and decodes them there;
    `rows` moves the indices. Neither waits for the GPU.
    """

    indices: list[int]
    index: Tensor
    raw: dict[str, Tensor]
    decode: dict[str, Callable[[Tensor], Tensor]]

    def on(self, device: torch.device, name: str) -> Tensor:
        """Return the values `(B, *shape)` of a field on `device`; on the CPU they may be a view of the reused buffer."""
        return self.decode[name](self.raw[name].to(device, non_blocking=True))

    def rows(self, device: torch.device) -> Tensor:
        """Return the indices `(B,)` on `device`; on the CPU this is the reused buffer itself."""
        return self.index.to(device, non_blocking=True)


@dataclass
class _Slot:
    index: Tensor
    raw: dict[str, Tensor]
    copied: list = field(default_factory=list)  # CUDA events after which the buffers may be filled again


class BatchStream:
    """Iterates once over lists of indices and yields a `Batch` for each, in the same order.

    Args:
        batches: lists of dataset indices, all of one length.
        read: fills the buffers of all fields for the given indices; called in the reader threads.
        value_bytes: {field: bytes of one value}.
        decode: {field: function from stored bytes to values}.
        threads: how many batches are read at the same time; with 0 each batch is read when it is requested.
        ahead: how many batches are ready or being read besides the one in use.
        pin: whether the buffers are page-locked, for asynchronous copies to a GPU.

    `waited` counts the seconds that the loop over the stream has waited for batches so far.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[int]],
        read: Read,
        value_bytes: dict[str, int],
        decode: dict[str, Callable[[Tensor], Tensor]],
        *,
        threads: int = 2,
        ahead: int = 3,
        pin: bool = False,
    ):
        self.batches, self.read, self.value_bytes, self.decode = batches, read, value_bytes, decode
        self.threads, self.ahead, self.pin = threads, max(ahead, threads), pin
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        if self.threads == 0:
            for indices in self.batches:
                started = time.perf_counter()
                slot = self._fill(self._slot(len(indices)), indices)
                self.waited += time.perf_counter() - started
                yield self._batch(indices, slot)
            return
        waiting = deque()
        free: list[_Slot] = []
        with ThreadPoolExecutor(self.threads, thread_name_prefix="reader") as readers:
            try:
                for indices in self.batches:
                    slot = free.pop() if free else self._slot(len(indices))
                    waiting.append((indices, readers.submit(self._fill, slot, indices)))
                    if len(waiting) > self.ahead:
                        yield from self._deliver(waiting, free)
                while waiting:
                    yield from self._deliver(waiting, free)
            finally:
                readers.shutdown(cancel_futures=True)

    def _deliver(self, waiting: deque, free: list[_Slot]) -> Iterator[Batch]:
        indices, future = waiting.popleft()
        started = time.perf_counter()
        slot = future.result()
        self.waited += time.perf_counter() - started
        yield self._batch(indices, slot)
        if self.pin:
            slot.copied = [torch.cuda.Event()]
            slot.copied[0].record()
        free.append(slot)

    def _batch(self, indices: Sequence[int], slot: _Slot) -> Batch:
        return Batch(list(indices), slot.index, slot.raw, self.decode)

    def _slot(self, count: int) -> _Slot:
        return _Slot(
            torch.empty(count, dtype=torch.int64, pin_memory=self.pin),
            {
                name: torch.empty(count, size, dtype=torch.uint8, pin_memory=self.pin)
                for name, size in self.value_bytes.items()
            },
        )

    def _fill(self, slot: _Slot, indices: Sequence[int]) -> _Slot:
        for event in slot.copied:
            event.synchronize()
        slot.index.copy_(torch.tensor(indices))
        self.read(indices, slot.raw)
        return slot
