"""Large files are written faster when others work around the writing: pages made ready ahead of it, flushing behind it.

Both need no more than an open file, and whatever they cannot do is done by the writing itself, or by the last fsync.
"""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loratool.files.libc import libc as _libc

MADE_READY = 16 << 20
"""Bytes whose pages one thread makes ready at once; they count as this process's memory meanwhile."""

FLUSHED = 256 << 20
"""Bytes that are written before the disk is told to begin."""

_THREADS = 4
_FEW_CPUS = 4
_PROT, _MAP_SHARED, _POPULATE_WRITE = 3, 1, 23


class Ahead:
    """Has the pages of an empty file in memory (tmpfs) made by several threads.

    The system lets one thread at a time write to a file, and making pages is most of that work there. The pages are
    never touched through the mapping, so that a full file system is an error of the writing and no SIGBUS. Does nothing
    on other file systems and on few processors.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._stopped = False
        self._pool: ThreadPoolExecutor | None = None
        if nbytes < MADE_READY or (os.cpu_count() or 1) <= _FEW_CPUS or not _in_memory(fd):
            return
        self._pool = ThreadPoolExecutor(_THREADS, "loratool-pages")
        for at in range(0, nbytes, MADE_READY):
            self._pool.submit(self._make, fd, at, min(MADE_READY, nbytes - at))

    def close(self) -> None:
        """Ends the threads."""
        self._stopped = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _make(self, fd: int, at: int, nbytes: int) -> None:
        libc = _libc()
        if self._stopped or libc is None:
            return
        address = libc.mmap(None, nbytes, _PROT, _MAP_SHARED, fd, at)
        if address in (None, ctypes.c_void_p(-1).value):
            self._stopped = True
            return
        if libc.madvise(address, nbytes, _POPULATE_WRITE):  # an older kernel, or no room
            self._stopped = True
        libc.munmap(address, nbytes)


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
