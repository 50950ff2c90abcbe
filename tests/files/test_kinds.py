"""What a file is by its first bytes."""

from __future__ import annotations

import io
import tarfile

import pytest

from loratool.files.kinds import HEAD, MAX_HEADER, kind_of


def a_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("lora.safetensors"), io.BytesIO())
    return buffer.getvalue()


def announced(length: int, begins: bytes) -> bytes:
    return length.to_bytes(8, "little") + begins


KINDS = [
    ("tar", a_tar()),
    ("mp4", b"\0\0\0\x1cftypavif" + bytes(16)),
    ("onnx", b"\x08\x07\x12\x07pytorch\x1a\x052.0.1"),
    ("onnx", b"\x08\x08\x12.onnx.quantize" + bytes(10)),
    ("onnx", b"\x08\x09:\x80\x01main_graph"),
    ("text", "Wörter".encode("utf-16")),
    ("text", b"a" * (HEAD - 1) + "é".encode()[:1]),  # cut inside a letter
    ("bom", announced(40, b'\xef\xbb\xbf{"a":1}') + bytes(40)),
    ("header-start", announced(100, b'x"a":1}')),
    ("header-start", announced(100, b"\xff\xfe\xfd\xfc")),
    ("header-start", announced(2, b"")),
    ("header-start", announced(4, b"\xff\xff\xff\xff\xff\xff")),
    ("header-length", announced(0, b"{}")),
    ("header-length", announced(MAX_HEADER + 1, b"{}")),
    ("unknown", announced(MAX_HEADER + 1, b"\xff\xff")),
    ("unknown", b"\xff" * HEAD),  # no text in the middle either
    ("unknown", b"a" * (HEAD - 10) + b"\xff" * 10),
    ("text", b"(this is no pickle)"),
    ("pickle", b"(dS'a'\nI1\ns."),
    ("pickle", b"(lp0\n."),
    ("pickle", b"cposix\nsystem\n(S'ls'\ntR."),
    ("pickle", b"\x80\x01}q\x00."),
    ("zip", b"PK\x03\x04" + bytes(30)),
    ("torch-zip", b"PK\x03\x04" + bytes(26) + b"archive/data.pkl"),
    ("too-short", b"\x01\x02\x03"),
    ("too-short", b"abc"),
]


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_kind(kind: str, head: bytes) -> None:
    found = kind_of(head[:HEAD], len(head))
    assert found is not None and found.id == kind
    assert found.what.startswith("it") and found.hint


@pytest.mark.parametrize(
    "head",
    [
        announced(2, b"{}"),
        announced(MAX_HEADER, b"{"),
        # Lengths whose bytes are those of a gzip, of ONNX, of a Windows program.
        b"\x1f\x8b\0\0\0\0\0\0{",
        b"\x08\x07\x12\0\0\0\0\0{",
        b"MZ\0\0\0\0\0\0{",
    ],
)
def test_what_begins_like_safetensors_is_nothing_else(head: bytes) -> None:
    assert kind_of(head, 1000) is None


def test_what_a_header_begins_with_is_told() -> None:
    """Escaped, since it comes from the file."""
    found = kind_of(announced(100, b"\x1b[31m"), 13)
    assert found is not None and r"begins with '\x1b', expected '{'" in found.what
    found = kind_of(announced(100, b""), 8)
    assert found is not None and "begins with the end of the file" in found.what
