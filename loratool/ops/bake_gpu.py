"""A GPU's line: threads read blocks into pinned memory, one thread has them computed, threads write what came back.

Only one thread computes: each of the many small steps of a block takes Python's lock, and several threads would mostly
wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loratool.core.tensor import DTYPES, torch_dtype
from loratool.files.stream import stretch
from loratool.ops.bake_work import Desk, Sums, Survival, Work, survivals
from loratool.ops.stored import byte_range, size_of

if TYPE_CHECKING:
    from loratool.ops.baking import Bakery, Job

SLOTS = 12
"""Pieces of pinned memory, each for one block on its way."""

_AHEAD = 6
"""Blocks that are read before it is their turn: fewer than there are slots, or the next one might never get its."""

_READERS, _WRITERS = 4, 4
"""Threads: the system lets one at a time write to a file, but others wait for the GPU meanwhile."""


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows `start:stop` of a job's tensor, and the bytes that they take before or after, whichever is more."""

    job: Job
    start: int
    stop: int
    room: int


class Line:
    """Bakes jobs on one GPU, block by block in their order."""

    def __init__(self, device: str, bakery: Bakery) -> None:
        self._device, self._bakery = device, bakery
        self._slots: SimpleQueue[Tensor | None] = SimpleQueue()

    def run(self, jobs: Sequence[Job]) -> list[Survival]:
        """Bakes everything, and says how much of each update survived."""
        blocks = [_block(job, *rows) for job in jobs for rows in job.ranges]
        size = max((block.room for block in blocks), default=0)
        pinned = torch.empty(SLOTS * size, dtype=torch.uint8, pin_memory=True)
        for at in range(SLOTS):
            self._slots.put(pinned[at * size : (at + 1) * size])
        readers = ThreadPoolExecutor(_READERS, "loratool-read")
        writers = ThreadPoolExecutor(_WRITERS, "loratool-write")
        writes: list[Future[None]] = []
        try:
            with torch.cuda.device(self._device):
                sums = self._computed(jobs, self._read_ahead(blocks, readers), writers, writes)
                for write in writes:
                    write.result()
                return survivals(sums)
        finally:
            for _ in range(_READERS):
                self._slots.put(None)  # for a reader that waits
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)
            torch.cuda.synchronize(self._device)  # nothing is on its way to or from the pinned memory any more

    def _computed(
        self,
        jobs: Sequence[Job],
        blocks: Iterator[tuple[_Block, Tensor]],
        writers: ThreadPoolExecutor,
        writes: list[Future[None]],
    ) -> list[Sums]:
        """Has everything computed; what is written is in `writes`."""
        desk = Desk(self._device, shared=True)
        found: list[Sums] = []
        for job in jobs:
            work = Work(job.site, job.ranges, desk, self._bakery.how)
            self._bakery.begin(job, work)
            for _ in job.ranges:
                block, slot = next(blocks)
                written = work.block(desk.moved(_stored(block, slot)), block.start)
                flat = written.contiguous().view(-1).view(torch.uint8)
                data = slot[: flat.numel()]
                data.copy_(flat, non_blocking=True)
                ready: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
                work.survey(written)
                writes.append(writers.submit(self._write, block, slot, data, ready))
            found.append(work.sums)
        return found

    def _read_ahead(self, blocks: Sequence[_Block], readers: ThreadPoolExecutor) -> Iterator[tuple[_Block, Tensor]]:
        """Blocks in their order, each with the slot that it was read into."""
        ahead: deque[tuple[_Block, Future[Tensor]]] = deque()
        for block in blocks:
            ahead.append((block, readers.submit(self._read, block)))
            if len(ahead) == _AHEAD:
                first, slot = ahead.popleft()
                yield first, slot.result()
        while ahead:
            first, slot = ahead.popleft()
            yield first, slot.result()

    def _read(self, block: _Block) -> Tensor:
        slot = self._slots.get()
        if slot is None:
            raise InterruptedError
        tensor = block.job.site.tensor
        first, last = byte_range(tensor, block.start, block.stop)
        source = stretch(tensor)
        source.file.readinto(slot[: last - first].numpy().data, source.start + first)
        return slot

    def _write(self, block: _Block, slot: Tensor, data: Tensor, ready: Any) -> None:
        try:
            ready.synchronize()
            self._bakery.write(block.job, block.start, data.numpy().data)
        finally:
            self._slots.put(slot)


def _block(job: Job, start: int, stop: int) -> _Block:
    first, last = byte_range(job.site.tensor, start, stop)
    written = (stop - start) * size_of(job.site.tensor)[1] * DTYPES[job.site.dtype] // 8
    return _Block(job, start, stop, max(last - first, written))


def _stored(block: _Block, slot: Tensor) -> Tensor:
    """What was read, `(rows, columns)`."""
    tensor = block.job.site.tensor
    first, last = byte_range(tensor, block.start, block.stop)
    return slot[: last - first].view(torch_dtype(tensor.dtype)).reshape(block.stop - block.start, -1)
