"""Atomic output: all or nothing, and no rubbish left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratool.core.errors import LoratoolError
from loratool.files.atomic import atomic_folder, atomic_write, check_room, scratch_folder


def test_the_file_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with atomic_write(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".out.bin.loratool-")
        assert temporary.name.endswith(".tmp")
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out.bin"]
    assert target.stat().st_nlink == 1


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "out") as temporary:
            temporary.write_bytes(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_an_exception_leaves_everything_as_it_was(tmp_path: Path, kind: type[BaseException], exists: bool) -> None:
    target = tmp_path / "out"
    if exists:
        target.write_bytes(b"old")

    def write() -> None:
        with atomic_write(target, overwrite=True) as temporary:
            temporary.write_bytes(b"half")
            raise kind

    with pytest.raises(kind):
        write()
    assert os.listdir(tmp_path) == (["out"] if exists else [])
    assert not exists or target.read_bytes() == b"old"


def test_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(LoratoolError, match=r"output exists; use --overwrite"), atomic_write(target):
        pytest.fail("must refuse before the block")
    with atomic_write(target, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(LoratoolError, match="output exists"), atomic_write(target):
        target.write_bytes(b"somebody else's")
    assert target.read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == ["out"]


def test_no_hard_links_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    with atomic_write(tmp_path / "out") as temporary:
        temporary.write_bytes(b"new")
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(LoratoolError, match="output exists"), atomic_write(tmp_path / "late"):
        (tmp_path / "late").write_bytes(b"theirs")
    assert (tmp_path / "late").read_bytes() == b"theirs"


@pytest.mark.parametrize("overwrite", [False, True])
def test_refusals(tmp_path: Path, overwrite: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    cases = [
        (tmp_path / "missing" / "out", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "out", "not a folder"),
        (tmp_path / "pipe", "not a regular file"),
        (Path(os.devnull), "not a regular file"),
        (Path(".."), "is a folder"),
        (tmp_path / ("n" * 300), "cannot be written"),
    ]
    for target, words in cases:
        with pytest.raises(LoratoolError, match=words) as caught, atomic_write(target, overwrite=overwrite):
            pytest.fail("must refuse before the block")
        assert caught.value.file == str(target)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write anywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LoratoolError, match="you can write to"), atomic_write(tmp_path / "out"):
        pytest.fail("must refuse before the block")


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"shared")
    (tmp_path / "out").symlink_to("blob")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("out", "dangling"):
        with pytest.raises(LoratoolError, match="output exists"), atomic_write(tmp_path / name):
            pytest.fail("must refuse before the block")
        with atomic_write(tmp_path / name, overwrite=True) as temporary:
            temporary.write_bytes(b"new")
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "blob").read_bytes() == b"shared"


def test_long_names_get_a_temporary_name(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 120)
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(("number", "left"), [(signal.SIGINT, 0), (signal.SIGKILL, 1)])
def test_a_stopped_process_never_leaves_half_a_file(tmp_path: Path, number: int, left: int) -> None:
    # Nobody can clean up after SIGKILL, but the name itself must still stand for the old file.
    target = tmp_path / "out"
    target.write_bytes(b"old")
    code = (
        "import sys, time\nfrom loratool.files.atomic import atomic_write\n"
        "with atomic_write(sys.argv[1], overwrite=True) as temporary:\n"
        "    temporary.write_bytes(b'half'); print('writing', flush=True)\n"
        # Not one long sleep: a signal just before it would be heard only after it.
        "    while True:\n        time.sleep(0.01)\n"
    )
    command = [sys.executable, "-c", code, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        process.wait(timeout=10)
    assert target.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 1 + left


# -- what killed runs leave -------------------------------------------------------------------------------------------

AT_WORK = """
import sys, time
from pathlib import Path
from loratool.files.atomic import atomic_folder, atomic_write
with (atomic_folder if sys.argv[2] == "folder" else atomic_write)(sys.argv[1], overwrite=True) as temporary:
    (temporary / "half" if sys.argv[2] == "folder" else temporary).write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""
KINDS = pytest.mark.parametrize("kind", ["file", "folder"])


@contextmanager
def at_work(target: Path, kind: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process in the middle of writing `target`."""
    command = [sys.executable, "-c", AT_WORK, str(target), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        try:
            yield process
        finally:
            process.kill()


def write(target: Path, kind: str) -> None:
    if kind == "folder":
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "whole").write_bytes(b"new")
    else:
        with atomic_write(target, overwrite=True) as file:
            file.write_bytes(b"new")


@KINDS
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, kind: str) -> None:
    with at_work(tmp_path / "out", kind) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    assert len(os.listdir(tmp_path)) == 1
    write(tmp_path / "out", kind)
    assert os.listdir(tmp_path) == ["out"]


@KINDS
def test_what_a_live_run_writes_is_not_removed(tmp_path: Path, kind: str) -> None:
    with at_work(tmp_path / "out", kind):
        (before,) = os.listdir(tmp_path)
        write(tmp_path / "out", kind)
        assert sorted(os.listdir(tmp_path)) == [before, "out"]
        left = tmp_path / before
        assert (left / "half" if kind == "folder" else left).read_bytes() == b"half"


def test_only_leftovers_of_this_output_are_removed(tmp_path: Path) -> None:
    kept = [".other.loratool-0123abcd.tmp", ".out.loratool-0123abcd.tmp.bak", ".out.loratool-mine.tmp", ".outAloratool"]
    for name in kept:
        (tmp_path / name).write_bytes(b"theirs")
    (tmp_path / ".out.loratool-0123abcd.tmp").write_bytes(b"left")
    (tmp_path / ".out.loratool-4567cdef.tmp").symlink_to(tmp_path / kept[0])
    write(tmp_path / "out", "file")
    assert (tmp_path / kept[0]).read_bytes() == b"theirs"
    assert {*kept, "out"} <= set(os.listdir(tmp_path))
    assert ".out.loratool-0123abcd.tmp" not in os.listdir(tmp_path)


# -- folders ----------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".out.loratool-")
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"1")
        (folder / "b").write_bytes(b"2")
        assert not target.exists()
    assert tree(target) == {"sub/a": b"1", "b": b"2"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_an_exception_leaves_folders_as_they_were(tmp_path: Path, kind: type[BaseException], exists: bool) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "old").write_bytes(b"old")
    with pytest.raises(kind), atomic_folder(target, overwrite=True) as folder:
        (folder / "half").write_bytes(b"half")
        raise kind
    assert tree(tmp_path) == ({"out/old": b"old"} if exists else {})
    assert os.listdir(tmp_path) == (["out"] if exists else [])


def test_a_folder_with_files_in_it_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "old").write_bytes(b"old")
    with pytest.raises(LoratoolError, match="output exists"), atomic_folder(target):
        pytest.fail("must refuse before the block")
    write(target, "folder")
    assert tree(target) == {"whole": b"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"1")
    assert tree(tmp_path) == {"out/a": b"1"}


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_swap_that_fails_in_the_middle_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    rename = os.rename
    calls: list[object] = []

    def second_fails(source: object, to: object) -> None:
        calls.append(to)
        if len(calls) == 2:
            raise kind
        rename(source, to)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(LoratoolError if kind is OSError else kind):
        write(target, "folder")
    assert len(calls) == 3
    assert tree(tmp_path) == {"out/old": b"old"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("empty", [False, True])
def test_a_link_to_a_folder_is_replaced_and_not_followed(tmp_path: Path, empty: bool) -> None:
    (tmp_path / "shared").mkdir()
    if not empty:
        (tmp_path / "shared" / "a").write_bytes(b"shared")
    (tmp_path / "out").symlink_to("shared")
    write(tmp_path / "out", "folder")
    assert not (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "out") == {"whole": b"new"}
    assert tree(tmp_path / "shared") == ({} if empty else {"a": b"shared"})
    assert sorted(os.listdir(tmp_path)) == ["out", "shared"]


def test_a_folder_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="cannot be written") as caught, atomic_folder(tmp_path / "none" / "out"):
        pytest.fail("must refuse before the block")
    assert caught.value.file == str(tmp_path / "none" / "out")


# -- room -------------------------------------------------------------------------------------------------------------


def test_too_little_room_is_told_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = SimpleNamespace(f_bavail=1 << 19, f_bfree=1 << 40, f_frsize=4096)  # 2 GiB for us, more for root
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    check_room(tmp_path, 2 << 30)
    with pytest.raises(LoratoolError, match=r"2\.0 GiB free, 3\.5 GiB needed") as caught:
        check_room(tmp_path, 7 << 29)
    assert caught.value.file == str(tmp_path)


def test_room_is_not_asked_for_where_the_system_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "statvfs")
    check_room(tmp_path, 1 << 80)


@pytest.mark.parametrize(
    ("writer", "inside"),
    [(atomic_write, "."), (atomic_folder, "unet/x.bin"), (scratch_folder, "1.safetensors")],
)
def test_errors_name_what_was_to_be_written(tmp_path: Path, writer: Callable[..., Any], inside: str) -> None:
    """The temporary name is gone when they are read. A scratch folder becomes nothing: its files are the target's."""
    target = tmp_path / "out"
    named = target if writer is scratch_folder else target / inside
    for elsewhere in (None, str(tmp_path / "base")):
        with pytest.raises(LoratoolError) as told, writer(target) as temporary:
            raise LoratoolError("is bad", file=elsewhere or str(temporary / inside))
        assert told.value.file == (elsewhere or str(named))
        with pytest.raises(OSError) as refused, writer(target) as temporary:
            raise OSError(28, "No space left on device", elsewhere or str(temporary / inside))
        assert refused.value.filename == (elsewhere or str(named))
