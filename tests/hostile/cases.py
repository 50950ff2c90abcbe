"""Hostile and odd files, one a line: what it is called, how it is made, what `validate` must find, what `info` must say.

`found` are codes of which every one must be told, "" for files with nothing wrong. `says` are words of `info`'s error;
"" where it must read the file, None where it may do either.
"""

# ruff: noqa: E501

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.files.safetensors import EMPTY_SHA256
from tests.hostile.bytes import (
    FORMS,
    PARTS,
    UNET,
    Tensor,
    a_gzip,
    a_pickle,
    a_tar,
    a_zip,
    alphas,
    dotted,
    file,
    flipped,
    hashed,
    lora,
    packed,
    pair,
    tensor,
    with_bits,
)

NAME = "style.safetensors"


@dataclass(frozen=True)
class Case:
    """One place to be looked at; `make` gives the file's bytes, or makes what is at the path."""

    name: str
    make: Callable[[], bytes] | Callable[[Path], None]
    found: str
    says: str | None = None
    place: bool = False

    def put(self, path: Path) -> Path:
        """Makes it at `path`."""
        if self.place:
            self.make(path)  # type: ignore[call-arg]
        else:
            path.write_bytes(self.make())  # type: ignore[call-arg, arg-type]
        return path


def one(entry: Any = None, **fields: Any) -> bytes:
    """A file with one tensor of four bytes, whose entry is given or changed."""
    usual = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}
    return packed({"a": usual if entry is None else entry}, bytes(4))


def raw(text: str, data: bytes = b"") -> bytes:
    """A file with this header."""
    return packed(text.encode(), data)


def long(text: str) -> str:
    return text.replace("...", "x" * 300)


E = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
F = '"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'
rng = random.Random(6)

CONTAINER = [
    Case("clean lora", lambda: file(lora()), "", ""),
    Case("one byte", lambda: b"x", "too-short", "1 bytes"),
    Case("seven bytes", lambda: b"\x10\0\0\0\0\0\0", "too-short", "7 bytes"),
    Case("length 0", lambda: bytes(8) + b"{}", "header-length", "empty header"),
    Case("length 100 MB + 1", lambda: packed(b"{}", length=100_000_001), "header-length", "at most 100000000"),
    Case("length 2^31", lambda: packed(b"{}", length=1 << 31), "header-length", "announce a header"),
    Case("length 2^32", lambda: packed(b"{}", length=1 << 32), "header-length", "announce a header"),
    Case("length 2^63", lambda: packed(b"{}", length=1 << 63), "header-length", "announce a header"),
    Case("length 2^64 - 1", lambda: packed(b"{}", length=(1 << 64) - 1), "header-length", "announce a header"),
    Case("length -8", lambda: packed(b"{}", length=(1 << 64) - 8), "header-length", "announce a header"),
    Case("length past the end", lambda: packed(b"{}", length=100), "header-cut", "truncated inside the header"),
    Case("length 100 MB of nothing", lambda: packed(b"{}", length=100_000_000), "header-cut", "truncated inside"),
    Case("length one too long", lambda: packed(b"{}", length=3), "header-cut", "truncated inside the header"),
    Case("length one too short", lambda: packed(b'{"a":1}', length=6), "not-json", "not valid JSON"),
    Case("header only a brace", lambda: packed(b"{"), "not-json", "not valid JSON"),
    Case("blank first", lambda: packed(b" {}"), "header-start", "begins with ' '"),
    Case("newline first", lambda: packed(b"\n{}"), "header-start", "begins with"),
    Case("a list", lambda: packed(b"[]"), "header-start", "begins with '['"),
    Case("a text", lambda: packed(b'"{}"'), "header-start", "begins with"),
    Case("null", lambda: packed(b"null"), "header-start", "begins with"),
    Case("BOM", lambda: packed(b"\xef\xbb\xbf{}"), "bom", "byte order mark"),
    Case("UTF-16", lambda: packed("{}".encode("utf-16-le")), "nul-byte", "not valid JSON"),
    Case("UTF-16 with BOM", lambda: packed("{}".encode("utf-16")), "header-start", "begins with"),
    Case("not UTF-8 in a key", lambda: packed(b'{"\xff":1}'), "not-utf8", "not UTF-8"),
    Case("not UTF-8 in metadata", lambda: packed(b'{"__metadata__":{"a":"\xc3"}}'), "not-utf8", "not UTF-8"),
    Case("overlong UTF-8", lambda: packed(b'{"\xc0\xaf":1}'), "not-utf8", "not UTF-8"),
    Case("UTF-8 surrogate", lambda: packed(b'{"\xed\xa0\x80":1}'), "not-utf8", "not UTF-8"),
    Case("not UTF-8 outside", lambda: packed(b'{"a":\xff}'), "not-utf8", "not UTF-8"),
    Case("NUL padding", lambda: packed(b"{}\0\0\0\0\0\0"), "nul-byte", "not valid JSON"),
    Case("NUL inside", lambda: packed(b'{"a"\0:1}'), "nul-byte", "not valid JSON"),
    Case("NUL in a key", lambda: packed(b'{"a\0b":1}'), "nul-byte", "not valid JSON"),
    Case("NUL escaped in a key", lambda: raw('{"a\\u0000b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "hidden-characters is-embedding"),
    Case("newline in a key", lambda: packed(b'{"a\nb":1}'), "not-json", "not valid JSON"),
    Case("half a surrogate", lambda: raw('{"__metadata__":{"a":"\\ud800"}}'), "not-json", "surrogate"),
    Case("bad escape", lambda: raw('{"a\\x41":1}'), "not-json", "not valid JSON"),
    Case("no end of text", lambda: raw('{"a'), "not-json", "not valid JSON"),
    Case("single quotes", lambda: raw("{'a':1}"), "not-json", "not valid JSON"),
    Case("comment", lambda: raw("{/* hi */}"), "not-json", "not valid JSON"),
    Case("trailing comma", lambda: raw(f"{{{E},}}", bytes(4)), "not-json", "not valid JSON"),
    Case("no comma", lambda: raw(f"{{{E}{F}}}", bytes(8)), "not-json", "not valid JSON"),
    Case("no colon", lambda: raw('{"a" 1}'), "not-json", "not valid JSON"),
    Case("text behind", lambda: raw("{} x"), "not-json", "not valid JSON"),
    Case("two objects", lambda: raw("{}{}"), "not-json", "not valid JSON"),
    Case("NaN", lambda: raw('{"a":NaN}'), "not-json", "NaN"),
    Case("-Infinity", lambda: raw('{"a":-Infinity}'), "not-json", "Infinity"),
    Case("leading zero", lambda: raw('{"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}', b"x"), "not-json", "not valid"),
    Case("plus sign", lambda: raw('{"a":+1}'), "not-json", "not valid JSON"),
    Case("deep list", lambda: raw('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "too-deep", "nested too deeply"),
    Case("deep object", lambda: raw('{"a":' * 50_000 + "1" + "}" * 50_000), "too-deep", "nested too deeply"),
    Case("deep in metadata", lambda: raw('{"__metadata__":' + "[" * 9999 + "}"), "too-deep", "nested too deeply"),
    Case("30,000 values", lambda: raw('{"a":[' + "0," * 30_000 + "0]}"), "too-many-values", "more than 20000 values"),
    Case("a shape of 30,000", lambda: one(shape=[1] * 30_000), "too-many-values", "more than 20000 values"),
    Case("huge number", lambda: one(shape=[10**400]), "huge-number bad-shape", "shape"),
    Case("2^64 as size", lambda: one(shape=[1 << 64]), "huge-number bad-shape", "shape"),
    Case("2^64 as offset", lambda: one(data_offsets=[0, 1 << 64]), "huge-number bad-offsets", "data_offsets"),
    Case("10,000 digits", lambda: raw('{"a":' + "9" * 10_000 + "}"), "huge-number bad-entry", "expected dtype"),
    Case("one key twice", lambda: raw(f"{{{E},{E}}}", bytes(4)), "duplicate-key", "a: stands twice"),
    Case("one key twice, other data", lambda: raw(f"{{{E},{E.replace('0,4', '4,8')}}}", bytes(8)), "duplicate-key", "twice"),
    Case("one key twice, escaped", lambda: raw(f"{{{E},{F.replace('b', chr(92) + 'u0061', 1)}}}", bytes(8)), "duplicate-key", "twice"),
    Case("metadata twice", lambda: raw('{"__metadata__":{},"__metadata__":{}}'), "duplicate-key", "twice"),
    Case("metadata entry twice", lambda: raw('{"__metadata__":{"k":"1","k":"2"}}'), "duplicate-field", "k: stands twice"),
    Case("dtype twice", lambda: raw(E.join("{}").replace('"dtype"', '"dtype":"F16","dtype"'), bytes(4)), "duplicate-field", "twice"),
    Case("offsets twice", lambda: raw(E.join("{}").replace(',"data', ',"data_offsets":[0,4],"data'), bytes(4)), "duplicate-field", "twice"),
    Case("unknown field", lambda: one(extra=1), "unknown-field", "extra"),
    Case("no dtype", lambda: one({"shape": [1], "data_offsets": [0, 4]}), "bad-entry", "expected dtype"),
    Case("no shape", lambda: one({"dtype": "F32", "data_offsets": [0, 4]}), "bad-entry", "expected dtype"),
    Case("no offsets", lambda: one({"dtype": "F32", "shape": [1]}), "bad-entry", "expected dtype"),
    Case("entry a number", lambda: one(3), "bad-entry", "a: has 3"),
    Case("entry null", lambda: raw('{"a":null}'), "bad-entry", "a: has null"),
    Case("entry a list", lambda: one(["F32", [1], [0, 4]]), "bad-entry", "expected dtype"),
    Case("entry a text", lambda: one("F32"), "bad-entry", "expected dtype"),
    Case("dtype unknown", lambda: one(dtype="F128"), "bad-dtype", "dtype 'F128'"),
    Case("dtype lower case", lambda: one(dtype="f32"), "bad-dtype", "dtype 'f32'"),
    Case("dtype of torch", lambda: one(dtype="torch.float32"), "bad-dtype", "dtype"),
    Case("dtype a number", lambda: one(dtype=32), "bad-dtype", "dtype 32"),
    Case("dtype null", lambda: one(dtype=None), "bad-dtype", "dtype null"),
    Case("dtype an object", lambda: one(dtype={"F32": None}), "bad-dtype", "dtype"),
    Case("size a fraction", lambda: one(shape=[1.0]), "bad-shape", "shape [1.0]"),
    Case("size with exponent", lambda: raw('{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', b"x"), "bad-shape", "1e0"),
    Case("size true", lambda: one(shape=[True]), "bad-shape", "shape [true]"),
    Case("size a text", lambda: one(shape=["1"]), "bad-shape", "shape"),
    Case("size null", lambda: one(shape=[None]), "bad-shape", "shape [null]"),
    Case("size a list", lambda: one(shape=[[1]]), "bad-shape", "shape [[1]]"),
    Case("size negative", lambda: one(shape=[-1]), "bad-shape", "shape [-1]"),
    Case("two negative sizes", lambda: one(shape=[-1, -1]), "bad-shape", "shape"),
    Case("size minus zero", lambda: raw('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "bad-shape", "shape [-0]"),
    Case("shape a number", lambda: one(shape=1), "bad-shape", "shape 1"),
    Case("shape null", lambda: one(shape=None), "bad-shape", "shape null"),
    Case("overflow to 0", lambda: one(shape=[1 << 32, 1 << 32]), "shape-overflow", "64 bits"),
    Case("overflow to 4 bytes", lambda: one(shape=[(1 << 62) + 1, 4]), "shape-overflow", "64 bits"),
    Case("overflow times 0", lambda: one(shape=[1 << 63, 2, 0], data_offsets=[0, 0]), "shape-overflow", "64 bits"),
    Case("offsets reversed", lambda: one(data_offsets=[4, 0]), "bad-offsets", "expected [begin, end]"),
    Case("offsets negative", lambda: one(data_offsets=[-4, 0]), "bad-offsets", "data_offsets"),
    Case("offsets a fraction", lambda: one(data_offsets=[0, 4.0]), "bad-offsets", "data_offsets"),
    Case("offsets true", lambda: one(data_offsets=[False, True]), "bad-offsets", "data_offsets"),
    Case("one offset", lambda: one(data_offsets=[4]), "bad-offsets", "data_offsets"),
    Case("three offsets", lambda: one(data_offsets=[0, 4, 4]), "bad-offsets", "data_offsets"),
    Case("offsets an object", lambda: one(data_offsets={"0": 4}), "bad-offsets", "data_offsets"),
    Case("one byte too few", lambda: one(data_offsets=[0, 3]), "size-mismatch", "expected 4"),
    Case("half a byte", lambda: packed({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)), "size-mismatch", "whole bytes"),
    Case("scalar of 8 bytes", lambda: one(shape=[], data_offsets=[0, 8]), "size-mismatch", "expected 4"),
    Case("hole first", lambda: packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), "hole", "expected 0"),
    Case("hole between", lambda: raw(f"{{{E},{F.replace('4,8', '8,12')}}}", bytes(12)), "hole", "unused bytes"),
    Case("overlap", lambda: raw(f"{{{E},{F.replace('4,8', '2,6')}}}", bytes(6)), "overlap", "overlaps"),
    Case("two on one place", lambda: raw(f"{{{E},{F.replace('4,8', '0,4')}}}", bytes(4)), "overlap", "overlaps"),
    Case("data cut by one", lambda: file(lora())[:-1], "truncated", "is truncated"),
    Case("data cut in half", lambda: file(lora())[:10_000], "truncated", "is truncated"),
    Case("no data", lambda: packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "truncated", "truncated"),
    Case("offsets far away", lambda: packed({"a": {"dtype": "U8", "shape": [1 << 50], "data_offsets": [0, 1 << 50]}}), "truncated", "truncated"),
    Case("one byte behind", lambda: file(lora()) + b"x", "trailing-bytes", "1 bytes follow"),
    Case("a zip behind", lambda: file(lora()) + a_zip("evil.py"), "trailing-bytes", "follow the last tensor"),
    Case("a page behind", lambda: file(lora()) + b"<html></html>", "trailing-bytes", "follow the last tensor"),
    Case("twice in one", lambda: file(lora()) * 2, "trailing-bytes", "follow the last tensor"),
    Case("data without tensors", lambda: packed(b"{}", bytes(100)), "trailing-bytes", "100 bytes follow"),
    Case("metadata a list", lambda: raw('{"__metadata__":[]}'), "metadata-not-text", "not a JSON object"),
    Case("metadata a text", lambda: raw('{"__metadata__":"x"}'), "metadata-not-text", "not a JSON object"),
    Case("metadata with a number", lambda: raw('{"__metadata__":{"steps":3}}'), "metadata-not-text", "expected text"),
    Case("metadata with null", lambda: raw('{"__metadata__":{"a":null}}'), "metadata-not-text", "expected text"),
    Case("metadata with an object", lambda: raw('{"__metadata__":{"a":{"b":"c"}}}'), "metadata-not-text", "expected text"),
    Case("metadata as a tensor", lambda: raw(E.replace('"a"', '"__metadata__"').join("{}"), bytes(4)), "metadata-not-text", "expected text"),
    Case("data misaligned", lambda: raw("{" + E + "}", bytes(4)), "misaligned is-embedding"),
    Case("tensors misaligned", lambda: packed({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}, bytes(5)), "misaligned no-adapter"),
    Case("unsorted", lambda: packed({"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)), "unsorted no-adapter"),
    Case("pretty header", lambda: raw("{\n  " + E.replace(":", " : ").replace(",", " ,\n ") + "\r\n\t}", bytes(4)), "is-embedding"),
    Case("zero tail", lambda: zero_tail(), "zero-tail", ""),
    Case("1,500 faults", lambda: packed({f"k{i}": 0 for i in range(1500)}), "bad-entry", "expected dtype"),
]  # fmt: skip


def zero_tail() -> bytes:
    """A file whose end was never downloaded."""
    whole = file(lora(rank=16))
    return whole[:-10_001] + bytes(10_001)


def lfs() -> bytes:
    """What git clones without git-lfs."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 151112296\n"


ONNX = b"\x08\x07\x12\x07pytorch\x1a\x051.9.0:\xff\x01"
UUID = bytes(range(0x80, 0x90)) * 16

IDENTITY = [
    Case("empty", lambda: b"", "is-empty", "it is empty"),
    Case("git-lfs pointer", lfs, "is-git-lfs", "git lfs pull"),
    Case("html", lambda: b"<!DOCTYPE html><html></html>", "is-html", "web page"),
    Case("html after blanks", lambda: b"\r\n\r\n  <html>", "is-html", "web page"),
    Case("html with BOM", lambda: b"\xef\xbb\xbf<!doctype html>", "is-html", "web page"),
    Case("xml error", lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is-html", "web page"),
    Case("json error", lambda: b'{"error":"Repository not found"}', "is-json-error", "error message of a server"),
    Case("json message", lambda: b'{\n "statusCode": 401, "message": "no"}', "is-json-error", "error message"),
    Case("json config", lambda: b'{"peft_type": "LORA", "r": 8}', "is-json", "JSON text"),
    Case("json list", lambda: b"[1, 2, 3, 4, 5]", "is-json", "JSON text"),
    Case("gzip", a_gzip, "is-gzip", "gzip"),
    Case("bzip2", lambda: b"BZh91AY&SY" + bytes(20), "is-bzip2", "bzip2"),
    Case("xz", lambda: b"\xfd7zXZ\0" + bytes(20), "is-xz", "xz archive"),
    Case("zstd", lambda: b"\x28\xb5\x2f\xfd" + bytes(20), "is-zstd", "zstd"),
    Case("zip", lambda: a_zip("style.safetensors"), "is-zip", "zip archive"),
    Case("empty zip", lambda: b"PK\x05\x06" + bytes(18), "is-zip", "zip archive"),
    Case("rar", lambda: b"Rar!\x1a\x07\x01\0" + bytes(20), "is-rar", "RAR"),
    Case("7z", lambda: b"7z\xbc\xaf\x27\x1c" + bytes(20), "is-7z", "7z"),
    Case("tar", lambda: a_tar("style.safetensors"), "is-tar", "tar archive"),
    Case("png", lambda: b"\x89PNG\r\n\x1a\n" + bytes(20), "is-png", "PNG"),
    Case("jpeg", lambda: b"\xff\xd8\xff\xe0" + bytes(20), "is-jpeg", "JPEG"),
    Case("gif", lambda: b"GIF89a" + bytes(20), "is-gif", "GIF"),
    Case("webp", lambda: b"RIFF\x10\0\0\0WEBPVP8 ", "is-webp", "WebP"),
    Case("mp4", lambda: b"\0\0\0\x18ftypmp42" + bytes(20), "is-mp4", "video"),
    Case("pdf", lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is-pdf", "PDF"),
    Case("gguf", lambda: b"GGUF\x03\0\0\0" + bytes(20), "is-gguf", "GGUF"),
    Case("onnx", lambda: ONNX + bytes(30), "is-onnx", "ONNX"),
    Case("hdf5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(20), "is-hdf5", "HDF5"),
    Case("numpy", lambda: b"\x93NUMPY\x01\0v\0{'descr': '<f4'", "is-numpy", "NumPy"),
    Case("sqlite", lambda: b"SQLite format 3\0" + bytes(20), "is-sqlite", "SQLite"),
    Case("elf", lambda: b"\x7fELF\x02\x01\x01" + bytes(20), "is-program", "a program"),
    Case("exe", lambda: b"MZ\x90\0\x03" + bytes(60), "is-program", "program"),
    Case("torch zip", lambda: a_zip("archive/data.pkl", a_pickle(2)), "is-torch-zip pickle-refused", None),
    Case("pickle 2", lambda: a_pickle(2), "is-pickle pickle-refused", None),
    Case("pickle 4", lambda: a_pickle(4), "is-pickle pickle-refused", None),
    Case("pickle 5", lambda: a_pickle(5), "is-pickle pickle-refused", None),
    Case("pickle 0", lambda: a_pickle(0), "is-pickle pickle-refused", None),
    Case("pickle that calls", lambda: b"cos\nsystem\n(S'touch /tmp/owned'\ntR.", "is-pickle pickle-refused", "os.system"),
    Case("text", lambda: b"These are not the weights you are looking for.\n", "is-text", "plain text"),
    Case("text UTF-16", lambda: "some words".encode("utf-16"), "is-text", "plain text"),
    Case("text with umlauts", lambda: "Grüße und Küsse, für immer".encode() * 200, "is-text", "plain text"),
    Case("zeros", lambda: bytes(5000), "is-zeros", "zero bytes"),
    Case("random", lambda: UUID, "is-unknown", "is not a safetensors file"),
    Case("random 8 kB", lambda: b"\xfe" + random.Random(1).randbytes(8191), "is-unknown", "is not a safetensors file"),
]  # fmt: skip


def names(model: str, *keys: str, shape: tuple[int, ...] = (4, 4)) -> bytes:
    """A file of small tensors of these names."""
    return file({key: tensor("F16", shape) for key in keys})


def twice(stem: str) -> dict[str, Tensor]:
    """The clean file, and one of its modules in another spelling."""
    found = lora()
    found[f"{stem}.lora_A.weight"] = tensor("F16", (4, 320))
    found[f"{stem}.lora_B.weight"] = tensor("F16", (320, 4))
    return found


def lokr(**changed: Any) -> dict[str, Tensor]:
    """LoKr modules; None leaves a part of the first one out."""
    found: dict[str, Tensor] = {}
    for part in PARTS:
        shapes = {"w1": (8, 8), "w2_a": (40, 4), "w2_b": (4, 40)}
        shapes |= changed if part == "q" else {}
        found |= {f"{UNET}{part}.lokr_{role}": tensor("F16", s) for role, s in shapes.items() if s is not None}
        found[f"{UNET}{part}.alpha"] = tensor("F16", (), 4.0)
    return found


def loha(**changed: Any) -> dict[str, Tensor]:
    """LoHa modules; None leaves a part of the first one out."""
    found: dict[str, Tensor] = {}
    for part in PARTS:
        shapes = {"w1_a": (320, 4), "w1_b": (4, 320), "w2_a": (320, 4), "w2_b": (4, 320)}
        shapes |= changed if part == "q" else {}
        found |= {f"{UNET}{part}.hada_{role}": tensor("F16", s) for role, s in shapes.items() if s is not None}
        found[f"{UNET}{part}.alpha"] = tensor("F16", (), 4.0)
    return found


def dora(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A DoRA whose first magnitude has this shape."""
    found = lora()
    for part in PARTS:
        found[f"{UNET}{part}.dora_scale"] = tensor("F16", shape if part == "q" else (320, 1), 1.0)
    return found


def all_of(**parts: Any) -> dict[str, Tensor]:
    """Every module of these sizes."""
    found: dict[str, Tensor] = {}
    for part in PARTS:
        found |= pair(UNET + part, **parts)
    return found


TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
CHECKPOINT = [f"model.diffusion_model.input_blocks.{i}.1.transformer_blocks.0.attn1.to_{p}.weight" for i in (1, 2, 4) for p in "qkv"]  # fmt: skip

ADAPTER = [
    Case("no tensors", lambda: packed(b"{}      "), "no-tensors", "holds no tensor"),
    Case("only metadata", lambda: file({}, {"a": "b"}), "no-tensors", "holds no tensor"),
    Case("checkpoint", lambda: names("", *CHECKPOINT), "is-checkpoint", "checkpoint"),
    Case("vae", lambda: names("", "decoder.conv_in.weight", "encoder.conv_in.weight", "decoder.mid.bias"), "is-vae", "VAE"),
    Case("embedding", lambda: names("", "emb_params", shape=(2, 768)), "is-embedding", "textual inversion"),
    Case("embedding of SDXL", lambda: file({"clip_l": tensor("F16", (2, 768)), "clip_g": tensor("F16", (2, 1280))}), "is-embedding", "textual inversion"),
    Case("some tensors", lambda: names("", "x", "y.z", "foo.bar"), "no-adapter", "no key of an adapter"),
    Case("no up", lambda: file(lora(up=None)), "missing-half", "half of the module is missing"),
    Case("no down", lambda: file(lora(down=None)), "missing-half", "half of the module is missing"),
    Case("only an alpha", lambda: file(lora(up=None, down=None)), "no-factors", None),
    Case("ranks differ", lambda: file(lora(up=tensor("F16", (320, 8)))), "rank-mismatch", "ranks differ"),
    Case("up transposed", lambda: file(lora(up=tensor("F16", (4, 320)))), "transposed", "ranks differ"),
    Case("down transposed", lambda: file(lora(down=tensor("F16", (320, 4)))), "transposed", "ranks differ"),
    Case("up and down swapped", lambda: file(lora(up=tensor("F16", (4, 320)), down=tensor("F16", (320, 4)))), "transposed", ""),
    Case("rank 0", lambda: file(lora(up=tensor("F16", (320, 0)), down=tensor("F16", (0, 320)))), "rank-zero", "expected a matrix"),
    Case("all of rank 0", lambda: file(all_of(rank=0)), "rank-zero", "expected a matrix"),
    Case("no rows", lambda: file(lora(up=tensor("F16", (0, 4)))), "rank-zero", "expected a matrix"),
    Case("up a vector", lambda: file(lora(up=tensor("F16", (320,)))), "broken-module", "expected a matrix"),
    Case("down a scalar", lambda: file(lora(down=tensor("F16", ()))), "broken-module", "expected a matrix"),
    Case("up with a kernel", lambda: file(lora(up=tensor("F16", (320, 4, 3, 3)))), "broken-module", "kernel of 1x1"),
    Case("two kinds in one", lambda: file({**lora(), f"{UNET}q.lokr_w1": tensor("F16", (8, 8))}), "two-families", "two families"),
    Case("spelled twice", lambda: file(twice(UNET + "q")), "spelled-twice", "spelled twice"),
    Case("spelled twice, dotted", lambda: file({**lora(), **{f"{UNET}q_lora.{k}.weight": tensor("F16", s) for k, s in (("up", (320, 4)), ("down", (4, 320)))}}), "spelled-twice"),
    Case("magnitude of no size", lambda: file(dora((7, 1))), "bad-magnitude", "DoRA magnitude"),
    Case("magnitude a scalar", lambda: file(dora(())), "bad-magnitude", "DoRA magnitude"),
    Case("clean DoRA", lambda: file(dora((320, 1))), "", ""),
    Case("clean DoRA by column", lambda: file(dora((1, 320))), "", ""),
    Case("magnitude alone", lambda: file({**lora(up=None, down=None), f"{UNET}q.dora_scale": tensor("F16", (320, 1))}), "no-factors", None),
    Case("alpha a vector", lambda: file(lora(alpha=tensor("F16", (4,)))), "alpha-no-number", "expected one number"),
    Case("alpha empty", lambda: file(lora(alpha=tensor("F16", (0,)))), "alpha-no-number", "expected one number"),
    Case("alpha complex", lambda: file(lora(alpha=("C64", (), bytes(8)))), "alpha-no-number", "real number"),
    Case("alpha NaN", lambda: file(lora(alpha=("F16", (), b"\0\x7e"))), "alpha-not-finite", ""),
    Case("alpha Inf", lambda: file(lora(alpha=("F16", (), b"\0\x7c"))), "alpha-not-finite", ""),
    Case("alpha -Inf", lambda: file(lora(alpha=("F32", (), struct.pack("<f", float("-inf"))))), "alpha-not-finite", ""),
    Case("alpha NaN in bf16", lambda: file(lora(alpha=("BF16", (), b"\xc0\x7f"))), "alpha-not-finite", ""),
    Case("alpha NaN in fp8", lambda: file(lora(alpha=("F8_E4M3", (), b"\x7f"))), "alpha-not-finite", ""),
    Case("alpha 0", lambda: file(lora(alpha=tensor("F16", (), 0.0))), "alpha-zero", ""),
    Case("alpha negative", lambda: file(lora(alpha=tensor("F16", (), -4.0))), "alpha-negative", ""),
    Case("alpha 60000", lambda: file(lora(alpha=tensor("F16", (), 60000.0))), "alpha-absurd", ""),
    Case("alpha 1e-30", lambda: file(lora(alpha=tensor("F32", (), 1e-30))), "alpha-absurd", ""),
    Case("alpha 1e300", lambda: file(lora(alpha=tensor("F64", (), 1e300))), "alpha-absurd", ""),
    Case("alpha an integer", lambda: file(lora(alpha=tensor("I64", (), 4))), "", ""),
    Case("alpha of shape [1]", lambda: file(lora(alpha=tensor("F16", (1,), 4.0))), "", ""),
    Case("alpha missing", lambda: file(lora(alpha=None)), "alpha-missing", ""),
    Case("no alphas", lambda: file({k: t for k, t in lora().items() if "alpha" not in k}), "", ""),
    Case("dtypes mixed in a module", lambda: file(lora(up=tensor("F32", (320, 4)))), "mixed-dtypes", ""),
    Case("dtypes mixed between modules", lambda: file({**lora(), **pair(UNET + "q", dtype="BF16")}), "mixed-dtypes", ""),
    Case("layouts mixed", lambda: file({**lora(), "unet.mid_block.attentions.0.proj_in.lora_A.weight": tensor("F16", (4, 1280)), "unet.mid_block.attentions.0.proj_in.lora_B.weight": tensor("F16", (1280, 4))}), "mixed-layouts", ""),
    Case("unknown module", lambda: file({**lora(), **pair("lora_unet_secret_block_7_evil")}), "unknown-module", ""),
    Case("unread key", lambda: file({**lora(), f"{UNET}q.lora_sideways": tensor("F16", (4, 4))}), "unread-key", ""),
    Case("path as a key", lambda: file({**lora(), "../../etc/passwd": tensor("F16", (4, 4))}), "unread-key", ""),
    Case("attribute as a key", lambda: file({**lora(), "__class__.__init__.__globals__": tensor("F16", (4, 4))}), "unread-key", ""),
    Case("markup as a key", lambda: file({**lora(), "[bold red]x[/bold red].weird": tensor("F16", (4, 4))}), "unread-key", ""),
    Case("ANSI as a key", lambda: file({**lora(), "\x1b[31mred\x1b[0m.weird": tensor("F16", (4, 4))}), "hidden-characters", ""),
    Case("bidi as a key", lambda: file({**lora(), "abc\u202efed.weird": tensor("F16", (4, 4))}), "hidden-characters", ""),
    Case("zero width as a key", lambda: file({**lora(), f"{UNET}\u200bq.alpha": tensor("F16", (), 4.0)}), "hidden-characters", ""),
    Case("a key of 100 kB", lambda: file({**lora(), "x" * 100_000 + ".weird": tensor("F16", (4, 4))}), "unread-key", ""),
    Case("an empty key", lambda: file({**lora(), "": tensor("F16", (4, 4))}), "unread-key", ""),
    Case("kind without a reader", lambda: file({**lora(), f"{UNET}q.oft_blocks": tensor("F16", (4, 4, 4))}), "two-families"),
    Case("no model", lambda: file({k.replace("attn1_to", "alien_to").replace("down_blocks", "galaxies"): t for k, t in lora().items()}), "unknown-model", ""),
    Case("one of another size", lambda: file(lora(up=tensor("F16", (640, 4)))), "other-shape", ""),
    Case("one of another input", lambda: file(lora(down=tensor("F16", (4, 768)))), "other-shape", ""),
    Case("all of another size", lambda: file(all_of(shape=(64, 64))), "other-width", ""),
    Case("SDXL in the metadata", lambda: file({**lora(), **pair(TEXT, (768, 768))}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}), "metadata-mismatch", ""),
    Case("Flux in the metadata", lambda: file({**lora(), **pair(TEXT, (768, 768))}, {"ss_base_model_version": "flux1"}), "metadata-mismatch", ""),
    Case("clean LoKr", lambda: file(lokr()), "", ""),
    Case("LoKr without w1", lambda: file(lokr(w1=None)), "missing-half", "part of the module is missing"),
    Case("LoKr without w2_b", lambda: file(lokr(w2_b=None)), "missing-half", "part of the module is missing"),
    Case("LoKr of ranks that differ", lambda: file(lokr(w2_b=(8, 40))), "rank-mismatch", "ranks differ"),
    Case("LoKr whole and in parts", lambda: file(lokr(w2=(40, 40))), "broken-module", "whole and as a product"),
    Case("LoKr of vectors", lambda: file(lokr(w1=(8,))), "broken-module", "no matrix"),
    Case("LoHa without w2_b", lambda: file(loha(w2_b=None)), "missing-half"),
    Case("LoHa of ranks that differ", lambda: file(loha(w1_b=(8, 320))), "rank-mismatch"),
    Case("LoHa of rank 0", lambda: file(loha(w1_a=(320, 0), w1_b=(0, 320), w2_a=(320, 0), w2_b=(0, 320))), "rank-zero"),
    Case("LoHa of halves that differ", lambda: file(loha(w1_a=(640, 4))), "broken-module"),
    Case("alphas of 1", lambda: file(alphas(1.0), {"ss_network_dim": "4", "ss_network_alpha": "2"}), "alpha-became-one", ""),
    Case("the scale in alpha twice", lambda: file(alphas(0.25), {"ss_network_dim": "4", "ss_network_alpha": "1"}), "scale-twice", ""),
    Case("an alpha that bf16 rounds", lambda: file(alphas(100.5, "BF16"), {"ss_network_alpha": "100.3", "ss_network_dim": "4"}), "alpha-rounded", ""),
    Case("diluted", lambda: file(alphas(2.0), {"ss_network_dim": "2", "ss_network_alpha": "2", "modelspec.merged_from": "a, b"}), "diluted-concat", ""),
    Case("merged", lambda: file(lora(), {"ss_network_dim": "4", "ss_network_alpha": "4", "modelspec.merged_from": "a, b"}), "merged-factors", ""),
    Case("the hash of nothing", lambda: file(lora(), {"sshs_model_hash": EMPTY_SHA256}), "hash-of-nothing", ""),
    Case("another rank in the header", lambda: file(lora(), {"ss_network_dim": "32"}), "wrong-dim", ""),
    Case("another alpha in the header", lambda: file(lora(), {"ss_network_alpha": "32"}), "wrong-alpha", ""),
    Case("two scales", lambda: file(dotted(), {"lora_adapter_metadata": "{}"}), "two-scales", None),
    Case("20 MB of metadata", lambda: file(lora(), {"ss_tag_frequency": "tag " * 5_300_000}), "metadata-large", ""),
    Case("200,000 entries of metadata", lambda: file(lora(), {f"k{i}": "v" for i in range(200_000)}), "metadata-large", ""),
    Case("ANSI in the metadata", lambda: file(lora(), {"ss_output_name": "\x1b]0;owned\x07\x1b[2J", "modelspec.title": "\u202egnp.exe"}), "", ""),
    Case("deep JSON in the metadata", lambda: file(lora(), {"ss_tag_frequency": "[" * 100_000, "software": '{"a":' * 9999}), "", ""),
    Case("odd tags", lambda: file(lora(), {"ss_tag_frequency": '{"a": {"b": "c", "d": 1e999, "e": true}, "f": [1]}'}), "", ""),
    Case("a date far away", lambda: file(lora(), {"ss_training_started_at": "1e300"}), "", ""),
]  # fmt: skip

BITS = {
    "F64 NaN": ("F64", struct.pack("<d", float("nan"))),
    "F64 Inf": ("F64", struct.pack("<d", float("inf"))),
    "F32 NaN": ("F32", struct.pack("<f", float("nan"))),
    "F32 -NaN": ("F32", b"\x01\x00\x80\xff"),
    "F32 Inf": ("F32", struct.pack("<f", float("inf"))),
    "F32 -Inf": ("F32", struct.pack("<f", float("-inf"))),
    "F16 NaN": ("F16", b"\x01\x7c"),
    "F16 -NaN": ("F16", b"\xff\xff"),
    "F16 Inf": ("F16", b"\x00\x7c"),
    "F16 -Inf": ("F16", b"\x00\xfc"),
    "BF16 NaN": ("BF16", b"\xc0\x7f"),
    "BF16 -NaN": ("BF16", b"\x81\xff"),
    "BF16 Inf": ("BF16", b"\x80\x7f"),
    "F8_E4M3 NaN": ("F8_E4M3", b"\x7f"),
    "F8_E4M3 -NaN": ("F8_E4M3", b"\xff"),
    "F8_E5M2 NaN": ("F8_E5M2", b"\x7e"),
    "F8_E5M2 Inf": ("F8_E5M2", b"\x7c"),
    "F8_E5M2 -Inf": ("F8_E5M2", b"\xfc"),
}
"""One number that is none, in each dtype."""


def odd(dtype: str, bits: bytes, factor: str) -> bytes:
    """A file with one such number."""
    return file(with_bits(lora(dtype), f"{UNET}k.lora_{factor}.weight", bits))


def large(dtype: str, value: float, part: str = "up") -> bytes:
    """A file with one large number."""
    bits = struct.pack("<f", value)[2:] if dtype == "BF16" else struct.pack(f"<{FORMS[dtype]}", value)
    return file(with_bits(lora(dtype), f"{UNET}k.lora_{part}.weight", bits))


NUMBERS = [
    *(Case(f"{name} in {factor}", lambda d=dtype, b=bits, f=factor: odd(d, b, f), "not-finite", "") for name, (dtype, bits) in BITS.items() for factor in ("up", "down")),
    *(Case(f"clean {dtype}", lambda d=dtype: file(lora(d)), "", "") for dtype in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")),
    Case("NaN in a magnitude", lambda: file({**dora((320, 1)), f"{UNET}v.dora_scale": ("F16", (320, 1), b"\0\x7e" * 320)}), "not-finite", ""),
    Case("NaN in an extra", lambda: file({**lora(), "other.weird": ("F16", (1,), b"\0\x7e")}), "not-finite unread-key", ""),
    Case("all NaN", lambda: file({k: (d, s, b"\xff" * len(r)) for k, (d, s, r) in lora().items() if "alpha" not in k}), "not-finite", ""),
    Case("NaN in LoKr", lambda: file(with_bits(lokr(), f"{UNET}q.lokr_w2_a", b"\0\x7e")), "not-finite", ""),
    Case("F32 beyond fp16", lambda: large("F32", 70_000.0), "fp16-factor", ""),
    Case("BF16 beyond fp16", lambda: large("BF16", 1e30), "fp16-factor", ""),
    Case("F64 beyond fp16", lambda: large("F64", -1e200), "fp16-factor", ""),
    Case("F32 within fp16", lambda: large("F32", 65_500.0), "", ""),
    Case("F16 update beyond fp16", lambda: file({**lora(), **pair(UNET + "q", alpha=60_000.0), f"{UNET}q.lora_up.weight": tensor("F16", (320, 4), 1000.0)}), "fp16-update", ""),
    Case("up zero", lambda: file(lora(up=tensor("F16", (320, 4), 0.0))), "zero-module", ""),
    Case("down zero", lambda: file(lora(down=tensor("F16", (4, 320), 0.0))), "zero-module", ""),
    Case("all up zero", lambda: file({k: (d, s, bytes(len(r)) if "up" in k else r) for k, (d, s, r) in lora().items()}), "zero-adapter", ""),
    Case("all zero", lambda: file({k: (d, s, bytes(len(r)) if "lora" in k.rpartition("to_")[2] else r) for k, (d, s, r) in lora().items()}), "zero-adapter", ""),
    Case("clean with a hash", lambda: hashed(lora()), "", ""),
    Case("clean with modelspec's hash", lambda: hashed(lora(), "modelspec.hash_sha256", "0x"), "", ""),
    Case("a bit flipped", lambda: flipped(hashed(lora())), "hash-mismatch", ""),
    Case("a bit flipped, modelspec", lambda: flipped(hashed(lora(), "modelspec.hash_sha256", "0x")), "hash-mismatch", ""),
    Case("a hash that is none", lambda: file(lora(), {"sshs_model_hash": "x" * 64}), "hash-mismatch", ""),
    Case("the hash's name only", lambda: file(lora(), {"sshs_model_hash": ""}), "", ""),
]  # fmt: skip

FILES = [*CONTAINER, *IDENTITY, *ADAPTER, *NUMBERS]
