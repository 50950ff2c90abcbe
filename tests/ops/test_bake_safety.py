"""Baking is all or nothing: what cannot be done is refused before a weight is read, and nothing half is ever named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loratool.core.errors import FormatError, LoratoolError
from loratool.files import stream
from loratool.files.safetensors import OpenFile, read_header
from loratool.files.stream import Output, stretch
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.inputs import Asked
from tests.bakes import CONV, DIFFUSERS, KEYS, TEXT, K, Q, kohya, load, noise, save
from tests.builders import build, typical_parts, write_file
from tests.checkpoints import sparse_checkpoint, sparse_file

SHAPES: Mapping[str, tuple[int, ...]] = {Q: (16, 16), K: (16, 16), CONV: (16, 8, 3, 3), TEXT: (8, 8)}
OTHER = "first_stage_model.decoder.conv_in.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {KEYS[stem]: noise(*shape, dtype=torch.float16) for stem, shape in SHAPES.items()}
    return save(tmp_path / "base.safetensors", {**tensors, OTHER: noise(8, 4, 3, 3)})


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save(tmp_path / "lora.safetensors", kohya(SHAPES))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(
    base: Path, lora: Path, output: Path, words: str, monkeypatch: pytest.MonkeyPatch, options: Options | None = None
) -> LoratoolError:
    """The error; no weight may be read, and no file may change, appear or go."""
    root = base.parent
    before = sorted(os.listdir(root)), {name: os.stat(root / name).st_mtime_ns for name in os.listdir(root)}
    with monkeypatch.context() as patched:
        patched.setattr(OpenFile, "readinto", lambda *_: pytest.fail("a weight was read"))
        with pytest.raises(LoratoolError, match=words) as caught:
            bake_file(base, [Asked(str(lora))], output, options)
    after = sorted(os.listdir(root)), {name: os.stat(root / name).st_mtime_ns for name in os.listdir(root)}
    assert after == before
    return caught.value


# -- before anything is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("which", ["base", "lora"])
@pytest.mark.parametrize("linked", [False, True])
def test_the_output_is_no_input(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, which: str, linked: bool
) -> None:
    output = base if which == "base" else lora
    if linked:
        (tmp_path / "link.safetensors").symlink_to(output)
        output = tmp_path / "link.safetensors"
    error = refused(base, lora, output, "is an input", monkeypatch, Options(overwrite=overwrite))
    assert error.file == str(output)


def test_an_output_that_exists(tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.safetensors").write_bytes(b"theirs")
    refused(base, lora, tmp_path / "out.safetensors", "exists already", monkeypatch)
    bake_file(base, [Asked(str(lora))], tmp_path / "out.safetensors", Options(overwrite=True))
    assert read_header(tmp_path / "out.safetensors").tensors.keys() == read_header(base).tensors.keys()


def test_an_output_in_no_folder(tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(base, lora, tmp_path / "none" / "out.safetensors", "folder does not exist", monkeypatch)


def test_a_folder_for_a_file(tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    refused(base, lora, tmp_path / "out", "is a folder", monkeypatch, Options(overwrite=True))


def test_a_file_for_a_folder(tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, key = DIFFUSERS[Q]
    save(tmp_path / "model" / place / "a.safetensors", {key: noise(16, 16)})
    (tmp_path / "out").write_bytes(b"theirs")
    refused(tmp_path / "model", lora, tmp_path / "out", "is a file", monkeypatch, Options(overwrite=True))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write anywhere")
def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(base, lora, tmp_path / "closed" / "out.safetensors", "cannot be written to", monkeypatch)


def test_too_little_room(tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(tensor.nbytes for tensor in read_header(base).tensors.values())
    room = SimpleNamespace(f_bavail=size - 1, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    refused(base, lora, tmp_path / "out.safetensors", "not enough room", monkeypatch)


def test_a_cast_to_a_wider_dtype_needs_more_room(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = SimpleNamespace(f_bavail=base.stat().st_size + 1000, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    refused(base, lora, tmp_path / "out.safetensors", "not enough room", monkeypatch, Options(dtype="F32"))
    bake_file(base, [Asked(str(lora))], tmp_path / "out.safetensors")


@pytest.mark.parametrize("cut", [1, 1000, "header"])
def test_a_truncated_base(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, cut: int | str
) -> None:
    size = read_header(base).header_bytes - 5 if isinstance(cut, str) else base.stat().st_size - cut
    os.truncate(base, size)
    assert refused(base, lora, tmp_path / "out.safetensors", "truncated", monkeypatch).file == str(base)


def test_a_truncated_adapter(tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(lora, lora.stat().st_size - 1)
    assert refused(base, lora, tmp_path / "out.safetensors", "truncated", monkeypatch).file == str(lora)


@pytest.mark.parametrize("which", ["base", "lora"])
def test_an_input_that_is_not_there(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    missing = tmp_path / "none.safetensors"
    first, second = (missing, lora) if which == "base" else (base, missing)
    error = refused(first, second, tmp_path / "out.safetensors", "no such file|does not exist", monkeypatch)
    assert error.file == str(missing)


def test_a_base_that_is_an_adapter(tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lora, lora, tmp_path / "out.safetensors", "cannot be baked into it", monkeypatch)


def test_an_adapter_that_is_a_checkpoint(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(base, base, tmp_path / "out.safetensors", "not a LoRA|no key of an adapter", monkeypatch)


@pytest.mark.parametrize(
    ("model", "checkpoint", "words"),
    [
        ("sdxl", "sgm", r"is a checkpoint of .*XL.*the adapter is for .*1\.x"),
        ("flux", "bfl", r"is a checkpoint of FLUX.*the adapter is for .*1\.x"),
    ],
)
def test_a_base_of_another_model_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, checkpoint: str, words: str
) -> None:
    """A real-size checkpoint."""
    base = sparse_checkpoint(tmp_path / "base.safetensors", model, checkpoint)
    lora = write_file(tmp_path / "sd15.safetensors", build(typical_parts("sd15", "kohya"), "kohya"))
    error = refused(base, lora, tmp_path / "out.safetensors", words, monkeypatch, Options(allow_unmatched=True))
    assert error.file == str(base)


# -- while it is written ----------------------------------------------------------------------------------------------


def spoiled(key: str, base: Path, mask: int, every: int) -> object:
    """A replacement for Output.write that flips bits in every so manieth byte of one tensor."""
    header, write = read_header(base), Output.write
    first = stretch(header.tensors[key]).start - header.header_bytes
    last = first + header.tensors[key].nbytes

    def spoil(self: Output, data: memoryview, at: int) -> None:
        changed = bytearray(data)
        for place in range(max(first, at), min(last, at + len(changed))):
            if (place - first) % every == every - 1:
                changed[place - at] ^= mask
        write(self, memoryview(changed), at)

    return spoil


@pytest.mark.parametrize("mask", [0x80, 0x40, 0x01], ids=["sign", "exponent", "mantissa"])
def test_a_write_that_goes_wrong_in_a_weight_is_noticed(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    """One value of each row: any row that is looked at shows it."""
    before = tree(tmp_path)
    monkeypatch.setattr(Output, "write", spoiled(KEYS[Q], base, mask, every=32))
    with pytest.raises(LoratoolError, match=r"row \d+, column 15 holds .*, expected") as caught:
        bake_file(base, [Asked(str(lora))], tmp_path / "out.safetensors")
    assert caught.value.key == KEYS[Q]
    assert tree(tmp_path) == before


def test_a_write_that_goes_wrong_in_what_is_copied_is_noticed(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One single bit."""
    before = tree(tmp_path)
    size = read_header(base).tensors[OTHER].nbytes
    monkeypatch.setattr(stream, "_copy_file_range", lambda *asked: 0)
    monkeypatch.setattr(Output, "write", spoiled(OTHER, base, 1, every=size))
    with pytest.raises(FormatError, match="not the same in what was written"):
        bake_file(base, [Asked(str(lora))], tmp_path / "out.safetensors")
    assert tree(tmp_path) == before


def test_a_copy_of_the_system_that_goes_wrong_is_noticed(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that all was copied, and left the last byte out."""
    before = tree(tmp_path)

    def short(source: int, target: int, nbytes: int, at: int, to: int) -> int:
        os.pwrite(target, os.pread(source, nbytes - 1, at), to)
        return nbytes

    monkeypatch.setattr(stream, "_copy_file_range", short)
    with pytest.raises(FormatError, match="not the same in what was written"):
        bake_file(base, [Asked(str(lora))], tmp_path / "out.safetensors")
    assert tree(tmp_path) == before


def test_without_verification_it_is_not_noticed(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above do spoil something."""
    bake_file(base, [Asked(str(lora))], tmp_path / "good.safetensors")
    monkeypatch.setattr(Output, "write", spoiled(KEYS[Q], base, 0x80, every=32))
    bake_file(base, [Asked(str(lora))], tmp_path / "out.safetensors", Options(verify=False))
    good, bad = load(tmp_path / "good.safetensors"), load(tmp_path / "out.safetensors")
    assert torch.equal(bad[KEYS[Q]][:, :15], good[KEYS[Q]][:, :15])
    assert torch.equal(bad[KEYS[Q]][:, 15], -good[KEYS[Q]][:, 15])


@pytest.mark.parametrize("folder", [False, True])
def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    if folder:
        for stem in SHAPES:
            place, key = DIFFUSERS[stem]
            save(tmp_path / "model" / place / f"{stem[-8:]}.safetensors", {key: noise(*SHAPES[stem])})
        base = tmp_path / "model"
    before, write, left = tree(tmp_path), os.pwrite, [2]

    def full(*arguments: object) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LoratoolError, match="No space left") as caught:
        bake_file(base, [Asked(str(lora))], tmp_path / "out")
    file = Path(caught.value.file or "")  # the name that it was to have, not the temporary one
    assert file == tmp_path / "out" or (folder and file.relative_to(tmp_path / "out").suffix == ".safetensors")
    assert tree(tmp_path) == before
    assert "out" not in os.listdir(tmp_path)


@pytest.mark.parametrize("stage", ["writing", "verifying"])
def test_an_interrupt_leaves_nothing(tmp_path: Path, base: Path, lora: Path, stage: str) -> None:
    before = tree(tmp_path)

    def progress(now: str, done: int, total: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake_file(base, [Asked(str(lora))], tmp_path / "out.safetensors", progress=progress)
    assert tree(tmp_path) == before


# -- killed -----------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys, threading, time
from loratool.ops.bake_file import bake_file
from loratool.ops.inputs import Asked
base, lora, output, moment = sys.argv[1:]
once = threading.Lock()
def hang():
    if once.acquire(blocking=False):
        print("hanging", flush=True)
    time.sleep(60)
def progress(stage, done, total):
    if stage == moment:
        hang()
if moment == "naming":
    os.link = os.replace = lambda *_: hang()
bake_file(base, [Asked(lora)], output, progress=progress)
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("kind", "moment"),
    [("file", "writing"), ("file", "verifying"), ("file", "naming"), ("folder", "writing"), ("folder", "naming")],
)
def test_a_bake_that_is_killed_leaves_no_name_and_the_next_one_cleans_up(
    tmp_path: Path, base: Path, lora: Path, kind: str, moment: str
) -> None:
    if kind == "folder":
        for stem in (*SHAPES, "other"):
            place, key = DIFFUSERS.get(stem, ("unet", "conv_in.bias"))
            tensors = {key: noise(*SHAPES.get(stem, (16,))), f"{stem}.bias": noise(16)}
            save(tmp_path / "model" / place / f"{stem[-8:]}.safetensors", tensors)
        base = tmp_path / "model"
    output, before = tmp_path / "out", sorted(os.listdir(tmp_path))
    command = [sys.executable, "-c", KILLED, str(base), str(lora), str(output), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line == b"hanging\n", process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    left = set(os.listdir(tmp_path)) - set(before)
    assert len(left) == 1 and left.pop().startswith(".out.loratool-")
    bake_file(base, [Asked(str(lora))], output)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from loratool.ops.bake_file import bake_file
from loratool.ops.inputs import Asked
import torch
torch.zeros(64, 64) @ torch.zeros(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bake_file(sys.argv[1], [Asked(sys.argv[2])], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_large_checkpoint_is_never_in_memory(tmp_path: Path) -> None:
    """Neither what is copied nor a single large tensor, which here has 200 MiB."""
    base = sparse_file(tmp_path / "base.safetensors", {KEYS[Q]: (10240, 10240), OTHER: (8192, 16384)})
    lora = save(tmp_path / "lora.safetensors", kohya({Q: (10240, 10240)}))
    assert base.stat().st_size > 450 << 20
    command = [sys.executable, "-c", MEASURED, str(base), str(lora), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 10
    (tmp_path / "out.safetensors").unlink()
