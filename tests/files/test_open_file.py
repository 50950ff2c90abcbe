"""Reading an open file: short reads, reads that fail, and systems without preadv or pread."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loratool.core.errors import FormatError, LoratoolError
from loratool.core.tensor import Held, LazyTensor
from loratool.files.safetensors import (
    OpenFile,
    check_quick,
    file_size,
    header_bytes,
    read_header,
    write_safetensors,
)
from tests.hostile.bytes import file, lora, packed, tensor

RAW = bytes(range(200))


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "x").write_bytes(RAW)
    return str(tmp_path / "x")


def fails(number: int) -> Callable[..., bytes]:
    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    return fail


# How each system reads: what stands for sys.platform, and the call that is made.
SYSTEMS = [("linux", "preadv"), ("darwin", "pread"), ("win32", "read")]


@pytest.mark.parametrize(("platform", "call"), SYSTEMS)
def test_reads_the_same_bytes_on_every_system(
    path: str, monkeypatch: pytest.MonkeyPatch, platform: str, call: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for other in {"preadv", "pread", "read"} - {call, *(["pread"] if platform == "linux" else [])}:
        monkeypatch.setattr(os, other, fails(errno.ENOSYS))
    file = OpenFile(path)
    assert file.pread(20, 30) == RAW[30:50]
    view = memoryview(bytearray(50))
    file.readinto(view, 100)
    assert view == RAW[100:150]
    assert file.pread(200, 0) == RAW


@pytest.mark.parametrize(("platform", "call"), SYSTEMS)
def test_what_the_system_reads_in_parts_comes_whole(
    path: str, monkeypatch: pytest.MonkeyPatch, platform: str, call: str
) -> None:
    """A system may give fewer bytes than it was asked for."""
    monkeypatch.setattr(sys, "platform", platform)
    preadv, pread, read = os.preadv, os.pread, os.read
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 7), at))
    monkeypatch.setattr(os, "read", lambda fd, size: read(fd, min(size, 7)))
    assert OpenFile(path).pread(100, 5) == RAW[5:105]


@pytest.mark.parametrize(("platform", "call"), SYSTEMS)
def test_a_read_that_fails_names_the_file(path: str, monkeypatch: pytest.MonkeyPatch, platform: str, call: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, call, fails(errno.EIO))
    file = OpenFile(path)
    with pytest.raises(FormatError, match="cannot be read: Input/output error") as caught:
        file.readinto(memoryview(bytearray(10)), 0)
    assert caught.value.file == path
    if platform != "linux":
        with pytest.raises(FormatError, match="cannot be read: Input/output error"):
            file.pread(10, 0)


@pytest.mark.parametrize(("platform", "call"), SYSTEMS)
def test_a_file_that_shrinks_is_an_error_on_every_system(
    path: str, monkeypatch: pytest.MonkeyPatch, platform: str, call: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    file = OpenFile(path)
    os.truncate(path, 50)
    for read in (lambda: file.pread(20, 40), lambda: file.readinto(memoryview(bytearray(20)), 40)):
        with pytest.raises(FormatError, match="became shorter while it was read: no data at byte 50, expected 200"):
            read()


def test_a_file_that_may_not_be_opened(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", fails(errno.EACCES))
    with pytest.raises(FormatError, match="cannot be opened: Permission denied") as caught:
        OpenFile(path)
    assert caught.value.file == path


def test_a_pipe_that_takes_the_files_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the opening: it is looked at again, and nothing waits."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(RAW)
    opened: list[int] = []
    plain = os.open

    def other(path: str, flags: int) -> int:
        opened.append(plain(tmp_path / "pipe", flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", other)
    with pytest.raises(FormatError, match="is a pipe"):
        OpenFile(str(tmp_path / "file"))
    monkeypatch.undo()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])  # and it is closed


# -- what is too large to be shown


def test_what_is_quick_passes(tmp_path: Path) -> None:
    """And so does what is no safetensors file, or cut: reading it says so."""
    for raw in (file(lora()), file({}), b"GGUF" + bytes(40), b"", packed(b'{"a":', length=5000), b"x"):
        (tmp_path / "x").write_bytes(raw)
        check_quick(tmp_path / "x", 4096, 20)


def test_a_header_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(file({"a": tensor("F16", (2,))}, {"k": "v" * 6000}))
    read: list[int] = []
    pread = OpenFile.pread
    monkeypatch.setattr(OpenFile, "pread", lambda self, size, at: (read.append(size), pread(self, size, at))[1])
    with pytest.raises(FormatError, match=r"header of 6,\d{3} bytes, at most 6,000 are shown; .*validate"):
        check_quick(tmp_path / "x", 6000, 20)
    assert sum(read) <= 4096
    check_quick(tmp_path / "x", 7000, 20)  # and long metadata are not many tensors


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file({f"t{i}": tensor("U8", (1,)) for i in range(31)}))
    with pytest.raises(FormatError, match="holds 31 tensors, at most 30 are shown"):
        check_quick(tmp_path / "x", 1 << 20, 30)
    check_quick(tmp_path / "x", 1 << 20, 31)
    assert len(read_header(tmp_path / "x").tensors) == 31


# -- writing


def test_the_size_is_known_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(file(lora(), {"k": "v"}))
    held = read_header(source)
    for tensors, metadata in ((held.tensors, held.metadata), (held.tensors, None), (held.tensors, {}), ({}, {})):
        write_safetensors(tmp_path / "x", tensors, metadata)
        assert file_size(tensors, metadata) == (tmp_path / "x").stat().st_size


def test_a_header_for_tensors_in_any_order_is_read_back() -> None:
    raw = header_bytes({"b": ("F16", (2, 3), 4), "a": ("F32", (), 0)}, {"k": "v"})
    assert raw[8:].rstrip() == (
        b'{"__metadata__":{"k":"v"},"b":{"dtype":"F16","shape":[2,3],"data_offsets":[4,16]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    )
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8


class Lies(Held):
    """A source that gives other bytes than it announces."""

    @property
    def nbytes(self) -> int:
        return 4


@pytest.mark.parametrize("found", [b"123", b"12345"])
def test_a_source_of_another_size_is_not_written(tmp_path: Path, found: bytes) -> None:
    """Whatever follows in the file would be in the wrong place."""
    tensors = {"a": LazyTensor((4,), "U8", Lies(found)), "b": LazyTensor.scalar(1.0, "F16")}
    with pytest.raises(LoratoolError, match=f"gave {len(found)} bytes, expected 4") as caught:
        write_safetensors(tmp_path / "x", tensors, None)
    assert caught.value.key == "a"


@pytest.mark.parametrize("hashes", [False, True])
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes: bool) -> None:
    source = tmp_path / "source"
    source.write_bytes(file(lora()))
    monkeypatch.setattr(os, "write", fails(errno.ENOSPC))
    with pytest.raises(LoratoolError, match="cannot be written: No space left on device") as caught:
        write_safetensors(tmp_path / "x", read_header(source).tensors, None, hashes=hashes)
    assert caught.value.file == str(tmp_path / "x")


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(file(lora()))
    tensors = read_header(source).tensors
    write_safetensors(tmp_path / "whole", tensors, {"k": "v"}, hashes=True)
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[:1000]))
    write_safetensors(tmp_path / "x", tensors, {"k": "v"}, hashes=True)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
