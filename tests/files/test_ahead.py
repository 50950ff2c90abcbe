"""Work around the writing of a large file: never wrong, and no harm where it cannot help."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from loratool.files import ahead, libc
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


def test_where_the_c_library_is_another_one_nothing_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On other systems the writing makes its pages itself, and no call is tried."""
    monkeypatch.setattr(ahead, "_FEW_CPUS", 0)
    monkeypatch.setattr(ahead, "_in_memory", lambda fd: True)
    monkeypatch.setattr(sys, "platform", "darwin")
    ahead._libc.cache_clear()
    try:
        assert ahead._libc() is None
        fd = made(tmp_path)
        one = Ahead(fd, os.fstat(fd).st_size)
        assert one._pool is not None
        one._pool.shutdown()
        one.close()
        assert not blocks_of(fd)
        os.close(fd)
    finally:
        ahead._libc.cache_clear()


class Library:
    """A C library that notes what is asked of it."""

    def __init__(self, address: int | None = 4096, refused: int = 0) -> None:
        self.address, self.refused = address, refused
        self.called: list[tuple[str, int]] = []

    def mmap(self, _: object, nbytes: int, *__: object) -> int | None:
        self.called.append(("mmap", nbytes))
        return self.address

    def madvise(self, _: int, nbytes: int, advice: int) -> int:
        self.called.append(("madvise", nbytes))
        return self.refused

    def munmap(self, _: int, nbytes: int) -> int:
        self.called.append(("munmap", nbytes))
        return 0


PART = MADE_READY // 2


@pytest.mark.parametrize("address", [None, ctypes.c_void_p(-1).value], ids=["null", "failed"])
def test_what_cannot_be_mapped_is_not_touched(monkeypatch: pytest.MonkeyPatch, address: int | None) -> None:
    fake = Library(address)
    monkeypatch.setattr(ahead, "_libc", lambda: fake)
    one = Ahead(-1, 0)
    one._make(-1, 0, PART)
    assert one._stopped and fake.called == [("mmap", PART)]


@pytest.mark.parametrize("refused", [0, -1])
def test_every_mapping_is_given_back(monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """Whether its pages were made or not; after a refusal none follows."""
    fake = Library(4096, refused)
    monkeypatch.setattr(ahead, "_libc", lambda: fake)
    one = Ahead(-1, 0)
    one._make(-1, 0, PART)
    assert fake.called == [("mmap", PART), ("madvise", PART), ("munmap", PART)]
    assert one._stopped == bool(refused)
    one._make(-1, 0, PART)
    assert len(fake.called) == (3 if refused else 6)


@pytest.mark.parametrize(("system", "found"), [("tmpfs", True), ("ext4", False), (None, False)])
def test_whether_a_file_is_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str | None, found: bool
) -> None:
    """As /proc says; without it, no."""
    (tmp_path / "x").touch()
    device = (tmp_path / "x").stat().st_dev
    text = f"22 1 {os.major(device)}:{os.minor(device)} / / rw shared:1 - {system} none rw\n"

    def read_text(self: Path, **_: object) -> str:
        if system is None:
            raise FileNotFoundError(2, "No such file or directory")
        return "21 1 0:9999 / /other rw - tmpfs none rw\n" + text

    monkeypatch.setattr(Path, "read_text", read_text)
    with (tmp_path / "x").open("rb") as file:
        assert ahead._in_memory(file.fileno()) is found


def test_flushes_again_and_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each time that so much was written."""
    flushed = threading.Semaphore(0)
    monkeypatch.setattr(ahead, "FLUSHED", 100)
    monkeypatch.setattr(os, "fdatasync", lambda fd: flushed.release(), raising=False)
    behind = Behind(-1)
    for _ in range(3):
        behind.wrote(100)
        assert flushed.acquire(timeout=5)
    behind.close()
    assert not behind._thread.is_alive() and not flushed.acquire(blocking=False)


def test_memory_is_compared_up_to_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C library and without."""
    left = bytearray(os.urandom(100_000))
    right = bytearray(left)
    right[-1] ^= 1
    for _ in range(2):
        assert libc.same(left, bytearray(left), 100_000)
        assert libc.same(left, right, 99_999) and not libc.same(left, right, 100_000)
        monkeypatch.setattr(libc, "libc", lambda: None)
