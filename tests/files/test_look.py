"""Looking at a file as it is: what can be used of it, and what stands at a path."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from loratool.core.adapter import Bundle
from loratool.core.tensor import LazyTensor
from loratool.files.look import look, special
from tests.hostile.bytes import file, packed, tensor


def test_a_sound_file(tmp_path: Path) -> None:
    raw = file({"a": tensor("F16", (2, 3)), "b": tensor("F32", (1,))}, {"k": "v"})
    (tmp_path / "x").write_bytes(raw)
    found = look(str(tmp_path / "x"))
    assert found.sound and found.usable and found.kind is None and not found.cut
    assert raw[found.begin :] == b"".join(bytes(one.read()) for one in found.tensors.values())
    assert found.metadata == {"k": "v"}


def test_what_is_no_safetensors_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGUF" + bytes(40))
    found = look(str(tmp_path / "x"))
    assert found.kind is not None and found.kind.id == "gguf"
    assert not found.sound and not found.usable
    assert found.metadata == {} and found.tensors == {}


def test_a_header_that_is_cut_says_by_how_much(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(packed(b'{"a":', length=105))
    found = look(str(tmp_path / "x"))
    assert (found.length, found.cut) == (105, 100)
    assert not found.sound and not found.usable and found.tensors == {}


def test_of_a_file_that_is_cut_the_tensors_remain_whose_data_are_there(tmp_path: Path) -> None:
    raw = file({"a": tensor("F16", (4,)), "b": tensor("F16", (4,)), "c": tensor("F16", (4,))})
    (tmp_path / "x").write_bytes(raw[:-9])
    found = look(str(tmp_path / "x"))
    assert not found.sound and found.usable
    assert list(found.tensors) == ["a"]
    assert bytes(found.tensors["a"].read()) == tensor("F16", (4,))[2]


def test_what_a_pytorch_file_holds_is_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04 archive/data.pkl")
    bare = look(str(tmp_path / "x"))
    assert bare.kind is not None and bare.kind.id == "torch-zip" and not bare.usable
    held = {"a": LazyTensor.scalar(1.0, "F32")}
    found = replace(bare, unpickled=Bundle(held, {"step": "3"}, {}, bare.path, 10))
    assert found.sound and found.usable
    assert found.tensors == held and found.metadata == {"step": "3"}


def test_what_stands_at_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    os.mkfifo("pipe")
    Path("file").write_bytes(b"")
    Path("link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
        told = {name: special(name) for name in ("pipe", "link", "socket", "/dev/null", "file", ".", "none", "a\0b")}
    assert told == {
        "pipe": "a pipe",
        "link": "a pipe",
        "socket": "a socket",
        "/dev/null": "a device",
        "file": None,
        ".": None,
        "none": None,
        "a\0b": None,
    }
