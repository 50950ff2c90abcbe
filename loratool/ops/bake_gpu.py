"""A GPU's line: threads read blocks into pinned memory, and the factors of the next tensors into the GPU's; one thread
has the blocks computed; threads write what came back.

Only one thread computes: each of the many small steps of a block takes Python's lock, and several threads would mostly
wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from loratool.core.tensor import DTYPES, torch_dtype
from loratool.files.stream import stretch
from loratool.ops.bake_work import Desk, Sums, Survival, Work, adders_of, survivals
from loratool.ops.sites import Fixed
from loratool.ops.stored import byte_range, size_of

if TYPE_CHECKING:
    from loratool.ops.baking import Bakery, Job
    from loratool.ops.updates import Adder

Task = TypeVar("Task")
Done = TypeVar("Done")

SLOTS = 16
"""Pieces of pinned memory, each for one block on its way."""

_AHEAD = 6
"""Blocks that are read before it is their turn: fewer than there are slots, or the next one might never get its."""

_PREPARED = 6
"""Tensors whose factors are in the GPU's memory before it is their turn: where the computing thread copied them itself,
it would wait for all that is computed so far."""

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
        self._slots: SimpleQueue[_Slot | None] = SimpleQueue()
        self._desk = Desk(device, shared=True)
        self._side: Any = None

    def run(self, jobs: Sequence[Job]) -> list[Survival]:
        """Bakes everything, and says how much of each update survived."""
        blocks = [_block(job, *rows) for job in jobs for rows in job.ranges]
        size = max((block.room for block in blocks), default=0)
        pinned = torch.empty(SLOTS * size, dtype=torch.uint8, pin_memory=True)
        for at in range(SLOTS):
            self._slots.put(_Slot(pinned[at * size : (at + 1) * size]))
        preparing = ThreadPoolExecutor(1, "loratool-factors")
        readers = ThreadPoolExecutor(_READERS, "loratool-read")
        writers = ThreadPoolExecutor(_WRITERS, "loratool-write")
        writes: list[Future[None]] = []
        try:
            with torch.cuda.device(self._device):
                prepared = _in_order(jobs, preparing, self._prepare, _PREPARED)
                read = _in_order(blocks, readers, self._read, _AHEAD)
                sums = self._computed(prepared, read, writers, writes)
                for write in writes:
                    write.result()
                return survivals(sums)
        finally:
            for _ in range(_READERS):
                self._slots.put(None)  # for a reader that waits
            preparing.shutdown(cancel_futures=True)
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)
            torch.cuda.synchronize(self._device)  # nothing is on its way to or from the pinned memory any more

    def _computed(
        self,
        jobs: Iterator[tuple[Job, list[Adder] | None]],
        blocks: Iterator[tuple[_Block, _Slot]],
        writers: ThreadPoolExecutor,
        writes: list[Future[None]],
    ) -> list[Sums]:
        """Has everything computed; what is written is in `writes`."""
        found: list[Sums] = []
        used: deque[tuple[Any, list[Adder] | None]] = deque()
        for job, adders in jobs:
            work = Work(job.site, job.ranges, self._desk, self._bakery.how, adders)
            self._bakery.begin(job, work)
            for _ in job.ranges:
                block, slot = next(blocks)
                written = work.block(self._desk.moved(slot.stored(block)), block.start)
                flat = written.contiguous().view(-1).view(torch.uint8)
                slot.bytes(flat.numel()).copy_(flat, non_blocking=True)
                slot.ready.record()
                work.survey(written)
                writes.append(writers.submit(self._write, block, slot, flat.numel()))
            found.append(work.sums)
            # The factors' memory is another stream's, which may use it again as soon as nobody holds it.
            done = _event()
            done.record()
            used.append((done, adders))
            while used and (len(used) > _PREPARED or used[0][0].query()):
                used[0][0].synchronize()
                used.popleft()
        torch.cuda.current_stream(self._device).synchronize()
        return found

    def _prepare(self, job: Job) -> list[Adder] | None:
        """What is added to a job's tensor, its factors on the GPU; None where something is computed for it."""
        if not all(isinstance(part, Fixed) or not part.module.needs_base for part in job.site.parts):
            return None
        with torch.cuda.device(self._device):
            if self._side is None:
                self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._side):
                adders = adders_of(job.site, self._desk, self._bakery.how)
                self._side.synchronize()
        return adders

    def _read(self, block: _Block) -> _Slot:
        slot = self._slots.get()
        if slot is None:
            raise InterruptedError
        tensor = block.job.site.tensor
        first, last = byte_range(tensor, block.start, block.stop)
        source = stretch(tensor)
        source.file.readinto(slot.memory[: last - first], source.start + first)
        return slot

    def _write(self, block: _Block, slot: _Slot, nbytes: int) -> None:
        try:
            slot.ready.synchronize()
            self._bakery.write(block.job, block.start, slot.memory[:nbytes])
        finally:
            self._slots.put(slot)


class _Slot:
    """Pinned memory for a block, and the event of its coming back. Views of it are kept: making one takes as long as
    starting a step of the computation."""

    def __init__(self, pinned: Tensor) -> None:
        self._pinned = pinned
        self.memory: memoryview = pinned.numpy().data
        self.ready = _event()
        self._stored: dict[tuple[str, int, int], Tensor] = {}
        self._bytes: dict[int, Tensor] = {}

    def stored(self, block: _Block) -> Tensor:
        """What was read, `(rows, columns)`."""
        tensor, rows = block.job.site.tensor, block.stop - block.start
        columns = size_of(tensor)[1]
        asked = tensor.dtype, rows, columns
        if asked not in self._stored:
            first, last = byte_range(tensor, block.start, block.stop)
            self._stored[asked] = self._pinned[: last - first].view(torch_dtype(tensor.dtype)).reshape(rows, columns)
        return self._stored[asked]

    def bytes(self, nbytes: int) -> Tensor:
        """Room for so many bytes."""
        if nbytes not in self._bytes:
            self._bytes[nbytes] = self._pinned[:nbytes]
        return self._bytes[nbytes]


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _in_order(
    tasks: Sequence[Task], pool: ThreadPoolExecutor, work: Callable[[Task], Done], ahead: int
) -> Iterator[tuple[Task, Done]]:
    """Each task with what `work` makes of it, in their order; so many are under way before it is their turn."""
    begun: deque[tuple[Task, Future[Done]]] = deque()
    for task in tasks:
        begun.append((task, pool.submit(work, task)))
        if len(begun) == ahead:
            first, future = begun.popleft()
            yield first, future.result()
    while begun:
        first, future = begun.popleft()
        yield first, future.result()


def _block(job: Job, start: int, stop: int) -> _Block:
    first, last = byte_range(job.site.tensor, start, stop)
    written = (stop - start) * size_of(job.site.tensor)[1] * DTYPES[job.site.dtype] // 8
    return _Block(job, start, stop, max(last - first, written))
