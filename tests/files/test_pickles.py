"""What torch.save writes is read as torch.load reads it, bit for bit, without torch."""

from __future__ import annotations

import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from loratool.core.errors import FormatError
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import read_bundle
from loratool.files.pickles import read_pickle
from loratool.files.safetensors import FileRange, is_pickle, write_safetensors
from loratool.files.torch_names import NAMES, STORAGES, TORCH_DTYPES
from tests.pickles import (
    EMPTY,
    SIX,
    Called,
    Code,
    Kept,
    Name,
    With,
    legacy,
    pickled,
    spelled,
    storage,
    tensor,
    torch_zip,
)

OLD: Mapping[str, Any] = {"_use_new_zipfile_serialization": False}
FORMATS = [
    pytest.param({**container, "pickle_protocol": protocol}, id=f"{name}, protocol {protocol}")
    for name, container in (("zip", {}), ("legacy", OLD))
    for protocol in (1, 2, 3, 4, 5)
]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
]
NEW_DTYPES = [
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row order."""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes as a tensor: NaN, infinities and all."""
    generator = torch.Generator().manual_seed(len(shape))
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    count = 1
    for one in shape:
        count *= one
    noise = torch.randint(0, 256, (count * size,), generator=generator, dtype=torch.uint8)
    return noise.view(dtype).reshape(shape)


def check(found: Mapping[str, LazyTensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names in the same order, with the same shapes, dtypes and bytes."""
    assert list(found) == list(expected)
    for name, one in expected.items():
        lazy = found[name]
        assert (lazy.shape, lazy.load().dtype) == (tuple(one.shape), one.dtype), name
        assert bytes(lazy.read()) == raw(one), name
        assert b"".join(lazy.source.chunks(5)) == raw(one), name
        assert lazy.nbytes == len(raw(one)), name


def views() -> dict[str, torch.Tensor]:
    """One storage under many views, each of which torch.save writes as a view."""
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    return {
        "whole": base,
        "again": base,
        "rows": base[1:],
        "one": base[1, 2, 3, 4],
        "columns": base[:, :, :, 1:3],
        "turned": base.permute(3, 1, 0, 2),
        "steps": base.reshape(-1)[3:100:7],
        "spread": base[0, 0, 0, :1].expand(4, 5),
        "spread inside": base[0, 0, :, :1].expand(4, 6),
        "channels last": base.to(memory_format=torch.channels_last),
        "nothing": base[:0],
        "ones": base[:1, :, :1].transpose(0, 2),
        "line": base[:1, 1:2, :1].transpose(0, 2),
        "halves": base.to(torch.float16).t() if base.dim() == 2 else base.to(torch.float16)[..., 0],
    }


@pytest.mark.parametrize("options", FORMATS)
def test_views_strides_and_shared_storages(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.save(views(), tmp_path / "x.pt", **options)
    check(read_pickle(tmp_path / "x.pt").tensors, torch.load(tmp_path / "x.pt", weights_only=False))


@pytest.mark.parametrize("options", FORMATS)
def test_every_dtype(tmp_path: Path, options: dict[str, Any]) -> None:
    made = {f"{dtype} {shape}": of(dtype, *shape) for dtype in DTYPES for shape in ((), (1,), (3, 5), (0, 4))}
    torch.save(made, tmp_path / "x.pt", **options)
    check(read_pickle(tmp_path / "x.pt").tensors, torch.load(tmp_path / "x.pt", weights_only=False))


@pytest.mark.parametrize("dtype", NEW_DTYPES, ids=str)
@pytest.mark.parametrize("container", [{}, OLD], ids=["zip", "legacy"])
def test_dtypes_without_a_storage_of_their_own(tmp_path: Path, dtype: torch.dtype, container: dict[str, Any]) -> None:
    whole = of(dtype, 6, 4)
    made = {"whole": whole, "turned": whole.t(), "part": whole[2:4], "one": whole[0, 0]}
    torch.save(made, tmp_path / "x.pt", **container)
    # Not compared with torch.load: it cannot read these from its own legacy format.
    check(read_pickle(tmp_path / "x.pt").tensors, made)


def test_stretches_of_the_file_are_not_copied(tmp_path: Path) -> None:
    torch.save(views(), tmp_path / "x.pt")
    found = read_pickle(tmp_path / "x.pt").tensors
    assert {name for name, one in found.items() if isinstance(one.source, FileRange)} == {
        *("whole", "again", "rows", "one", "line"),
    }


@pytest.mark.parametrize("container", [{}, OLD], ids=["zip", "legacy"])
def test_modules_parameters_and_their_versions(tmp_path: Path, container: dict[str, Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(model.state_dict(keep_vars=True), tmp_path / "x.pt", **container)
    bundle = read_pickle(tmp_path / "x.pt")
    check(bundle.tensors, model.state_dict())
    assert bundle.metadata == {}
    (note,) = bundle.notes
    assert "1 value" in note and "_metadata" in note


@pytest.mark.parametrize("container", [{}, OLD], ids=["zip", "legacy"])
def test_a_checkpoint_of_lightning(tmp_path: Path, container: dict[str, Any]) -> None:
    weights = OrderedDict({"model.a.weight": torch.rand(2, 3), "model_ema.decay": torch.tensor(0.9999)})
    moments = torch.rand(2, 3)
    made = {
        "epoch": 4,
        "global_step": 20_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": moments}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        "best": numpy.float32(0.25),
        "flags": numpy.array([True, False])[0],
        "hyper_parameters": {"lr": 1e-4, "names": ["x", "y"], "none": None},
        "callbacks": {},
        "rng": b"state",
    }
    torch.save(made, tmp_path / "x.ckpt", **container)
    bundle = read_pickle(tmp_path / "x.ckpt")
    check(bundle.tensors, {**weights, "optimizer_states.0.state.0.exp_avg": moments})
    assert bundle.metadata == {
        "epoch": "4",
        "global_step": "20000",
        "pytorch-lightning_version": "1.4.2",
        "optimizer_states.0.state.0.step": "3",
        "best": "0.25",
        "flags": "True",
        "hyper_parameters.lr": "0.0001",
    }
    (note,) = bundle.notes
    assert "4 values" in note and "optimizer_states.0.param_groups.0.betas, hyper_parameters.names" in note


def test_the_names_of_the_checkpoints_of_stable_diffusion(tmp_path: Path) -> None:
    """v1-5-pruned.ckpt names a class of Lightning as a key, and holds a number of numpy."""
    kind = With(Called("numpy.dtype", ("f8", False, True)), (3, "<", None, None, None, -1, -1, 0))
    best = Called("numpy.core.multiarray.scalar", (kind, Called("_codecs.encode", ("\0" * 6 + "ð?", "latin1"))))
    where = Code(b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n")
    callbacks = Code(pickled({})[2:-1] + where.raw + pickled({"best": best, "mode": "min"})[2:-1] + b"s")
    (tmp_path / "x").write_bytes(torch_zip({"state_dict": {"a": tensor()}, "callbacks": callbacks}))
    bundle = read_pickle(tmp_path / "x")
    name = "callbacks.pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert bundle.metadata == {f"{name}.best": "1.0", f"{name}.mode": "min"}
    assert list(bundle.tensors) == ["a"]


def test_state_dict_is_a_name_like_others_where_it_wraps_no_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": {"b": torch.ones(1)}}, "state_dict2": {"c": torch.ones(1)}}, tmp_path / "x")
    assert list(read_pickle(tmp_path / "x").tensors) == ["state_dict.a.b", "state_dict2.c"]


def test_a_list_of_tensors(tmp_path: Path) -> None:
    made = [torch.ones(2, 1), torch.zeros(1, 2)]
    torch.save(made, tmp_path / "x")
    check(read_pickle(tmp_path / "x").tensors, {"0": made[0], "1": made[1]})


def test_sizes_devices_dtypes_and_sets_are_values(tmp_path: Path) -> None:
    made = {"t": torch.ones(1), "s": torch.Size([1, 2]), "d": torch.device("cuda:1"), "k": torch.float16}
    torch.save({**made, "set": {1}, "frozen": frozenset({2})}, tmp_path / "x", pickle_protocol=4)
    bundle = read_pickle(tmp_path / "x")
    assert bundle.metadata == {"d": "cuda:1"}
    assert "s, k, set, ..." in bundle.notes[0]


def test_a_tensor_that_was_set_on_a_dict_is_not_lost(tmp_path: Path) -> None:
    inner = With(Code(spelled({"b": tensor()})), {"set": tensor((2,), (1,)), "_metadata": {"": 1}})
    (tmp_path / "x").write_bytes(torch_zip(With({"a": inner}, {"more": tensor()})))
    bundle = read_pickle(tmp_path / "x")
    assert list(bundle.tensors) == ["a.b", "a.set", "more"]
    assert "a._metadata" in bundle.notes[0]


def test_long_names_are_shortened_in_the_note(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(torch_zip({"a": tensor(), "n" * 100_000: None, "b": tensor(), "m" * 99: []}))
    bundle = read_pickle(tmp_path / "x")
    assert len(bundle.notes[0]) < 400 and bundle.notes[0].count("...") == 1


# ---------------------------------------------------------------- what torch no longer writes


def test_big_endian_files(tmp_path: Path) -> None:
    numbers = struct.pack(">6f", *range(6))
    turned = tensor((3, 2), (1, 3))
    made = {"a": tensor(), "t": turned, "c": tensor((3,), (1,), 0, storage("1", 3, "torch.ComplexFloatStorage"))}
    made |= {"u": tensor((2,), (1,), 0, storage("2", 2, "torch.ByteStorage")), "e": tensor((0,), (1,))}
    kept = {"0": numbers, "1": numbers, "2": b"xy"}
    (tmp_path / "zip").write_bytes(torch_zip(made, kept, byteorder=b"big"))
    behind = b"".join(n.to_bytes(8, "big") + kept[key] for key, n in (("0", 6), ("1", 3), ("2", 2)))
    (tmp_path / "legacy").write_bytes(legacy(made, ("0", "1", "2"), behind, facts={"little_endian": False}))
    plain = torch.arange(6.0).reshape(2, 3)
    expected = {"a": plain, "t": plain.t(), "c": torch.view_as_complex(plain.reshape(3, 2))}
    expected |= {"u": torch.tensor([120, 121], dtype=torch.uint8), "e": torch.zeros(0)}
    for name in ("zip", "legacy"):
        found = read_pickle(tmp_path / name).tensors
        check(found, expected)
        assert bytes(found["a"].rows(1, 2).read()) == raw(plain[1:])
        assert bytes(found["t"].rows(1, 3).rows(1, 2).read()) == raw(plain.t()[2:])
        assert b"".join(found["t"].rows(1, 3).source.chunks(3)) == raw(plain.t()[1:])


def test_a_view_of_a_storage_as_files_of_2017_have_it(tmp_path: Path) -> None:
    part = storage("0", 6, "torch.FloatStorage", ("9", 2, 3))
    (tmp_path / "x").write_bytes(legacy({"a": tensor((3,), (1,), 0, part), "b": tensor((1,), (1,), 2, part)}))
    check(read_pickle(tmp_path / "x").tensors, {"a": torch.arange(2.0, 5), "b": torch.tensor([4.0])})


def test_the_first_spelling_of_tensors_and_dicts(tmp_path: Path) -> None:
    first = Called("torch._utils._rebuild_tensor", (storage(), 1, (2, 2), (3, 1)))
    made = Called("collections.OrderedDict", ([["a", first], ("b", tensor())],))
    (tmp_path / "x").write_bytes(legacy(made))
    whole = torch.arange(6.0).reshape(2, 3)
    check(read_pickle(tmp_path / "x").tensors, {"a": whole[:, 1:], "b": whole})


ODD_OPCODES = {
    b"I1\n": "1",
    b"I01\n": "True",
    b"I00\n": "False",
    b"L-5L\n": "-5",
    b"F1.5\n": "1.5",
    b"V\\u20ac\n": "€",
    b"U\1x": "x",
    b"T\2\0\0\0yz": "yz",
    b"\x8d\1\0\0\0\0\0\0\0d": "d",
    b"J\xff\xff\xff\xff": "-1",
    b"M\1\1": "257",
    b"\x8b\2\0\0\0\0\x80": "-32768",
    b"\x8a\0": "0",
    b"K\1(K\2K\0031": "1",  # pushed behind a mark and popped with it
    b"K\1(0": "1",  # POP takes a mark that has nothing behind it
    b"K\1K\0020": "1",
    b"K\x072p300\n0": "7",
    b"g300\n": "7",
    b"K\x08r\0\1\0\0": "8",
    b"j\0\1\0\0": "8",
    b"K\x09q\7": "9",
    b"h\7": "9",
    b"\x95\0\0\0\0\0\0\0\0K\1": "1",
}


def test_every_opcode_that_only_builds_data(tmp_path: Path) -> None:
    named = {f"k{number}": (raw, text) for number, (raw, text) in enumerate(ODD_OPCODES.items())}
    values = b"(" + b"".join(spelled(name) + raw for name, (raw, _) in named.items()) + b"d"
    lists = b"](C\1a\x8e\1\0\0\0\0\0\0\0c\x8f(K\1\x90(K\1\x91]K\1a(K\1lK\1\x85\x94e"
    made = {"t": tensor(), "odd": Code(values), "lists": Code(lists), "new": Code(b"ccollections\nOrderedDict\n)\x81")}
    (tmp_path / "x").write_bytes(torch_zip(made))
    bundle = read_pickle(tmp_path / "x")
    assert bundle.metadata == {f"odd.{name}": text for name, (_, text) in named.items()}
    assert list(bundle.tensors) == ["t"]
    assert "lists" in bundle.notes[0]


# ---------------------------------------------------------------- which files are pickles


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value", [{"a": 1}, {}, [1], [], OrderedDict(a=1), {"a": [1, 2], "b": 2}, 0x1950A86A20F9469CFC6C], ids=str
)
def test_pickles_are_known_by_their_bytes(tmp_path: Path, protocol: int, value: Any) -> None:
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(value, protocol))
    assert is_pickle(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"PK\x03\x04", b"hello", b"cat\ndog\nhouse\n", b"\0" * 99, b"{}", b"<html>", b"GGUF", b"(the best)"],
    ids=repr,
)
def test_other_files_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    assert not is_pickle(tmp_path / "x.pt")


def test_a_safetensors_file_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """A header of 0x280 bytes begins with the bytes 80 02."""
    for length in range(1000):
        write_safetensors(tmp_path / "x.pt", {"a": LazyTensor.scalar(1, "F32")}, {"k": "v" * length})
        if (tmp_path / "x.pt").read_bytes()[:2] == b"\x80\x02":
            break
    assert (tmp_path / "x.pt").read_bytes()[:2] == b"\x80\x02"
    assert read_bundle(tmp_path / "x.pt").metadata["k"] == "v" * length


def test_a_zip_is_a_pytorch_file_by_its_directory_too(tmp_path: Path) -> None:
    data = torch_zip({"a": tensor((5000,), (1,), 0, storage("0", 5000))}, {"0": bytes(20_000)})
    (tmp_path / "x").write_bytes(data)
    assert is_pickle(tmp_path / "x")


# ---------------------------------------------------------------- the allow-list


def test_nothing_of_loratool_can_load_a_pickle() -> None:
    """No hole of `torch.load`, `pickle` or a zip reader is ours: none is ever imported or called."""
    word = re.compile(
        r"torch\.load\(|weights_only|^\s*(import|from) (pickle|cPickle|dill|joblib|marshal|shelve|zipfile|tarfile)\b"
        r"|torch\.(jit|hub)\b|\b(eval|exec|__import__)\(",
        re.MULTILINE,
    )
    sources = sorted((Path(__file__).parents[2] / "loratool").rglob("*.py"))
    assert len(sources) > 100
    found = {path.name: match[0] for path in sources if (match := word.search(path.read_text(encoding="utf-8")))}
    assert found == {}


# ---------------------------------------------------------------- what may be named


def test_the_allow_list_is_what_torch_itself_takes_for_safe() -> None:
    """Nothing in it is more than data: each is a dtype, a kind of storage, or one of these few."""
    functions = {name for name in NAMES if name not in STORAGES and name not in TORCH_DTYPES}
    assert functions == {
        "collections.OrderedDict",
        *(f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
        *("torch.Size", "torch.device", "_codecs.encode", "numpy.dtype"),
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    }
    for name in STORAGES:
        module, _, last = name.rpartition(".")
        assert isinstance(getattr(torch.storage if module == "torch.storage" else torch, last), type)
    for name in TORCH_DTYPES:
        assert isinstance(getattr(torch, name.removeprefix("torch.")), torch.dtype)


def test_what_is_refused_with_a_word(tmp_path: Path) -> None:
    cases = {
        "sparse tensor": torch.eye(3).to_sparse(),
        "without values": torch.empty(2, device="meta"),
        "complex128": torch.ones(2, dtype=torch.complex128),
        "whole module": torch.nn.ModuleDict(),
        "numpy array": numpy.ones(2),
    }
    for word, value in cases.items():
        torch.save({"a": value}, tmp_path / "x")
        with pytest.raises(FormatError, match=rf"asks for [\w.]+ \(.*{word}.*\), which is not read; .*plain tensors"):
            read_pickle(tmp_path / "x")
    (tmp_path / "x").write_bytes(torch_zip({"a": Called("torch._utils._rebuild_qtensor", ())}))
    with pytest.raises(FormatError, match=r"_rebuild_qtensor \(a quantised tensor\), which is not read"):
        read_pickle(tmp_path / "x")


def test_conjugated_views_and_hooks_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "x")
    with pytest.raises(FormatError, match="a: has hooks or flags"):
        read_pickle(tmp_path / "x")
    for hooks in (Called("collections.OrderedDict", ([["a", 1]],)), 1, Kept(("storage", Name("x"), "0", "cpu", 1))):
        (tmp_path / "x").write_bytes(torch_zip({"a": tensor(hooks=hooks)}))
        with pytest.raises(FormatError, match=r"hooks or flags|asks for"):
            read_pickle(tmp_path / "x")
    parameter = Called("torch._utils._rebuild_parameter", (tensor(), True, EMPTY))
    (tmp_path / "x").write_bytes(torch_zip({"a": parameter}))
    check(read_pickle(tmp_path / "x").tensors, {"a": torch.arange(6.0).reshape(2, 3)})
    assert bytes(read_pickle(tmp_path / "x").tensors["a"].read()) == SIX
