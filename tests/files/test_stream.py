"""stream: a plan keeps every order, and a copy is the same bytes, or an error."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors import safe_open

from loratool.core.errors import FormatError, LoratoolError
from loratool.core.tensor import LazyTensor
from loratool.files import ahead, stream
from loratool.files.safetensors import Header, OpenFile, read_header
from loratool.files.stream import Copy, Output, Plan, copies, in_data_order, plan_like, stretch

Entry = tuple[str, tuple[int, ...], int, int]


def handmade(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> Header:
    """A file whose header has this order, whatever the offsets (dtype, shape, start, stop) say; data are counted."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    header |= {
        key: {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        for key, (dtype, shape, start, stop) in entries.items()
    }
    text = json.dumps(header).encode()
    size = max(stop for _, _, _, stop in entries.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(i * 7 % 251 for i in range(size)))
    return read_header(path)


# The header's order is that of nobody: not by name, not by place.
MIXED: Mapping[str, Entry] = {
    "m": ("F16", (4,), 16, 24),
    "z": ("F32", (2, 2), 0, 16),
    "a": ("BF16", (3, 2), 32, 44),
    "k": ("I64", (1,), 24, 32),
    "b": ("F8_E4M3", (4,), 44, 48),
}


def written(path: Path, header: Header, plan: Plan, others: frozenset[str], metadata: Mapping[str, str]) -> Path:
    """A copy, its header written last."""
    path.touch()
    head = plan.header(metadata)
    source = stretch(next(iter(header.tensors.values())))
    with Output(path, len(head), plan) as output:
        for what in reversed(copies(header, plan, others)):
            output.copy(source, what, (bytearray(5), bytearray(5)), verify=True)
        assert path.read_bytes()[: len(head)] == bytes(len(head))
        output.finish(head)
    return path


def contents(header: Header) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {key: (t.dtype, t.shape, bytes(t.read())) for key, t in header.tensors.items()}


def test_a_plan_without_changes_gives_the_very_file_of_a_compact_header(tmp_path: Path) -> None:
    header = handmade(tmp_path / "a", MIXED, {"made": "by hand"})
    again = read_header(written(tmp_path / "b", header, plan_like(header), frozenset(), header.metadata))
    assert list(again.tensors) == list(MIXED)
    assert in_data_order(again) == in_data_order(header) == ["z", "m", "k", "a", "b"]
    assert contents(again) == contents(header)
    assert again.metadata == header.metadata
    third = written(tmp_path / "c", again, plan_like(again), frozenset(), again.metadata)
    assert third.read_bytes() == (tmp_path / "b").read_bytes()


def test_a_change_of_dtype_moves_what_follows_and_nothing_else(tmp_path: Path) -> None:
    header = handmade(tmp_path / "a", MIXED)
    plan = plan_like(header, {"m": "F32", "a": "F8_E4M3"})
    assert dict(plan.entries) == {
        "m": ("F32", (4,), 16),
        "z": ("F32", (2, 2), 0),
        "a": ("F8_E4M3", (3, 2), 40),
        "k": ("I64", (1,), 32),
        "b": ("F8_E4M3", (4,), 46),
    }
    assert list(plan.entries) == list(MIXED)
    assert plan.nbytes == 50
    assert plan.start("k") == 32
    again = read_header(written(tmp_path / "b", header, plan, frozenset({"m", "a"}), {}))
    assert in_data_order(again) == in_data_order(header)
    for key in ("z", "k", "b"):
        assert contents(again)[key] == contents(header)[key]
    assert bytes(again.tensors["m"].read()) == bytes(16)


def test_neighbours_are_copied_in_one_stretch(tmp_path: Path) -> None:
    header = handmade(tmp_path / "a", MIXED)
    start = header.header_bytes
    assert copies(header, plan_like(header), frozenset()) == [Copy(start, 0, 48)]
    assert copies(header, plan_like(header), ["k"]) == [Copy(start, 0, 24), Copy(start + 32, 32, 16)]
    moved = plan_like(header, {"k": "I32"})
    assert copies(header, moved, ["k"]) == [Copy(start, 0, 24), Copy(start + 32, 28, 16)]
    assert copies(header, plan_like(header), list(MIXED)) == []


def test_empty_tensors_are_nothing_to_copy(tmp_path: Path) -> None:
    header = handmade(
        tmp_path / "a", {"void": ("F16", (0, 4), 0, 0), "a": ("F16", (2,), 0, 4), "end": ("F16", (0,), 4, 4)}
    )
    assert copies(header, plan_like(header), frozenset()) == [Copy(header.header_bytes, 0, 4)]
    assert copies(header, plan_like(header), ["a"]) == []
    assert plan_like(header).start("end") == 4


def test_a_copy_in_parts(tmp_path: Path) -> None:
    assert list(Copy(100, 10, 7).parts(3)) == [Copy(100, 10, 3), Copy(103, 13, 3), Copy(106, 16, 1)]
    assert list(Copy(100, 10, 6).parts(3)) == [Copy(100, 10, 3), Copy(103, 13, 3)]
    assert list(Copy(0, 0, 0).parts(3)) == []


def test_tensors_that_are_in_no_file_have_no_stretch() -> None:
    with pytest.raises(TypeError):
        stretch(LazyTensor.scalar(1.0, "F16"))


@pytest.mark.parametrize("system", [0, 7, 1 << 20], ids=["by us", "by both", "by the system"])
@pytest.mark.parametrize("place", [0, 4, 5, 24, 47])
@pytest.mark.parametrize("size", [5, 48, 100])
def test_one_flipped_bit_is_noticed(
    tmp_path: Path, place: int, size: int, system: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a piece of the buffer's size, and in the shorter last one; copied by the system as far as it goes, or not."""
    header = handmade(tmp_path / "a", MIXED)
    plan = plan_like(header)
    source = stretch(header.tensors["a"])
    (what,) = copies(header, plan, frozenset())
    buffers = bytearray(size), bytearray(size)

    spoil = False

    def copied(source: int, target: int, nbytes: int, at: int, to: int) -> int:
        """As Linux does it, up to byte `system`, one bit wrong."""
        data = bytearray(os.pread(source, min(nbytes, head + system - to), at)) if to < head + system else bytearray()
        if spoil and to - head <= place < to - head + len(data):
            data[place - (to - head)] ^= 1
        return os.pwrite(target, data, to)

    monkeypatch.setattr(stream, "_copy_file_range", copied)

    class Spoiled(Output):
        def write(self, data: memoryview, at: int) -> None:
            changed = bytearray(data)
            if at <= place < at + len(changed):
                changed[place - at] ^= 1
            super().write(memoryview(changed), at)

    (tmp_path / "b").touch()
    head = len(plan.header({}))
    with Output(tmp_path / "b", head, plan) as output:
        output.copy(source, what, buffers, verify=True)
    spoil = True
    with Spoiled(tmp_path / "b", head, plan) as output:
        output.copy(source, what, buffers, verify=False)
        with pytest.raises(FormatError, match="are not the same in what was written") as caught:
            output.copy(source, what, buffers, verify=True)
    assert caught.value.file == str(tmp_path / "a")


@pytest.mark.parametrize("why", ["another system", "refused"])
def test_what_the_system_does_not_copy_is_copied(tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        assert why == "refused"
        raise OSError(errno.EXDEV, "refused")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    if why == "another system":
        monkeypatch.setattr(stream.sys, "platform", "darwin")
    header = handmade(tmp_path / "a", MIXED)
    again = written(tmp_path / "b", header, plan_like(header), frozenset(), {})
    assert contents(read_header(again)) == contents(header)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs")
def test_room_is_made_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserved from a byte of the file on; made ready from one of the data on, when all may hurry."""
    monkeypatch.setattr(ahead, "_FEW_CPUS", 0)
    with TemporaryDirectory(dir="/dev/shm") as folder:
        place = Path(folder) / "b"
        place.touch()
        with Output(place, 4096, Plan({}, 4 << 20)) as output:
            assert output.reserve(0, 4096) and os.fstat(output.fd).st_blocks * 512 == 4096
            output.hurry()
            if not output.fills:
                pytest.skip("the system maps nothing")
            output.make_ready(1 << 20, 8192)
            assert output.fills and os.fstat(output.fd).st_blocks * 512 == 3 * 4096
            assert os.lseek(output.fd, 4096, os.SEEK_DATA) == 4096 + (1 << 20)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs")
@pytest.mark.parametrize("refused", [False, True], ids=["", "refused"])
@pytest.mark.parametrize("flip", [None, 0, 4, 5, 24, 47])
def test_a_copy_in_place(refused: bool, flip: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tmpfs it is read to where it belongs; a bit that is wrong there is noticed. Where it is refused, written."""
    monkeypatch.setattr(ahead, "_FEW_CPUS", 0)
    monkeypatch.setattr(stream, "_copy_file_range", lambda *_: 0 if refused else pytest.fail("not in place"))
    with TemporaryDirectory(dir="/dev/shm") as folder:
        header = handmade(Path(folder) / "a", MIXED)
        plan = plan_like(header)
        source = stretch(header.tensors["a"])
        (what,) = copies(header, plan, frozenset())
        place = Path(folder) / "b"
        place.touch()
        head = plan.header({})
        right = type(source.file).readinto
        read: list[int] = []

        def readinto(self: OpenFile, view: memoryview, offset: int) -> None:
            right(self, view, offset)
            first = offset not in read
            read.append(offset)
            if first and flip is not None and 0 <= flip - (offset - what.source) < view.nbytes:
                view[flip - (offset - what.source)] ^= 1

        monkeypatch.setattr(OpenFile, "readinto", readinto)
        with Output(place, len(head), plan) as output:
            output.hurry()
            if refused:
                monkeypatch.setattr(output._ahead, "fills", False)
            elif not output._ahead.fills:
                pytest.skip("the system maps nothing")
            if flip is None:
                output.copy(source, what, (bytearray(5), bytearray(5)), verify=True)
            else:
                with pytest.raises(FormatError, match="are not the same in what was written"):
                    output.copy(source, what, (bytearray(5), bytearray(5)), verify=True)
            output.finish(head)
        if flip is None:
            assert place.read_bytes()[len(head) :] == Path(folder, "a").read_bytes()[header.header_bytes :]
            output = Output(place, len(head), plan)
            output.hurry()
            output.copy(source, what, (bytearray(64), bytearray(64)), verify=False)
            output.__exit__(None, None, None)


@pytest.mark.parametrize("length", range(0, 9000, 613))
@pytest.mark.parametrize("start", [64, 4096, 4104, 9088, 8 + 4095])
def test_data_begin_at_the_same_place_in_a_page(tmp_path: Path, length: int, start: int) -> None:
    """As those of the file they are copied from, if that is aligned at all; other readers take the header."""
    plan = plan_like(handmade(tmp_path / "a", {"a": ("F16", (4,), 0, 8)}))
    plain, head = plan.header({"k": "v" * length}), plan.header({"k": "v" * length}, start)
    assert head[8:].rstrip() == plain[8:].rstrip() and len(head) >= len(plain)
    if start % 8:
        assert head == plain
        return
    assert len(head) % 4096 == start % 4096 and len(head) < max(start, len(plain) + 4096) + 1
    (tmp_path / "b").write_bytes(head + b"12345678")
    assert bytes(read_header(tmp_path / "b").tensors["a"].read()) == b"12345678"
    with safe_open(tmp_path / "b", "np") as opened:
        assert opened.get_tensor("a").tobytes() == b"12345678"
    shorter = plan.header({"k": ""}, start, least=len(head))
    assert len(shorter) == len(head) and shorter[8:].rstrip() == plan.header({"k": ""})[8:].rstrip()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "b").touch()
    return tmp_path / "b"


PLAN = Plan({"a": ("F16", (4,), 0)}, 8)


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="cannot be written") as caught:
        Output(tmp_path / "none", 8, PLAN)
    assert caught.value.file == str(tmp_path / "none")
    assert not os.listdir(tmp_path)


def test_a_header_of_another_length_is_refused(target: Path) -> None:
    head = PLAN.header({})
    with Output(target, len(head), PLAN) as output:
        with pytest.raises(ValueError, match="announced"):
            output.finish(head + b" ")
        output.write(memoryview(b"12345678"), 0)
        output.finish(head)
    assert target.read_bytes() == head + b"12345678"


def test_what_was_written_is_read_back_from_any_place(target: Path) -> None:
    with Output(target, 16, PLAN) as output:
        output.write(memoryview(b"5678"), 4)
        output.write(memoryview(b"1234"), 0)
        found = bytearray(5)
        output.read(memoryview(found), 2)
    assert found == b"34567"


def test_a_file_that_is_cut_meanwhile_is_an_error(target: Path) -> None:
    with Output(target, 16, PLAN) as output:
        os.truncate(target, 20)
        with pytest.raises(LoratoolError, match="became shorter"):
            output.read(memoryview(bytearray(8)), 0)


def test_a_full_disk_is_told(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Output(target, 16, PLAN) as output:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(LoratoolError, match="cannot be written: No space left") as caught:
            output.write(memoryview(b"12"), 0)
    assert caught.value.file == str(target)


def test_a_base_that_is_cut_meanwhile_is_an_error(tmp_path: Path, target: Path) -> None:
    header = handmade(tmp_path / "a", MIXED)
    plan = plan_like(header)
    os.truncate(tmp_path / "a", header.header_bytes + 40)
    (what,) = copies(header, plan, frozenset())
    with Output(target, 16, plan) as output, pytest.raises(FormatError, match="became shorter") as caught:
        output.copy(stretch(header.tensors["a"]), what, (bytearray(64), bytearray(64)), verify=False)
    assert caught.value.file == str(tmp_path / "a")


def test_short_writes_go_on(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:3], at))
    with Output(target, 16, PLAN) as output:
        output.write(memoryview(b"12345678"), 0)
    assert target.read_bytes()[16:] == b"12345678"


def test_what_cannot_be_read_back_names_the_output(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with Output(target, 16, PLAN) as output:
        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(LoratoolError, match="cannot be read back: Input/output error") as caught:
            output.read(memoryview(bytearray(8)), 0)
    assert caught.value.file == str(target)


def test_an_output_that_cannot_be_made_so_long_is_closed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fails(fd: int, size: int) -> None:
        tried.append(fd)
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", fails)
    with pytest.raises(LoratoolError, match="cannot be written: File too large") as caught:
        Output(target, 16, PLAN)
    assert caught.value.file == str(target)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(tried[0])
