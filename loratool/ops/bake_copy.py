"""Copying what a bake does not change, in the background, and comparing it with the base. Needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from loratool.files.checkpoint import WeightFile
from loratool.files.stream import PIECE, Copy, Output, stretch
from loratool.ops.bake_task import FileTask

COPIERS = 2
_PART = 32 << 20

Tick = Callable[[int], None]
"""Called with so many more bytes done."""


class Copier:
    """Copies the untouched bytes of files in threads of its own, and then compares them if `verify` says so.

    Begins at once; leaving the block ends the threads, also if not all is done.
    """

    def __init__(
        self, files: Sequence[FileTask], outputs: Mapping[WeightFile, Output], verify: bool, tick: Tick, compared: Tick
    ) -> None:
        self._outputs, self._tick, self._compared = outputs, tick, compared
        self._buffers = threading.local()
        self._pool = ThreadPoolExecutor(COPIERS, "loratool-copy")
        parts = [(one.file, part) for one in files for what in one.copies for part in what.parts(_PART)]
        copied: list[Future[None]] = [self._pool.submit(self._copy, *part) for part in parts]
        # Behind all copies: a comparison only ever waits for a copy that has begun.
        checks = zip(copied, parts, strict=True) if verify else ()
        self._futures = [*copied, *(self._pool.submit(self._compare, done, *part) for done, part in checks)]
        self.compared = sum(part.nbytes for _, part in parts) if verify else 0

    def __enter__(self) -> Copier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Waits for everything. Raises FormatError where the output does not hold the same bytes."""
        for future in self._futures:
            future.result()

    def _pair(self) -> tuple[bytearray, bytearray]:
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = bytearray(PIECE), bytearray(PIECE)
        pair: tuple[bytearray, bytearray] = self._buffers.pair
        return pair

    def _copy(self, file: WeightFile, what: Copy) -> None:
        source = stretch(next(iter(file.header.tensors.values())))
        self._outputs[file].copy(source, what, self._pair()[0])
        self._tick(what.nbytes)

    def _compare(self, copied: Future[None], file: WeightFile, what: Copy) -> None:
        copied.result()
        source = stretch(next(iter(file.header.tensors.values())))
        self._outputs[file].check(source, what, self._pair())
        self._compared(what.nbytes)
