"""Read batches ahead of their use, in threads, into buffers that are reused, and make a step's tensors of them.

Reader threads fill the buffers straight from the shards. There are no worker processes, no pickling and no fresh memory: these
would cost more than the reading itself (`benchmarks/`). On a machine with a GPU the buffers are pinned, and a buffer is filled
again only after the copy from it has ended.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import torch
from torch import Tensor

from cache.dataset import AlignedDataset
from cache.text import TextTable, convert, drop_captions

Read = Callable[[Sequence[int], dict[str, Tensor]], None]


@dataclass
class Batch:
    """One batch of stored bytes, which are valid until the next batch is requested. Its methods do not wait for the GPU."""

    indices: list[int]
    index: Tensor  # the same as a tensor (B,)
    raw: dict[str, Tensor]  # of each field, uint8 (B, value_bytes)
    decode: dict[str, Callable[[Tensor], Tensor | dict[str, Tensor]]]

    def on(self, device: torch.device, name: str) -> Tensor | dict[str, Tensor]:
        """Return the values `(B, *shape)` of a field on `device`; on the CPU they may be views of the reused buffer."""
        return self.decode[name](self.bytes_on(device, name))

    def bytes_on(self, device: torch.device, name: str) -> Tensor:
        """Return the stored bytes `(B, value_bytes)` of a field on `device`; on the CPU this is the reused buffer itself."""
        return self.raw[name].to(device, non_blocking=True)

    def indices_on(self, device: torch.device) -> Tensor:
        """Return the indices `(B,)` on `device`; on the CPU this is the reused buffer itself."""
        return self.index.to(device, non_blocking=True)


@dataclass
class _Slot:
    index: Tensor
    raw: dict[str, Tensor]
    copied: list = field(default_factory=list)  # CUDA events after which the buffers may be filled again
    held: float = 0.0  # seconds for which these kept the reader from filling them


def _use_device(index: int | None) -> None:
    if index is not None:
        torch.cuda.set_device(index)


@dataclass
class BatchStream:
    """Iterates once over lists of indices and yields a `Batch` for each, in the same order."""

    batches: Iterable[Sequence[int]]  # lists of dataset indices, all of one length
    read: Read  # fills the buffers of all fields for the given indices; called in the reader threads
    value_bytes: dict[str, int]  # of each field, the bytes of one value
    decode: dict[
        str, Callable[[Tensor], Tensor | dict[str, Tensor]]
    ]  # of each field, from stored bytes to values
    _: KW_ONLY
    threads: int = 2  # batches read at the same time; with 0 each batch is read when it is requested
    ahead: int = 3  # batches that are ready or being read besides the one in use; at least `threads`
    pin: bool = False  # whether the buffers are page-locked, for asynchronous copies to a GPU
    waited: float = field(default=0.0, init=False)  # seconds that the loop over the stream has waited so far

    def __iter__(self) -> Iterator[Batch]:
        if self.threads == 0:
            for indices in self.batches:
                started = time.perf_counter()
                slot = self._fill(self._slot(len(indices)), indices)
                self.waited += time.perf_counter() - started
                yield Batch(list(indices), slot.index, slot.raw, self.decode)
            return
        waiting = deque()
        free: list[_Slot] = []
        with ThreadPoolExecutor(self.threads, "reader", _use_device, (self._device(),)) as readers:
            try:
                for indices in self.batches:
                    slot = free.pop() if free else self._slot(len(indices))
                    waiting.append((indices, readers.submit(self._fill, slot, indices)))
                    if len(waiting) > max(self.ahead, self.threads):
                        yield from self._deliver(waiting, free)
                while waiting:
                    yield from self._deliver(waiting, free)
            finally:
                readers.shutdown(cancel_futures=True)

    def _device(self) -> int | None:
        """The GPU whose process this is; a new thread would begin with the first of the machine, and open it."""
        return torch.cuda.current_device() if self.pin else None

    def _deliver(self, waiting: deque, free: list[_Slot]) -> Iterator[Batch]:
        indices, future = waiting.popleft()
        started = time.perf_counter()
        slot = future.result()
        # Where the host runs ahead, its readers wait for the GPU to take earlier batches, and that is no lack of data.
        self.waited += max(0.0, time.perf_counter() - started - slot.held)
        yield Batch(list(indices), slot.index, slot.raw, self.decode)
        if self.pin:
            slot.copied = [torch.cuda.Event()]
            slot.copied[0].record()
        free.append(slot)

    def _slot(self, count: int) -> _Slot:
        new = partial(torch.empty, pin_memory=self.pin)
        raw = {name: new(count, size, dtype=torch.uint8) for name, size in self.value_bytes.items()}
        return _Slot(new(count, dtype=torch.int64), raw)

    def _fill(self, slot: _Slot, indices: Sequence[int]) -> _Slot:
        started = time.perf_counter()
        for event in slot.copied:
            event.synchronize()
        slot.held = time.perf_counter() - started
        slot.index.copy_(torch.tensor(indices))
        self.read(indices, slot.raw)
        return slot


@dataclass(frozen=True)
class TrainingBatch:
    """The tensors of one training batch; tokens and grid are None where they were not requested."""

    x_0: Tensor  # scaled latents (B, C, h, w) in fp32
    text: dict[str, Tensor]  # of each text field (B, …), and what the network is told of the images
    tokens: Tensor | None  # of the teacher, (B, N, D)
    grid: tuple[int, ...] | None  # (h, w) of the tokens, (f, h, w) of clips


@dataclass
class TrainingBatches:
    """Makes a `TrainingBatch` of each `Batch`.

    Where the dataset's batches bring no text, the text of all prompts stays on the device. The null prompt always does.
    """

    dataset: AlignedDataset
    device: torch.device
    dtype: torch.dtype  # of the text fields
    _: KW_ONLY
    caption_dropout: float  # the share of captions replaced by the null prompt, for classifier-free guidance
    teacher: Callable[[Tensor], Tensor] | None = None  # from x_0 to tokens (B, N, D); None: the cached tokens
    grid: tuple[int, int] | None = None  # (h, w) of the tokens of `teacher`; cached tokens bring their own
    image_conditions: Sequence[str] = ()  # the names under which the network is told size and crop of images

    def __post_init__(self):
        text = self.dataset.text
        self.null = convert(text.null, self.device, self.dtype)  # {field: (…)}
        in_batches = "text" in self.dataset.readers
        self.table: TextTable | None = None if in_batches else text.on(self.device, self.dtype)
        self.labels = self.dataset.labels.to(self.device)  # (n,)
        self.grid = self.dataset.token_grid if self.teacher is None else self.grid
        if self.grid is not None and len(self.dataset.latent_shape) == 4:
            self.grid = (self.dataset.frames, *self.grid)

    def prompts(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the fields `(n, …)` of the prompts with these labels, on the device."""
        if self.table is None:
            return convert(self.dataset.text.fields_of(labels), self.device, self.dtype)
        return self.table.fields_of(labels.to(self.device))

    def conditions(self, raw: Tensor) -> dict[str, Tensor]:
        """Return what the network is told of the images of these bytes of latents: fp32 `(B, 6)`, or nothing."""
        told = self.dataset.size_and_crop(raw)
        return {} if told is None else dict.fromkeys(self.image_conditions, told)

    def __call__(self, batch: Batch, generator: torch.Generator, *, with_tokens: bool) -> TrainingBatch:
        """Decode the batch on the device. `generator` draws the latents (of cached moments) and then the captions to drop."""
        raw = batch.bytes_on(self.device, "latent")  # (B, value_bytes)
        x_0 = self.dataset.x_0(batch.decode["latent"](raw), generator)  # (B, C, h, w)
        if self.table is None:
            text = convert(batch.on(self.device, "text"), self.device, self.dtype)
        else:
            text = self.table.fields_of(self.labels[batch.indices_on(self.device)])
        # New memory, of the buffers too. A dropped caption is the null prompt of the same image.
        text = drop_captions(text, self.null, self.caption_dropout, generator) | self.conditions(raw)
        if not with_tokens:
            return TrainingBatch(x_0, text, None, None)
        tokens = batch.on(self.device, "dino_tokens") if self.teacher is None else self.teacher(x_0)
        return TrainingBatch(x_0, text, tokens, self.grid)
