"""Work around the writing of a large file: never wrong, and no harm where it cannot help."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loratool.files import ahead, libc
from loratool.files.ahead import Ahead, Behind

MEMORY = Path("/dev/shm")
SIZE = (3 << 20) + 12345

in_memory = pytest.mark.skipif(not MEMORY.is_dir(), reason="no tmpfs")


@contextmanager
def made(folder: Path | str) -> Iterator[int]:
    """An empty file of some pages and a piece of one, which has no name any more."""
    fd, name = tempfile.mkstemp(dir=folder)
    try:
        os.unlink(name)
        os.ftruncate(fd, SIZE)
        yield fd
    finally:
        os.close(fd)


def blocks_of(fd: int) -> int:
    """Bytes that the file takes."""
    return os.fstat(fd).st_blocks * 512


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were processors enough."""
    monkeypatch.setattr(ahead, "_FEW_CPUS", 0)


def hurried(fd: int) -> Ahead:
    one = Ahead(fd)
    one.hurry()
    return one


@in_memory
def test_pages_are_made_where_they_are_asked_for(many: None) -> None:
    """On tmpfs they are there, hold zeros, and those around them are not there; asked for twice is no harm."""
    with made(MEMORY) as fd:
        one = hurried(fd)
        assert one.fills
        for _ in range(2):
            one.make(1 << 20, 1 << 20)
        if not one.fills:
            pytest.skip("the kernel is too old, or there is no room")
        assert blocks_of(fd) == 1 << 20
        assert not any(os.pread(fd, SIZE, 0)) and os.fstat(fd).st_size == SIZE


@in_memory
def test_space_is_reserved_until_all_may_hurry(many: None) -> None:
    """Likewise; from then on pages are made instead, and not before."""
    with made(MEMORY) as fd:
        one = Ahead(fd)
        one.make(0, 1 << 20)
        assert not one.fills and not blocks_of(fd)
        assert one.reserve(1 << 20, 1 << 20) and one.reserve(1 << 20, 1 << 20)
        assert blocks_of(fd) == 1 << 20
        assert not any(os.pread(fd, SIZE, 0)) and os.fstat(fd).st_size == SIZE
        one.hurry()
        assert not one.reserve(2 << 20, 1 << 20) and blocks_of(fd) == 1 << 20


@in_memory
@pytest.mark.parametrize("start", [0, 1, 4095, 4096, (1 << 20) + 77, SIZE - 5])
def test_what_is_filled_in_place_is_in_the_file(many: None, start: int) -> None:
    """From any byte on, up to the end, and nothing else is changed."""
    with made(MEMORY) as fd:
        os.pwrite(fd, b"x" * SIZE, 0)
        size = min(100_000, SIZE - start)
        data = os.urandom(size)
        with hurried(fd).opened(start, size) as place:
            if place is None:
                pytest.skip("the kernel is too old, or there is no room")
            assert place.nbytes == size and bytes(place) == b"x" * size
            place[:] = data
        assert os.pread(fd, SIZE, 0) == b"x" * start + data + b"x" * (SIZE - start - size)
        assert os.fstat(fd).st_size == SIZE


def test_on_a_disk_nothing_is_made(many: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_in_memory", lambda fd: False)
    with made(tmp_path) as fd:
        for one in (Ahead(fd), hurried(fd)):
            one.make(0, SIZE)
            with one.opened(0, SIZE) as place:
                assert place is None
            assert not one.reserve(0, SIZE)
            assert not one.fills and not blocks_of(fd)


@in_memory
def test_few_processors_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then space is reserved, however much there is to do."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with made(MEMORY) as fd:
        one = hurried(fd)
        with one.opened(0, SIZE) as place:
            assert place is None
        assert one.reserve(0, 1 << 20)
        assert blocks_of(fd) == 1 << 20


def test_flushes_while_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flushed once enough was written, never after `close`, and an error is left to the last fsync."""
    flushed: list[int] = []

    def flush(fd: int) -> None:
        flushed.append(fd)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ahead, "FLUSHED", 100)
    monkeypatch.setattr(os, "fdatasync", flush, raising=False)
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
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


def test_where_the_c_library_is_another_one_nothing_is_mapped(many: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other systems no call is tried."""
    monkeypatch.setattr(ahead, "_in_memory", lambda fd: True)
    monkeypatch.setattr(sys, "platform", "darwin")
    ahead._libc.cache_clear()
    try:
        assert ahead._libc() is None
        assert not hurried(-1).fills
    finally:
        ahead._libc.cache_clear()


class Library:
    """A C library that notes what is asked of it."""

    def __init__(self, address: int | None, refused: int = 0) -> None:
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


@pytest.fixture
def mapped(many: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Library], Ahead]:
    """Something that makes pages of no file at all by a library."""

    def make(library: Library) -> Ahead:
        monkeypatch.setattr(ahead, "_in_memory", lambda fd: True)
        monkeypatch.setattr(ahead, "_libc", lambda: library)
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("reserves"))
        return hurried(-1)

    return make


@pytest.mark.parametrize("address", [None, ctypes.c_void_p(-1).value], ids=["null", "failed"])
def test_what_cannot_be_mapped_is_not_touched(mapped: Callable[[Library], Ahead], address: int | None) -> None:
    """And nothing is tried again."""
    fake = Library(address)
    one = mapped(fake)
    for _ in range(2):
        one.make(0, 5000)
        assert not one.fills and fake.called == [("mmap", 5000)]


def test_every_mapping_is_given_back(mapped: Callable[[Library], Ahead]) -> None:
    """From the page on that the first byte is in: whether its pages were made or not; after a refusal none follows."""
    fake = Library(4096)
    one = mapped(fake)
    one.make(3 * mmap.ALLOCATIONGRANULARITY + 7, 5000)
    assert fake.called == [("mmap", 5007), ("madvise", 5007), ("munmap", 5007)] and one.fills
    with pytest.raises(KeyError), one.opened(0, 10):
        raise KeyError
    assert fake.called[3:] == [("mmap", 10), ("madvise", 10), ("munmap", 10)]
    fake.refused = -1
    with one.opened(0, 10) as place:
        assert place is None
    assert fake.called[6:] == [("mmap", 10), ("madvise", 10), ("munmap", 10)] and not one.fills
    one.make(0, 10)
    assert len(fake.called) == 9


def test_space_that_is_refused_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is left to the writing, which says what is wrong."""
    asked: list[int] = []

    def full(fd: int, at: int, nbytes: int) -> None:
        asked.append(at)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ahead, "_in_memory", lambda fd: True)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    one = Ahead(-1)
    assert not one.reserve(0, 10)
    assert not one.reserve(10, 10)
    assert asked == [0]


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
