"""The copier: what stays is copied and compared, and the rest is reserved or made ready, from one end to the other."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from loratool.files import ahead
from loratool.files.checkpoint import WeightFile
from loratool.files.stream import Output
from loratool.ops import bake_copy
from loratool.ops.bake_copy import Copier
from loratool.ops.bake_task import FileTask, Options, prepared
from loratool.ops.inputs import Asked
from tests.bakes import KEYS, K, Q, V, kohya, noise, save

OTHER = "first_stage_model.decoder.conv_in.weight"
MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="no tmpfs")


@pytest.fixture
def place() -> Iterator[Path]:
    with TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def task_in(place: Path) -> FileTask:
    """A checkpoint of which the middle weight and the one behind it are copied."""
    shapes = {Q: (320, 320), K: (320, 320), V: (320, 320)}
    tensors = {KEYS[stem]: noise(*shape, seed=at).half() for at, (stem, shape) in enumerate(shapes.items())}
    base = save(place / "base.safetensors", {**tensors, OTHER: noise(512, 4, 3, 3)})
    lora = save(place / "lora.safetensors", kohya({Q: shapes[Q], V: shapes[V]}))
    (one,) = prepared(base, [Asked(str(lora))], Options(), None).files
    return one


def opened(place: Path, one: FileTask) -> Output:
    (place / "out").touch()
    return Output(place / "out", one.file.header.header_bytes, one.plan)


def check(place: Path, one: FileTask) -> None:
    """What is copied is that of the base, and what is not holds zeros."""
    start, data = one.file.header.header_bytes, (place / "out").read_bytes()
    base = (place / "base.safetensors").read_bytes()
    expected = bytearray(len(base))
    for what in one.copies:
        first = start + what.target
        expected[first : first + what.nbytes] = base[what.source : what.source + what.nbytes]
    assert data == bytes(expected) and any(data)


@pytest.mark.parametrize("imported", [True, False], ids=["imported", "importing"])
@pytest.mark.parametrize("few", [0, 1000], ids=["many", "few"])
def test_all_space_is_there_and_what_stays_is_copied(
    place: Path, monkeypatch: pytest.MonkeyPatch, imported: bool, few: int
) -> None:
    """Whether torch is there already or not, on many processors and on few."""
    monkeypatch.setattr(ahead, "_FEW_CPUS", few)
    monkeypatch.setattr(bake_copy, "_READY", 10_000)
    monkeypatch.setattr(bake_copy, "_RESERVED", 50_000)
    monkeypatch.setattr(bake_copy, "_PART", 30_000)
    one = task_in(place)
    ticks: list[int] = []
    with opened(place, one) as output, monkeypatch.context() as patched:
        if not imported:
            patched.delitem(sys.modules, "torch")
        with Copier([one], {one.file: output}, True, ticks.append) as copier:
            assert output.fills == (imported and not few)
            copier.hurry()
            copier.wait()
            copied = sum(what.nbytes for what in one.copies)
            assert copier.compared == sum(ticks) == copied > 0
        assert os.fstat(output.fd).st_blocks * 512 >= one.plan.nbytes
    check(place, one)


def test_what_is_not_reserved_when_all_may_hurry_is_made_ready(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the reserving had come to; no step is left out between them."""
    monkeypatch.setattr(ahead, "_FEW_CPUS", 0)
    monkeypatch.setattr(bake_copy, "_READY", 10_000)
    monkeypatch.setattr(bake_copy, "_RESERVED", 70_000)
    one = task_in(place)
    begun, go = threading.Event(), threading.Event()
    reserved: list[tuple[int, int]] = []
    made: list[tuple[int, int]] = []
    reserve, make = Output.reserve, Output.make_ready

    def slowly(self: Output, at: int, nbytes: int) -> bool:
        if len(reserved) == 2:
            begun.set()
            go.wait(10)
        found = reserve(self, at, nbytes)
        if found:
            reserved.append((at, at + nbytes))
        return found

    def noted(self: Output, at: int, nbytes: int) -> None:
        made.append((self.head + at, self.head + at + nbytes))
        make(self, at, nbytes)

    monkeypatch.setattr(Output, "reserve", slowly)
    monkeypatch.setattr(Output, "make_ready", noted)
    with opened(place, one) as output, monkeypatch.context() as patched:
        patched.delitem(sys.modules, "torch")
        with Copier([one], {one.file: output}, True, lambda nbytes: None) as copier:
            assert begun.wait(10)
            copier.hurry()
            go.set()
            copier.wait()
        if not output.fills:
            pytest.skip("the kernel is too old, or there is no room")
        steps = [*reserved, *sorted(made)]
        assert steps[0][0] == 0 and steps[-1][1] == output.head + one.plan.nbytes
        assert reserved == [(0, 70_000), (70_000, 140_000)]
        assert all(before[1] == after[0] for before, after in pairwise(steps))
        assert os.fstat(output.fd).st_blocks * 512 >= one.plan.nbytes
    check(place, one)


def test_on_a_disk_only_copies_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_in_memory", lambda fd: False)
    monkeypatch.setattr(Output, "make_ready", lambda *_: pytest.fail("makes pages"))
    one = task_in(tmp_path)
    with opened(tmp_path, one) as output, Copier([one], {one.file: output}, True, lambda nbytes: None) as copier:
        copier.wait()
    check(tmp_path, one)


def test_files_are_those_of_their_own(place: Path) -> None:
    """Two files at once: each gets its bytes."""
    files: dict[WeightFile, Output] = {}
    tasks = []
    for name in ("a", "b"):
        folder = place / name
        folder.mkdir()
        one = task_in(folder)
        tasks.append((folder, one))
        files[one.file] = opened(folder, one)
    with Copier([one for _, one in tasks], files, True, lambda nbytes: None) as copier:
        copier.wait()
    for output in files.values():
        output.__exit__(None, None, None)
    for folder, one in tasks:
        check(folder, one)
