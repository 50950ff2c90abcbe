"""Copying what a bake does not change, in the background, compared with the base, and making ready what it writes.

Needs no torch.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from loratool.files.checkpoint import WeightFile
from loratool.files.stream import PIECE, Copy, Output, stretch
from loratool.ops.bake_task import FileTask

COPIERS = min(8, max(1, (os.cpu_count() or 1) // 2))
"""Threads: on few processors more would take the place of what is imported and computed meanwhile."""

_PART = 32 << 20
_READY = 8 << 20
_TURN = 1e-4

Tick = Callable[[int], None]
"""Called with so many more bytes done."""


class Copier:
    """Copies the untouched bytes of files in threads of its own, and compares them if `verify` says so.

    Begins at once; leaving the block ends the threads, also if not all is done. `compared` counts bytes.
    """

    def __init__(
        self, files: Sequence[FileTask], outputs: Mapping[WeightFile, Output], verify: bool, tick: Tick
    ) -> None:
        self._outputs, self._verify, self._tick = outputs, verify, tick
        self._buffers = threading.local()
        self._pool = ThreadPoolExecutor(COPIERS, "loratool-copy")
        # Threads that read and write all the time get their turn soon, also beside one that computes in Python.
        self._before = sys.getswitchinterval()
        sys.setswitchinterval(_TURN)
        self._futures: list[Future[None]] = []
        for one in files:
            self._begin(one)
        self.compared = sum(what.nbytes for one in files for what in one.copies) if verify else 0

    def __enter__(self) -> Copier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.setswitchinterval(self._before)
        self._pool.shutdown(cancel_futures=True)

    def hurry(self) -> None:
        """Nothing is imported any more: what is left may take all processors."""
        for output in self._outputs.values():
            output.hurry()

    def wait(self) -> None:
        """Waits for everything. Raises FormatError where the output does not hold the same bytes."""
        for future in self._futures:
            future.result()

    def _begin(self, one: FileTask) -> None:
        """From the file's front to its end, as it is baked: copies what stays, and has the rest made ready."""
        output, at = self._outputs[one.file], 0
        for what in (*one.copies, Copy(0, one.plan.nbytes, 0)):
            for start in range(at, what.target, _READY):
                self._futures.append(self._pool.submit(output.make_ready, start, min(_READY, what.target - start)))
            self._futures += [self._pool.submit(self._copy, one.file, part) for part in what.parts(_PART)]
            at = what.target + what.nbytes

    def _copy(self, file: WeightFile, what: Copy) -> None:
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = bytearray(PIECE), bytearray(PIECE)
        source = stretch(next(iter(file.header.tensors.values())))
        self._outputs[file].copy(source, what, self._buffers.pair, self._verify)
        self._tick(what.nbytes)
