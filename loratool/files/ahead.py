"""Large files are written faster when others work around the writing: pages made ready ahead of it, flushing behind it.

Both need no more than an open file, and whatever they cannot do is done by the writing itself, or by the last fsync.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratool.files.libc import libc as _libc

FLUSHED = 256 << 20
"""Bytes that are written before the disk is told to begin."""

_FEW_CPUS = 4
_PROT, _MAP_SHARED, _POPULATE_WRITE = 3, 1, 23


class Ahead:
    """Makes the pages of an empty file in memory (tmpfs) before something is written to them.

    The system lets one thread at a time write to a file, and making pages is most of that work there. Reserving their
    space is the least work, and does not keep others of this process from mapping memory, as an import does. After
    `hurry`, pages are made and filled by many threads through a mapping. Does nothing on other file systems. What the
    system refuses once is not asked for again.

    `fills` says whether bytes are best filled in place.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._useful = _in_memory(fd)
        self.fills = False

    def hurry(self) -> None:
        """From now on many threads make pages at the same time, if there are processors for them."""
        self.fills = self._useful and (os.cpu_count() or 1) > _FEW_CPUS and _libc() is not None

    def reserve(self, at: int, nbytes: int) -> bool:
        """Reserves space for so many bytes from byte `at` of the file on; False where there is something better to do,
        or nothing."""
        if self.fills or not self._useful:
            return False
        try:
            os.posix_fallocate(self._fd, at, nbytes)
        except OSError:
            self._useful = False
        return self._useful

    def make(self, at: int, nbytes: int) -> None:
        """Makes the pages of so many bytes from byte `at` of the file on, after `hurry`."""
        with self.opened(at, nbytes):
            pass

    @contextmanager
    def opened(self, at: int, nbytes: int) -> Iterator[memoryview | None]:
        """Bytes of the file in place, to be filled within the block; None where they have to be written.

        Their pages are there, so that a full file system is an error of the writing and no SIGBUS. They count as this
        process's memory meanwhile.
        """
        if not self.fills:
            yield None
            return
        libc = _libc()
        skipped = at % mmap.ALLOCATIONGRANULARITY
        size = skipped + nbytes
        address = libc.mmap(None, size, _PROT, _MAP_SHARED, self._fd, at - skipped)
        if address in (None, ctypes.c_void_p(-1).value):
            self.fills = self._useful = False
            yield None
            return
        try:
            if libc.madvise(address, size, _POPULATE_WRITE):  # an older kernel, or no room
                self.fills = self._useful = False
                yield None
            else:
                yield memoryview((ctypes.c_char * nbytes).from_address(address + skipped)).cast("B")
        finally:
            libc.munmap(address, size)


class Behind:
    """Flushes a file while it is written, so that little is left for the fsync at the end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._written = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="loratool-flush", daemon=True)
        self._thread.start()

    def wrote(self, nbytes: int) -> None:
        """Counts what was written."""
        with self._changed:
            self._written += nbytes
            if self._written >= FLUSHED:
                self._changed.notify()

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        flush = getattr(os, "fdatasync", os.fsync)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._written >= FLUSHED)
                if self._closed:
                    return
                self._written = 0
            try:
                flush(self._fd)
            except OSError:
                return  # the fsync at the end says what is wrong


def _in_memory(fd: int) -> bool:
    """Whether a file is on Linux' tmpfs."""
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    lines = [line.split(" - ") for line in text.splitlines()]
    return any(parts[0].split()[2] == number and parts[-1].split()[0] == "tmpfs" for parts in lines)
