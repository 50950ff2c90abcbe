"""What a file is that is not safetensors, by its first bytes, and what to do about it."""

from __future__ import annotations

import re
from typing import NamedTuple

from loratool.files.header import DAMAGED, DOWNLOAD, LENGTH

MAX_HEADER = 100_000_000
"""Bytes of a header at most: the format's limit."""

HEAD = 4096
"""So many first bytes tell what a file is."""

TAIL = 1 << 16
"""And so many last ones what a zip archive holds."""

ZIP = b"PK\x03\x04"
"""How a zip archive with something in it begins."""

PICKLE_HINT = "rewrite it once: loratool convert FILE -o FILE.safetensors"

_RESAVE = "resave it as safetensors"
_UNPACK = "unpack it first"
_PREVIEW = "pick the LoRA file, not its preview"
_OTHER = "pick the LoRA file"
_PAGE = "the download link gave a page (a login or an error?): fetch the file itself"


class Kind(NamedTuple):
    """What a file is: `id` for programs, `what` for people."""

    id: str
    what: str
    hint: str


LFS = Kind("git-lfs", "it is a git-lfs pointer, not the file it stands for", "run `git lfs pull` or download it")
TORCH_ZIP = Kind("torch-zip", "it is a PyTorch file (a zip with a pickle in it)", PICKLE_HINT)
PICKLE = Kind("pickle", "it is a pickle (an old PyTorch file)", PICKLE_HINT)
TEXT = Kind("text", "it is plain text", _OTHER)

PICKLED = (PICKLE, TORCH_ZIP)
"""What is read as pickles."""

_MAGIC = (
    (b"version https://git-lfs", LFS),
    (b"GGUF", Kind("gguf", "it is a GGUF model", "use the safetensors version of the file")),
    (b"\x1f\x8b", Kind("gzip", "it is a gzip archive", _UNPACK)),
    (b"BZh", Kind("bzip2", "it is a bzip2 archive", _UNPACK)),
    (b"\xfd7zXZ\0", Kind("xz", "it is an xz archive", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", Kind("zstd", "it is a zstd archive", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Kind("7z", "it is a 7z archive", _UNPACK)),
    (b"Rar!", Kind("rar", "it is a RAR archive", _UNPACK)),
    (b"\x89PNG", Kind("png", "it is a PNG image", _PREVIEW)),
    (b"\xff\xd8\xff", Kind("jpeg", "it is a JPEG image", _PREVIEW)),
    (b"GIF8", Kind("gif", "it is a GIF image", _PREVIEW)),
    (b"RIFF", Kind("webp", "it is a WebP image or other RIFF file", _PREVIEW)),
    (b"%PDF", Kind("pdf", "it is a PDF document", _OTHER)),
    (b"\x93NUMPY", Kind("numpy", "it is a NumPy array", _RESAVE)),
    (b"\x89HDF\r\n", Kind("hdf5", "it is an HDF5 file", _RESAVE)),
    (b"SQLite format 3\0", Kind("sqlite", "it is an SQLite database", _OTHER)),
    (b"\x7fELF", Kind("program", "it is a program", "do not run it: it is no LoRA")),
    (b"MZ", Kind("program", "it is a Windows program", "do not run it: it is no LoRA")),
)
_TORCH_PARTS = (b"/data.pkl", b"/.format_version", b"/.data/")
_ONNX = re.compile(rb"\x08[\x01-\x20](?:\x12.[\x20-\x7e]{2}|[\x1a-\x3a].)", re.DOTALL)
_PICKLED = re.compile(rb"\x80[\x01-\x05]")
# Pickles before protocol 2 have no magic number: they begin with a name, with a mark and what it becomes, with an empty
# dict or list, or with the number with which PyTorch begins. A text may begin with "(the": hence what follows.
_OLD_PICKLE = re.compile(
    rb"""\(*[ci][\w.]+\r?\n[\w.]+\r?\n[(pq)}X]
    | \([dlt](p\d*\n | q. | \. | [FIL]-?\d | S['"] | [(\]})\x80-\xff])
    | [\]}](q. | p\d+\n)
    | L\d+L\n\.""",
    re.DOTALL | re.VERBOSE,
)
_ERROR = re.compile(rb'[{,\[]\s*"(?:error|errors|message|detail|status|statuscode)"\s*:', re.IGNORECASE)


def kind_of(head: bytes, size: int, tail: bytes = b"") -> Kind | None:
    """What a file of `size` bytes is by its first HEAD bytes; None if it begins like safetensors.

    `tail`: its last TAIL bytes, if it begins with ZIP.
    """
    length = int.from_bytes(head[:LENGTH], "little")
    if size >= LENGTH and 0 < length <= MAX_HEADER and head[LENGTH : LENGTH + 1] == b"{":
        return None
    if not size:
        return Kind("empty", "it is empty", DOWNLOAD)
    return _binary(head, tail) or _textual(head) or _header(head, size, length) or _unknown(head, size, length)


def _binary(head: bytes, tail: bytes) -> Kind | None:
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head.startswith((ZIP, b"PK\x05\x06")):
        torch = any(mark in part for mark in _TORCH_PARTS for part in (head, tail))
        return TORCH_ZIP if torch else Kind("zip", "it is a zip archive", _UNPACK)
    if head[257:262] == b"ustar":
        return Kind("tar", "it is a tar archive", _UNPACK)
    if _PICKLED.match(head) or _OLD_PICKLE.match(head):
        return PICKLE
    if head[4:8] == b"ftyp":
        return Kind("mp4", "it is a video or an AVIF image", _PREVIEW)
    if _ONNX.match(head) and (b"pytorch" in head or b"onnx" in head or b"ir_version" in head or b"\x3a" in head[:64]):
        return Kind("onnx", "it is an ONNX model", "use the safetensors version of the file")
    if not head.strip(b"\0"):
        return Kind("zeros", "it begins with nothing but zero bytes", DOWNLOAD)
    return None


def _textual(head: bytes) -> Kind | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<svg")):
        return Kind("html", "it is a web page", _PAGE)
    if text[:1] in (b"{", b"["):
        if _ERROR.search(text[:1024]):
            return Kind("json-error", "it is JSON text, an error message of a server", _PAGE)
        return Kind("json", "it is JSON text", "name the .safetensors file, not its configuration")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return TEXT
    try:
        plain = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < HEAD - 3 or len(head) < HEAD:
            return None
        plain = head[: error.start].decode("utf-8")
    # Eight bytes and more that are all text: a length of such bytes would be beyond 10^18.
    return TEXT if len(head) >= LENGTH and all(c.isprintable() or c in "\t\r\n" for c in plain) else None


def _header(head: bytes, size: int, length: int) -> Kind | None:
    """Files that were meant to be safetensors: a length, and then nothing that is a header."""
    begins = head[LENGTH : LENGTH + 4]
    if size < LENGTH or length > MAX_HEADER or not length:
        return None
    if begins[:3] == b"\xef\xbb\xbf":
        return Kind("bom", "its header begins with a byte order mark, expected '{'", DAMAGED)
    if begins[:1] in (b" ", b"\t", b"\r", b"\n", b"[", b'"', b"\0", b"") or length < size:
        found = ascii(begins[:1].decode("latin-1")) if begins else "the end of the file"
        return Kind("header-start", f"its header begins with {found}, expected '{{'", DAMAGED)
    return None


def _unknown(head: bytes, size: int, length: int) -> Kind:
    if size < LENGTH:
        return Kind("too-short", f"it has {size} bytes, expected at least {LENGTH}", DOWNLOAD)
    if not length:
        return Kind("header-length", "its first 8 bytes announce an empty header", DAMAGED)
    if length > MAX_HEADER:
        what = f"its first 8 bytes announce a header of {length} bytes, expected at most {MAX_HEADER}"
        # With a header behind it, it is a safetensors file whose length lies; else it is anything.
        lies = head[LENGTH : LENGTH + 1] == b"{"
        return Kind("header-length" if lies else "unknown", what, DAMAGED)
    found = ascii(head[LENGTH : LENGTH + 1].decode("latin-1"))
    return Kind("header-start", f"its header begins with {found}, expected '{{'", DAMAGED)
