"""Atomic output where the system refuses: no locks, no hard links, no fsync of folders, no fcntl."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from loratool.core.errors import LoratoolError
from loratool.files import atomic
from loratool.files.atomic import atomic_folder, atomic_write, check_room, flush_folder, remove_unfinished

LEFT = ".out.loratool-0123abcd.tmp"
"""What a killed run leaves."""


def fails(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def write(target: Path, content: bytes = b"new", overwrite: bool = False) -> None:
    with atomic_write(target, overwrite=overwrite) as temporary:
        temporary.write_bytes(content)


# -- what a process leaves that ends without leaving its blocks


def test_what_is_unfinished_is_removed(tmp_path: Path) -> None:
    """Files and folders that are being written, and nothing else; what is gone already does no harm."""
    (tmp_path / "kept").write_bytes(b"kept")
    with atomic_write(tmp_path / "file") as file, atomic_folder(tmp_path / "folder") as folder:
        file.write_bytes(b"half")
        (folder / "half").write_bytes(b"half")
        assert {file, folder} <= atomic._unfinished
        remove_unfinished()
        assert os.listdir(tmp_path) == ["kept"]
        remove_unfinished()
        file.write_bytes(b"")  # so that the blocks can end
        folder.mkdir()
    assert not atomic._unfinished
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "kept"]


def test_of_a_link_in_place_of_a_folder_only_the_link_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to("theirs")
    monkeypatch.setattr(atomic, "_unfinished", {tmp_path / "link"})
    remove_unfinished()
    assert os.listdir(tmp_path) == ["theirs"] and os.listdir(tmp_path / "theirs") == ["a"]


def test_one_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"")
    monkeypatch.setattr(atomic, "_unfinished", {tmp_path / "a" / "under a file", tmp_path / "a"})
    remove_unfinished()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interruption_between_making_and_the_block_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A signal can come as soon as the temporary file is there, before anybody holds its descriptor."""

    def interrupted(descriptor: int) -> int:
        os.close(descriptor)
        assert len(os.listdir(tmp_path)) == 1 and len(atomic._unfinished) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_locked", interrupted)
    begin = atomic_write if kind == "file" else atomic_folder
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "out"):
        pytest.fail("must not get to the block")
    assert os.listdir(tmp_path) == [] and not atomic._unfinished


# -- flushing


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_file_that_cannot_be_flushed_does_not_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "out").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fails(number))
    with pytest.raises(LoratoolError, match=f"cannot be written: {os.strerror(number)}") as caught:
        write(tmp_path / "out", overwrite=True)
    assert caught.value.file == str(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == b"old"


def fsync_of_folders_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """fsync does what it does for files; the folders that were tried."""
    tried: list[int] = []
    plain = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            tried.append(fd)
            raise OSError(number, os.strerror(number))
        plain(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return tried


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EROFS])
def test_a_file_system_that_does_not_flush_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tried = fsync_of_folders_fails(monkeypatch, number)
    write(tmp_path / "out")
    assert tried and (tmp_path / "out").read_bytes() == b"new"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tried[0])


@needs_proc
def test_a_folder_that_fails_to_be_flushed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is failing: the name may not be there after a power cut, and saying nothing would be a lie."""
    tried = fsync_of_folders_fails(monkeypatch, errno.EIO)
    with pytest.raises(LoratoolError, match="cannot be written: Input/output error") as caught:
        write(tmp_path / "out")
    assert caught.value.file == str(tmp_path / "out")
    with pytest.raises(LoratoolError, match="cannot be written: Input/output error"), atomic_folder(tmp_path / "b"):
        pass
    for fd in tried:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_folder_that_cannot_be_opened_is_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    monkeypatch.setattr(os, "open", fails(errno.EACCES))  # as Windows does
    flush_folder(tmp_path)
    assert not flushed


def test_files_that_are_linked_are_not_flushed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a folder shares with another is on the disk already, and may be gigabytes."""
    (tmp_path / "shard").write_bytes(b"shard")
    flushed: list[str] = []
    flush = atomic._flush
    monkeypatch.setattr(atomic, "_flush", lambda file: (flushed.append(file.name), flush(file)))
    with atomic_folder(tmp_path / "out") as folder:
        os.link(tmp_path / "shard", folder / "shard")
        (folder / "new").write_bytes(b"new")
    assert flushed == ["new"]
    assert sorted(os.listdir(tmp_path / "out")) == ["new", "shard"]


# -- names and locks


def test_no_hard_links_and_an_output_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fails(errno.EPERM))
    (tmp_path / "out").write_bytes(b"old")
    write(tmp_path / "out", overwrite=True)
    write(tmp_path / "other")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "other").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_rename_that_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", fails(errno.EPERM))
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(LoratoolError, match="cannot be written: Operation not permitted"):
        write(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == b"old"


def test_a_link_to_nothing_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nothing")
    with pytest.raises(LoratoolError, match="output exists"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").is_symlink() and os.listdir(tmp_path) == ["out"]


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(LoratoolError, match="cannot be written: ") as caught:
        write(tmp_path / "out", overwrite=True)
    assert caught.value.file == str(tmp_path / "out") and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_may_not_be_written_to_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", fails(errno.EACCES))
    with pytest.raises(LoratoolError, match="Permission denied; choose a folder that you can write to"):
        write(tmp_path / "out")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written; leftovers stay, for nobody can tell whether somebody is at work on them."""
    monkeypatch.setattr(fcntl, "flock", fails(errno.ENOLCK))
    (tmp_path / LEFT).write_bytes(b"left")
    write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [LEFT, "out"]


def without_fcntl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("atomic_on_windows", atomic.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_system_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = without_fcntl(monkeypatch)
    assert module.fcntl is None
    (tmp_path / LEFT).write_bytes(b"left")
    with module.atomic_write(tmp_path / "out") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == [LEFT, "out"]


# -- room


def test_room_is_not_asked_for_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """The writing says so, better than a word about room would."""
    check_room(tmp_path / "none", 1 << 80)
    with pytest.raises(LoratoolError, match="not enough room"):
        check_room(tmp_path, 1 << 80)
