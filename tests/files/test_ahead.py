"""Work around the writing of a large file: never wrong, and no harm where it cannot help."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from loratool.files import ahead
from loratool.files.ahead import MADE_READY, Ahead, Behind

MEMORY = Path("/dev/shm")


def made(folder: Path | str) -> int:
    """An empty file of three pieces and a half, which has no name any more."""
    fd, name = tempfile.mkstemp(dir=folder)
    os.unlink(name)
    os.ftruncate(fd, 3 * MADE_READY + MADE_READY // 2)
    return fd


def blocks_of(fd: int) -> int:
    """Bytes that the file takes."""
    return os.fstat(fd).st_blocks * 512


@pytest.mark.skipif(not MEMORY.is_dir(), reason="no tmpfs")
def test_pages_are_made_and_hold_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tmpfs all pages of the file are there soon, and nothing was written to them."""
    monkeypatch.setattr(ahead, "_FEW_CPUS", 0)
    fd = made(MEMORY)
    try:
        one = Ahead(fd, os.fstat(fd).st_size)
        for _ in range(200):
            if one._stopped or blocks_of(fd) >= os.fstat(fd).st_size:
                break
            time.sleep(0.05)
        one.close()
        if one._stopped and blocks_of(fd) < os.fstat(fd).st_size:
            pytest.skip("the kernel is too old, or there is no room")
        assert not any(os.pread(fd, 4096, 3 * MADE_READY + 4096))
    finally:
        os.close(fd)


def test_closing_stops_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After `close` no thread is left, whatever was done; on a disk nothing is begun."""
    monkeypatch.setattr(ahead, "_FEW_CPUS", 0)
    fd = made(MEMORY if MEMORY.is_dir() else tmp_path)
    one = Ahead(fd, os.fstat(fd).st_size)
    one.close()
    os.close(fd)
    monkeypatch.setattr(ahead, "_in_memory", lambda fd: False)
    fd = made(tmp_path)
    one = Ahead(fd, os.fstat(fd).st_size)
    one.close()
    assert one._pool is None and blocks_of(fd) == 0
    os.close(fd)


def test_a_refusal_stops_it_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the system will not do is left to the writing, which says what is wrong."""

    class Refuses:
        def mmap(self, *_: object) -> int:
            return 4096

        def madvise(self, *_: object) -> int:
            return -1

        def munmap(self, *_: object) -> int:
            return 0

    monkeypatch.setattr(ahead, "_FEW_CPUS", 0)
    monkeypatch.setattr(ahead, "_in_memory", lambda fd: True)
    monkeypatch.setattr(ahead, "_libc", Refuses)
    fd = made(tmp_path)
    one = Ahead(fd, os.fstat(fd).st_size)
    for _ in range(100):
        if one._stopped:
            break
        time.sleep(0.02)
    assert one._stopped
    one.close()
    os.close(fd)


def test_flushes_while_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flushed once enough was written, never after `close`, and an error is left to the last fsync."""
    flushed: list[int] = []

    def flush(fd: int) -> None:
        flushed.append(fd)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ahead, "FLUSHED", 100)
    monkeypatch.setattr(os, "fdatasync", flush, raising=False)
    fd = made(tmp_path)
    behind = Behind(fd)
    behind.wrote(60)
    time.sleep(0.05)
    assert not flushed
    behind.wrote(60)
    for _ in range(100):
        if flushed:
            break
        time.sleep(0.02)
    behind.wrote(600)
    behind.close()
    assert flushed == [fd]
    os.close(fd)
