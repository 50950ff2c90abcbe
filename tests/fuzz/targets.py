"""What is fuzzed: for each reader a function that takes any bytes and fails if they do what no file may do.

Every target asks for the same: our own kinds of errors, in one line that names the file; no more than seconds of time;
no import, no code and no file outside the folder. Accepted files must be what the safetensors library reads, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors

from loratool.core.adapter import CONFIG
from loratool.core.errors import LoratoolError
from loratool.core.registry import layouts, methods
from loratool.core.tensor import LazyTensor
from loratool.files.checkpoint import read_checkpoint
from loratool.files.pickles import read_pickle
from loratool.files.safetensors import read_header, write_safetensors
from loratool.ops import recipe
from loratool.ops.inputs import Asked
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from loratool.ops.replay import plan_of, replay_file
from tests.builders import build, typical_parts, write_file

SECONDS = 5.0
"""Of processor time for one file of at most some kilobytes: far more than any takes, far less than a hang."""

MOST_READ = 1 << 20
_RUNS_CODE = ("import", "exec", "compile", "os.", "subprocess.", "ctypes.", "socket.", "pickle.", "shutil.", "marshal.")
_HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")


@dataclass
class Watch:
    """What the audit hook does: nothing, or note what a pickle must not do and where files are opened."""

    folder: str | None = None
    strict: bool = False
    seen: list[str] | None = None


_WATCH = Watch()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCH.seen is None:
        return
    if event == "open":
        name = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
        code = not _WATCH.strict and name.endswith(
            (".py", ".pyc")
        )  # a module of ours that is needed for the first time
        if name and not code and not name.startswith(str(_WATCH.folder)):
            _WATCH.seen.append(f"open {name!r}")
    elif _WATCH.strict and event.startswith(_RUNS_CODE) and event not in _HARMLESS:
        _WATCH.seen.append(f"{event} {str(arguments)[:100]}")


@cache
def _install() -> None:
    sys.addaudithook(_hook)


@dataclass
class Tally:
    """Cases of one target: how many, how many of them were accepted, and what they took."""

    cases: int = 0
    accepted: int = 0
    seconds: float = 0.0


TALLIES: dict[str, Tally] = {}


@contextlib.contextmanager
def _watched(folder: Path, strict: bool = False) -> Iterator[None]:
    """Nothing is opened outside `folder`; with `strict`, nothing is imported or run either."""
    _install()
    seen: list[str] = []
    _WATCH.folder, _WATCH.strict, _WATCH.seen = str(folder), strict, seen
    try:
        yield
    finally:
        _WATCH.seen = None
    assert not seen, seen


def _case(target: str, folder: Path, work: Callable[[], bool], strict: bool = False, watch: bool = True) -> None:
    """One case: `work` says whether the file was accepted, or raises one of our errors."""
    tally = TALLIES.setdefault(target, Tally())
    started = time.process_time()
    try:
        with _watched(folder, strict) if watch else contextlib.nullcontext():
            accepted = work()
    except LoratoolError as error:
        told = str(error)
        assert told.isprintable() and error.message, told
        accepted = False
    took = time.process_time() - started
    tally.cases += 1
    tally.accepted += accepted
    tally.seconds += took
    assert took < SECONDS, f"{took} seconds"


@cache
def _home() -> Path:
    """A folder for the files of this process."""
    made = tempfile.mkdtemp(prefix="loratool-fuzz-")
    import atexit
    import shutil

    atexit.register(shutil.rmtree, made, True)
    return Path(made)


def _contents(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (one.dtype, one.shape, bytes(one.read())) for name, one in tensors.items()}


def _by_safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the library reads. Raises safetensors.SafetensorError for what it rejects."""
    views = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    return {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in views}


# ---------------------------------------------------------------- targets


def header(data: bytes) -> None:
    """The header of a safetensors file: we never accept what the library rejects; what we write it loads the same."""
    file = _home() / "x.safetensors"
    file.write_bytes(data)

    def work() -> bool:
        found = read_header(file)
        ours = _contents(found.tensors)
        assert ours == _by_safetensors(data)
        _written_is_loaded(found.tensors, found.metadata)
        return True

    _case("header", _home(), work)


def _written_is_loaded(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    copy = _home() / "copy.safetensors"
    write_safetensors(copy, tensors, metadata)
    assert _by_safetensors(copy.read_bytes()) == _contents(tensors)
    again = read_header(copy)
    assert again.metadata == metadata
    with safetensors.safe_open(copy, "numpy") as file:  # type: ignore[no-untyped-call]
        assert (file.metadata() or {}) == metadata


def pickles(data: bytes) -> None:
    """A pickle or PyTorch file: nothing is run; what is accepted can be read, written, and loaded by the library."""
    file = _home() / "x.pt"
    file.write_bytes(data)

    def work() -> bool:
        found = read_pickle(file)
        small = {name: one for name, one in found.tensors.items() if one.nbytes <= MOST_READ}
        for one in small.values():
            assert len(one.read()) == one.nbytes
        _TO_WRITE[:] = [(small, found.metadata)]
        return True

    _TO_WRITE.clear()
    _case("pickles", _home(), work, strict=True)
    for tensors, metadata in _TO_WRITE:
        if sum(one.nbytes for one in tensors.values()) <= MOST_READ and "__metadata__" not in tensors:
            _written_is_loaded(tensors, metadata)


_TO_WRITE: list[tuple[Mapping[str, LazyTensor], Mapping[str, str]]] = []


@cache
def _peft() -> Path:
    folder = write_file(_home() / "peft", build(typical_parts("sd15", "peft")[-3:], "peft"))
    open_adapter(folder)
    return folder


def config(data: bytes) -> None:
    """`adapter_config.json` of a PEFT folder."""
    (_peft() / CONFIG).write_bytes(data)

    def work() -> bool:
        adapter = open_adapter(_peft())
        assert all(isinstance(module.scale, float) for module in adapter.modules)
        layouts()["peft"].write(adapter)
        return True

    _case("config", _home(), work)


@cache
def _sharded() -> Path:
    folder = _home() / "sharded"
    folder.mkdir()
    for name, key in (("a", "one.weight"), ("b", "two.weight")):
        write_safetensors(folder / f"{name}.safetensors", {key: LazyTensor.scalar(1.0, "F32")}, None)
    return folder


def index(data: bytes) -> None:
    """`model.safetensors.index.json` of a sharded checkpoint: no shard outside the folder is ever opened."""
    (_sharded() / "model.safetensors.index.json").write_bytes(data)

    def work() -> bool:
        found = read_checkpoint(_sharded())
        assert {Path(file.path).parent for one in found.sets for file in one.files} == {_sharded()}
        return True

    _case("index", _home(), work)


@cache
def _merged() -> tuple[Path, Mapping[str, LazyTensor], Mapping[str, str]]:
    """A file that was merged, its tensors and its metadata."""
    folder = _home() / "merged"
    folder.mkdir()
    inputs = []
    for name in "ab":
        bundle = build(typical_parts("sd15", "kohya")[:2], "kohya", seed=ord(name))
        inputs.append(Asked(str(write_file(folder / f"{name}.safetensors", bundle))))
    merge_files(inputs, folder / "ab.safetensors", methods()["linear"])
    found = read_header(folder / "ab.safetensors")
    tensors = {name: LazyTensor.from_torch(one.load()) for name, one in found.tensors.items()}
    return folder / "ab.safetensors", tensors, found.metadata


def recipes(data: bytes) -> None:
    """The recipe in a header: what is no recipe is refused before anything is done, and no name in it is a path."""
    file, tensors, metadata = _merged()
    text = data.decode("utf-8", "replace")
    write_safetensors(file, tensors, {**metadata, recipe.ENTRY: text})

    def read() -> bool:
        recipe.told({recipe.ENTRY: text})
        plan_of(recipe.decode({recipe.ENTRY: text}))
        return True

    _case("recipes", file.parent, read)
    if data == seeds("recipes")[0] or zlib.crc32(data) % 8 == 0:  # an eighth is really made again
        # Not watched: it writes to the system's folder for temporary files, and imports what it needs.
        _case("replays", file.parent, lambda: replay_file(file) is not None, watch=False)


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "header": header,
    "pickles": pickles,
    "config": config,
    "index": index,
    "recipes": recipes,
}


# ---------------------------------------------------------------- seeds


@cache
def seeds(target: str) -> tuple[bytes, ...]:
    """Sound files to begin with."""
    return tuple(_SEEDS[target]())


def _header_seeds() -> Iterator[bytes]:
    file = _home() / "seed.safetensors"
    scalar = LazyTensor.scalar
    for tensors in (
        {},
        {"a": scalar(1, "F32")},
        {"a": scalar(1, "F16"), "b.c": scalar(2, "BF16"), "é": scalar(1, "U8")},
    ):
        for metadata in (None, {"k": "v", "ss_network_dim": "4"}):
            write_safetensors(file, tensors, metadata)
            yield file.read_bytes()


def _pickle_seeds() -> Iterator[bytes]:
    import io
    from collections import OrderedDict

    import numpy
    import torch

    base = torch.arange(12.0).reshape(3, 4)
    made: list[Any] = [
        {"a": base, "t": base.t(), "e": base[:, :1].expand(3, 2), "s": base[1, 2], "h": base.half(), "n": base[:0]},
        {"state_dict": OrderedDict(w=torch.nn.Parameter(base)), "epoch": 3, "lr": 0.5, "best": numpy.float64(1)},
        [base[:1], base[:, 1:3].to(torch.bfloat16)],
        {
            "f8": base.to(torch.float8_e4m3fn),
            "c": base.to(torch.complex64),
            "size": base.shape,
            "d": torch.device("cpu"),
        },
    ]
    for value in made:
        for options in ({}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}):
            file = io.BytesIO()
            torch.save(value, file, **options)
            yield file.getvalue()


def _config_seeds() -> Iterator[bytes]:
    yield (_peft() / CONFIG).read_bytes()
    yield json.dumps(
        {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": "x"}
    ).encode()


def _index_seeds() -> Iterator[bytes]:
    weights = {"one.weight": "a.safetensors", "two.weight": "b.safetensors"}
    yield json.dumps({"metadata": {"total_size": 8}, "weight_map": weights}).encode()


def _recipe_seeds() -> Iterator[bytes]:
    yield _merged()[2][recipe.ENTRY].encode()
    yield json.dumps(
        {"command": "resize", "version": "1", "inputs": [{"name": "a", "sha256": "0" * 64}], "rule": "rank=4"}
    ).encode()


_SEEDS: Mapping[str, Callable[[], Iterator[bytes]]] = {
    "header": _header_seeds,
    "pickles": _pickle_seeds,
    "config": _config_seeds,
    "index": _index_seeds,
    "recipes": _recipe_seeds,
}
