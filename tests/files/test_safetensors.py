"""The reader and the writer against the safetensors library, files that are none, and sd-scripts' hashes."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.core.errors import FormatError, LoratoolError
from loratool.core.tensor import CHUNK, DTYPES, Computed, Held, LazyTensor, same_bytes, torch_dtype
from loratool.files.safetensors import LEGACY_HASH, MODEL_HASH, read_header, write_safetensors

REAL_FILES = sorted((Path(__file__).parents[3] / "shared" / "data").glob("*/*.safetensors"))
SD_SCRIPTS = [path for path in REAL_FILES if path.parent.name == "kohya"]
LOADABLE = sorted(set(DTYPES) - {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def deserialized(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    return list(safetensors.deserialize(data))  # type: ignore[no-untyped-call]


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def written(path: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str] | None = None) -> bytes:
    write_safetensors(path, tensors, metadata)
    return path.read_bytes()


def lazies(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.from_torch(tensor) for name, tensor in tensors.items()}


def one_of_each() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {f"t.{code}": (torch.rand(3, 4) * 2).to(torch_dtype(code)) for code in LOADABLE}
    return {**found, "empty": torch.zeros(0, 5), "scalar": torch.tensor(2.5), "über": torch.ones(1, dtype=torch.uint8)}


# ---------------------------------------------------------------- reading and writing what is right


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = one_of_each()
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, {"note": "ein Wörtchen \u2028 \t"})
    header = read_header(path)
    assert header.metadata == {"note": "ein Wörtchen \u2028 \t"}
    assert header.size_bytes == path.stat().st_size
    assert set(header.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bytes(header.tensors[name], LazyTensor.from_torch(tensor))
        assert header.tensors[name].load().dtype == tensor.dtype


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {'ü\n\x01\x7f"\\\b': "\u2028/é\x1f\U0001f600"}])
def test_writes_the_bytes_that_safetensors_writes(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = one_of_each()
    assert written(tmp_path / "x", lazies(tensors), metadata) == safetensors.torch.save(tensors, metadata)


def test_writes_an_empty_file_as_safetensors_does(tmp_path: Path) -> None:
    assert written(tmp_path / "x", {}) == safetensors.torch.save({})
    assert read_header(tmp_path / "x").tensors == {}


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_survives_and_safetensors_accepts_it(tmp_path: Path, code: str) -> None:
    nbytes = 2 * 24 * DTYPES[code] // 8
    tensors = {"a": LazyTensor((2, 24), code, Held(bytes(i % 2 for i in range(nbytes))))}
    data = written(tmp_path / "x", tensors)
    assert same_bytes(read_header(tmp_path / "x").tensors["a"], tensors["a"])
    [(name, view)] = deserialized(data)
    assert (name, view["dtype"], view["shape"], bytes(view["data"])) == ("a", code, [2, 24], bytes(tensors["a"].read()))


def test_order_of_all_dtypes_is_the_serialisers(tmp_path: Path) -> None:
    tensors = {f"{code}.{i}": torch.zeros(2, dtype=torch_dtype(code)) for i in (1, 10, 2) for code in LOADABLE}
    tensors |= {f"F8_E8M0.{i}": torch.zeros(2, dtype=torch.float8_e8m0fnu) for i in (2, 1)}
    items = list(tensors.items())
    random.Random(1).shuffle(items)
    assert written(tmp_path / "x", lazies(dict(items))) == safetensors.torch.save(dict(items))


@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
def test_real_files_survive(tmp_path: Path, path: Path) -> None:
    header = read_header(path)
    write_safetensors(tmp_path / "x", header.tensors, header.metadata)
    again = read_header(tmp_path / "x")
    assert again.metadata == header.metadata
    assert list(again.metadata) == list(header.metadata)
    assert all(same_bytes(again.tensors[name], tensor) for name, tensor in header.tensors.items())
    if path.parent.name != "real":  # written before safetensors sorted by dtype
        assert (tmp_path / "x").read_bytes() == path.read_bytes()


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3)


@QUICK
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(LOADABLE), shapes), max_size=6),
    st.one_of(st.none(), st.dictionaries(names, names, min_size=1, max_size=1)),
)
def test_any_content_gives_the_bytes_of_safetensors(
    tmp_path: Path, content: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    tensors = {name: torch.ones(shape, dtype=torch_dtype(code)) for name, (code, shape) in content.items()}
    assert written(tmp_path / "x", lazies(tensors), metadata) == safetensors.torch.save(tensors, metadata)
    header = read_header(tmp_path / "x")
    assert header.metadata == (metadata or {})
    assert all(same_bytes(header.tensors[name], LazyTensor.from_torch(tensor)) for name, tensor in tensors.items())


# ---------------------------------------------------------------- refusing what is wrong


SEEDS: list[bytes] = [
    packed({"a": entry(), "b": entry(offsets=(4, 8))}, bytes(8)),
    packed({"__metadata__": {"k": "-0"}, "a": entry("F16", [2, 3], [0, 12]), "e": entry("U8", [0], [0, 0])}, bytes(12)),
    packed({"a": entry("F4", (2, 2), (0, 2)), "b": entry("I64", (), (2, 10))}, bytes(10)),
    packed(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}   ', b"x"),
]
FRAGMENTS = [
    b"-0", b"-1", b"1.0", b"1e2", b"01", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}",
    b'"\\ud800"', b'"\\u0041"', b'"a"',
    b",", b":", b"{", b"}", b"[", b"]", b" ", b"\n", b"\t", b"\x00", b"\xff", b"0", b"1", b"2", b"4", b"8", b"12",
    b"4294967296", b"18446744073709551615", b"18446744073709551616", b"9223372036854775808", b"F16", b"F6_E2M3", b"C64",
    b'"dtype"', b'"shape"', b'"x":1,', b'"__metadata__":{},', b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
]  # fmt: skip


def accepted_by_safetensors(data: bytes) -> bool:
    try:
        deserialized(data)
    except safetensors.SafetensorError:
        return False
    return True


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    seed = draw(st.sampled_from(SEEDS))
    length = int.from_bytes(seed[:8], "little")
    text, data = seed[8 : 8 + length], seed[8 + length :]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 4)))
        text = text[:start] + draw(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=2))) + text[stop:]
    data = data[: draw(st.integers(0, len(data) + 2))] + bytes(draw(st.integers(0, 2)) == 2)
    return packed(text, seed[8 + length :] if draw(st.booleans()) else data)


def check_never_laxer(path: Path, data: bytes) -> None:
    # Where we are stricter on purpose: duplicate keys, fields beyond the three, white space before "{", a struct or an
    # enum spelled as an array or an object (serde allows both), and products of sizes that overflow as bits.
    path.write_bytes(data)
    try:
        header = read_header(path)
    except FormatError as error:
        assert "\n" not in str(error)
        assert error.file == str(path)
        return
    assert accepted_by_safetensors(data)
    views = deserialized(data)
    theirs = {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in views}
    ours = {name: (tensor.dtype, tensor.shape, bytes(tensor.read())) for name, tensor in header.tensors.items()}
    assert ours == theirs


@settings(QUICK, max_examples=600)
@given(mutated())
def test_never_accepts_what_safetensors_rejects(tmp_path: Path, data: bytes) -> None:
    check_never_laxer(tmp_path / "x", data)


def test_every_single_fragment_in_every_place(tmp_path: Path) -> None:
    # Values, not bytes: each number, string or bracket of a header replaced by each fragment, systematically.
    text = SEEDS[0][8:-8]
    places = [i for i in range(len(text)) if text[i : i + 1] in b'{["0148,:']
    chosen = random.Random(0).sample([(i, f) for i in places for f in FRAGMENTS], 500)
    for place, fragment in chosen:
        check_never_laxer(tmp_path / "x", packed(text[:place] + fragment + text[place + 1 :], bytes(8)))


@QUICK
@given(st.binary(max_size=64), st.integers(0, 80))
def test_noise_and_wrong_lengths_never_crash(tmp_path: Path, noise: bytes, length: int) -> None:
    check_never_laxer(tmp_path / "x", noise)
    check_never_laxer(tmp_path / "x", length.to_bytes(8, "little") + SEEDS[0][8:])


def a_zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"content")
    return buffer.getvalue()


def torch_file(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, **options)
    return buffer.getvalue()


GOOD = {"a": entry()}
NOT_SAFETENSORS: list[tuple[str, bytes, str]] = [
    ("empty", b"", "empty"),
    ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer.*git lfs pull"),
    ("html", b"\n<!DOCTYPE html><html></html>", "web page.*download"),
    ("json", b'{"error": "not found"}', "JSON text"),
    ("torch zip", torch_file(), "PyTorch.*loratool convert"),
    ("torch old", torch_file(_use_new_zipfile_serialization=False), "pickle.*loratool convert"),
    ("zip", a_zip("lora.safetensors"), "zip archive.*unpack"),
    ("gzip", b"\x1f\x8b\x08" + bytes(20), "gzip.*unpack"),
    ("png", b"\x89PNG\r\n\x1a\n" + bytes(20), "PNG"),
    ("jpeg", b"\xff\xd8\xff\xe0" + bytes(20), "JPEG"),
    ("pdf", b"%PDF-1.7 and so on", "PDF"),
    ("gguf", b"GGUF" + bytes(20), "GGUF"),
    ("zeros", bytes(1000), "zero bytes.*fetch"),
    ("short", b"abc", "3 bytes"),
    ("text", b"just some words here", "plain text"),
    ("header too large", packed(b"{", length=100_000_001), "at most 100000000"),
    ("header cut", packed(GOOD, length=200), "truncated inside the header.*fetch"),
    ("header beyond u64", b"\xff" * 8 + b"{}", "announce a header"),
    ("data cut", packed(GOOD, bytes(3)), "truncated: 3 bytes of data, expected 4; .*fetch"),
    ("data too long", packed(GOOD, bytes(6)), "2 bytes follow"),
]
BAD_HEADERS: list[tuple[str, bytes, str]] = [
    ("blank first", packed(b" {}"), "begins with ' '"),
    ("array", packed(b"[]"), "begins with"),
    ("no json", packed(b"{nonsense}"), "not valid JSON"),
    ("text after", packed(b"{} x"), "not valid JSON"),
    ("nul padding", packed(b"{}\0\0"), "not valid JSON"),
    ("utf-8", packed(b'{"\xff": 1}'), "not UTF-8"),
    ("surrogate", packed(b'{"__metadata__": {"a": "\\ud800"}}'), "surrogate"),
    ("duplicate tensor", packed(b'{"a":1,"a":1}'), "a: stands twice"),
    ("duplicate metadata", packed(b'{"__metadata__":{"k":"1","k":"2"}}'), "k: stands twice"),
    ("NaN", packed(b'{"a":NaN}'), "NaN"),
    ("Infinity", packed(b'{"a":-Infinity}'), "Infinity"),
    ("deep", packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    ("long number", packed(b'{"a":' + b"9" * 10_000 + b"}"), "JSON|expected dtype"),
    ("metadata list", packed({"__metadata__": []}), "__metadata__: is not a JSON object"),
    ("metadata number", packed({"__metadata__": {"steps": 3}}), "'steps' is 3, expected text"),
    ("entry number", packed({"a": 3}), "a: has 3, expected dtype"),
    ("entry lacks", packed({"a": {"dtype": "F32", "shape": [1]}}), "expected dtype, shape and data_offsets"),
    ("entry has more", packed({"a": entry(extra=1)}, bytes(4)), "extra"),
    ("dtype", packed({"a": entry("FLOAT")}, bytes(4)), "dtype 'FLOAT', expected one of"),
    ("dtype list", packed({"a": entry(["F32"])}, bytes(4)), "dtype"),
    ("shape text", packed({"a": entry(shape="1")}, bytes(4)), 'shape "1"'),
    ("shape negative", packed({"a": entry(shape=[-1])}, bytes(4)), r"shape \[-1\]"),
    ("shape minus zero", packed(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "shape"),
    ("shape float", packed({"a": entry(shape=[1.0])}, bytes(4)), r"shape \[1.0\]"),
    ("shape bool", packed({"a": entry(shape=[True])}, bytes(4)), r"shape \[true\]"),
    ("shape huge", packed({"a": entry(shape=[1 << 64])}, bytes(4)), "shape"),
    ("overflow", packed({"a": entry(shape=[1 << 32, 1 << 32])}, bytes(4)), "64 bits"),
    ("overflow then zero", packed({"a": entry(shape=[1 << 32, 1 << 32, 0], offsets=[0, 0])}), "64 bits"),
    ("offsets one", packed({"a": entry(offsets=[4])}, bytes(4)), "data_offsets"),
    ("offsets reversed", packed({"a": entry(offsets=[4, 0])}, bytes(4)), "expected .begin, end"),
    ("offsets float", packed({"a": entry(offsets=[0, 4.0])}, bytes(4)), "data_offsets"),
    ("size", packed({"a": entry(offsets=[0, 3])}, bytes(3)), "has 3 bytes, expected 4"),
    ("half a byte", packed({"a": entry("F4", [3], [0, 2])}, bytes(2)), "12 bits of F4, expected whole bytes"),
    ("hole", packed({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "b: unused bytes before it"),
    ("hole first", packed({"a": entry(offsets=[4, 8])}, bytes(8)), "begins at 4, expected 0"),
    ("overlap", packed({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)), "b: overlaps"),
    ("same place", packed({"a": entry(), "b": entry()}, bytes(4)), "overlaps"),
]


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in NOT_SAFETENSORS], ids=[c[0] for c in NOT_SAFETENSORS])
def test_says_what_the_file_is_instead(tmp_path: Path, data: bytes, words: str) -> None:
    check_refused(tmp_path / "x", data, words)


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in BAD_HEADERS], ids=[case[0] for case in BAD_HEADERS])
def test_says_what_is_wrong_with_the_header(tmp_path: Path, data: bytes, words: str) -> None:
    check_refused(tmp_path / "x", data, words)


def check_refused(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words) as caught:
        read_header(path)
    assert caught.value.file == str(path)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_metadata_null_is_no_metadata(tmp_path: Path) -> None:
    data = packed(b'{"__metadata__":null}')
    (tmp_path / "x").write_bytes(data)
    assert read_header(tmp_path / "x").metadata == {}
    assert accepted_by_safetensors(data)


def test_refuses_what_is_no_regular_file_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code = "import sys; from loratool.files.safetensors import read_header; read_header(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "pipe")]
    result = subprocess.run(command, timeout=20, capture_output=True, text=True, check=False)
    assert "is a pipe" in result.stderr
    for path, words in ((tmp_path, "is a folder"), (os.devnull, "is a device"), ("/dev/zero", "is a device")):
        with pytest.raises(FormatError, match=words):
            read_header(path)
    for path, words in ((tmp_path / "none", "no such file"), ("a\0b", "not a file name")):
        with pytest.raises(FormatError, match=words):
            read_header(path)


# ---------------------------------------------------------------- files that change, descriptors, memory


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "many.safetensors"
    safetensors.torch.save_file({f"t{i}": torch.ones(4) * i for i in range(3000)}, path)
    yield path


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_one_descriptor_for_all_tensors(many: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = descriptors()
    header = read_header(many)
    assert descriptors() == before + 1
    last = header.tensors["t7"].rows(1, 2)
    del header
    gc.collect()
    assert last.load().item() == 7
    del last
    gc.collect()
    assert descriptors() == before
    for _ in range(20):  # nor do refusals leave one open
        many.write_bytes(b"junk")
        with pytest.raises(FormatError):
            read_header(many)
    gc.collect()
    assert descriptors() == before


def test_a_file_that_shrinks_is_an_error(many: Path) -> None:
    tensors = read_header(many).tensors
    with many.open("r+b") as file:
        file.truncate(many.stat().st_size - 8)
    last = max(tensors)
    shrunk = tensors[last]
    for read in (shrunk.read, shrunk.load, lambda: list(shrunk.source.chunks())):
        with pytest.raises(FormatError, match="became shorter") as caught:
            read()
        assert caught.value.file == str(many)


def test_loading_gives_memory_of_its_own(many: Path) -> None:
    tensor = read_header(many).tensors["t5"]
    tensor.load().zero_()
    assert tensor.load().tolist() == [5.0] * 4


def test_memory_stays_small(tmp_path: Path) -> None:
    # tracemalloc sees the pieces: a reader or writer that holds a whole file of 160 MiB would show.
    size = 20 << 20
    one = bytes(size)
    tensors = {f"t{i:02}": LazyTensor((size,), "U8", Held(one)) for i in range(4)}
    tensors |= {f"c{i:02}": LazyTensor((size,), "U8", Computed(size, lambda: bytes(size))) for i in range(4)}
    tracemalloc.start()
    write_safetensors(tmp_path / "a", tensors, None, hashes=True)
    lazy = read_header(tmp_path / "a")
    write_safetensors(tmp_path / "b", lazy.tensors, lazy.metadata)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * CHUNK + 2 * size
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size > 160 << 20


# ---------------------------------------------------------------- refusing to write, hashes, progress


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"__metadata__": LazyTensor.scalar(1, "F32")}, None, "rename"),
        ({"\ud800": LazyTensor.scalar(1, "F32")}, None, "Unicode"),
        ({}, {"a": 3}, "not text"),
        ({"a": LazyTensor((), "F33", Held(b"1234"))}, None, "F33"),
        ({"a": LazyTensor((2,), "F32", Held(b"1234"))}, None, "has 4 bytes"),
        ({"a": LazyTensor((1,), "F4", Held(b"1"))}, None, "4 bits"),
        ({}, {"a": "x" * 5000}, "at most 4096"),
    ],
)
def test_refuses_to_write_what_the_format_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, LazyTensor], metadata: Any, words: str
) -> None:
    monkeypatch.setattr(sys.modules[write_safetensors.__module__], "MAX_HEADER", 4096)
    with pytest.raises(LoratoolError, match=words):
        write_safetensors(tmp_path / "x", tensors, metadata)
    assert not (tmp_path / "x").exists()


def test_never_writes_over_the_file_it_reads_from(many: Path) -> None:
    before = many.read_bytes()
    with pytest.raises(LoratoolError, match="the output is an input"):
        write_safetensors(many, read_header(many).tensors, None)
    assert many.read_bytes() == before


def test_refuses_to_write_to_a_device_or_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(LoratoolError, match="not a regular file"):
        write_safetensors(os.devnull, {}, None)
    with pytest.raises(LoratoolError, match="cannot be written"):
        write_safetensors(tmp_path / "none" / "x", {}, None)


def test_replaces_a_longer_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10_000))
    assert written(tmp_path / "x", {}) == safetensors.torch.save({})


def test_a_source_that_fails_ends_the_hashing_thread(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("no")

    before = threads()
    with pytest.raises(RuntimeError, match="no"):
        write_safetensors(tmp_path / "x", {"a": LazyTensor((4,), "U8", Computed(4, fail))}, None, hashes=True)
    assert threads() == before


def threads() -> int:
    return threading.active_count()


def test_progress_counts_up_to_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    tensors = {f"t{i}": LazyTensor((3 << 20,), "U8", Held(bytes(3 << 20))) for i in range(3)}
    write_safetensors(tmp_path / "x", tensors, None, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (9 << 20, 9 << 20)


def sd_scripts_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """What train_util.precompute_safetensors_hashes computes, from its description."""
    data = safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    begin = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(data[begin:]).hexdigest(), hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("kib", [0, 900, 1023, 1024, 1030, 1088, 5000, 20000])
@pytest.mark.parametrize("metadata", [{}, {"modelspec.title": "x"}, {"ss_tag": "y" * 70_000, MODEL_HASH: "false"}])
def test_hashes_are_those_of_sd_scripts(tmp_path: Path, kib: int, metadata: dict[str, str]) -> None:
    torch.manual_seed(kib)
    tensors = {"alpha": torch.tensor(4.0), "up": torch.randint(0, 255, (kib, 1024), dtype=torch.uint8)}
    write_safetensors(tmp_path / "x", lazies(tensors), metadata, hashes=True)
    header = read_header(tmp_path / "x")
    found = header.metadata
    assert (found[MODEL_HASH], found[LEGACY_HASH]) == sd_scripts_hashes(tensors, metadata)
    assert list(found) == list(metadata | {MODEL_HASH: "", LEGACY_HASH: ""})
    data = (tmp_path / "x").read_bytes()[header.header_bytes :]
    assert hashlib.sha256(data).hexdigest() == found[MODEL_HASH]
    assert all(torch.equal(value, tensors[name]) for name, value in safetensors.torch.load_file(tmp_path / "x").items())


def test_legacy_hash_where_the_header_covers_its_stretch(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(100_000)}
    for length in (0x100000 - 200, 0x100000 + 100, 0x110000, 0x120000):
        metadata = {"ss_tag_frequency": "t" * length}
        write_safetensors(tmp_path / "x", lazies(tensors), metadata, hashes=True)
        found = read_header(tmp_path / "x").metadata
        assert (found[MODEL_HASH], found[LEGACY_HASH]) == sd_scripts_hashes(tensors, metadata)


@pytest.mark.skipif(not SD_SCRIPTS, reason="no files of sd-scripts here")
@pytest.mark.parametrize("path", SD_SCRIPTS, ids=lambda path: path.stem)
def test_hashes_equal_those_that_sd_scripts_wrote(tmp_path: Path, path: Path) -> None:
    header = read_header(path)
    wrong = {**header.metadata, MODEL_HASH: "wrong", LEGACY_HASH: "wrong"}
    write_safetensors(tmp_path / "x", header.tensors, wrong, hashes=True)
    assert read_header(tmp_path / "x").metadata == header.metadata
    assert (tmp_path / "x").read_bytes() == path.read_bytes()
