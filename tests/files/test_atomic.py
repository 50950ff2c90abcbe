"""Atomic output: all or nothing, and no rubbish left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loratool.core.errors import LoratoolError
from loratool.files.atomic import atomic_write


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
        "    temporary.write_bytes(b'half'); print('writing', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        process.wait(timeout=10)
    assert target.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 1 + left
