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
from typing import Any

from loratool.files.checkpoint import WeightFile
from loratool.files.stream import PIECE, Copy, Output, stretch
from loratool.ops.bake_task import FileTask

COPIERS = min(8, max(1, (os.cpu_count() or 1) // 2))
"""Threads: on few processors more would take the place of what is imported and computed meanwhile."""

_PART = 32 << 20
_READY, _RESERVED = 8 << 20, 256 << 20
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
        if "torch" in sys.modules:
            self.hurry()
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
        """torch is imported: what is left may take all processors."""
        for output in self._outputs.values():
            output.hurry()

    def wait(self) -> None:
        """Waits for everything. Raises FormatError where the output does not hold the same bytes."""
        for future in self._futures:
            future.result()

    def _begin(self, one: FileTask) -> None:
        """From the file's front to its end, as it is baked: copies what stays, and has the rest made ready."""
        output, at = self._outputs[one.file], 0
        if not output.fills:
            self._submit(self._reserve, output, output.head + one.plan.nbytes)
        for what in (*one.copies, Copy(0, one.plan.nbytes, 0)):
            if output.fills:
                self._make_ready(output, at, what.target)
            for part in what.parts(_PART):
                self._submit(self._copy, one.file, part)
            at = what.target + what.nbytes

    def _reserve(self, output: Output, nbytes: int) -> None:
        """Reserves the file's space in long steps: each asks for Python's lock, which an import keeps for long. What is
        left when all may hurry is made ready by all."""
        at = 0
        while at < nbytes and output.reserve(at, min(_RESERVED, nbytes - at)):
            at += _RESERVED
        if output.fills and at < nbytes:
            self._make_ready(output, max(at - output.head, 0), nbytes - output.head)

    def _make_ready(self, output: Output, start: int, stop: int) -> None:
        for at in range(start, stop, _READY):
            self._submit(output.make_ready, at, min(_READY, stop - at))

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        self._futures.append(self._pool.submit(work, *arguments))

    def _copy(self, file: WeightFile, what: Copy) -> None:
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = bytearray(PIECE), bytearray(PIECE)
        source = stretch(next(iter(file.header.tensors.values())))
        self._outputs[file].copy(source, what, self._buffers.pair, self._verify)
        self._tick(what.nbytes)
