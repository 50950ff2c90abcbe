"""What a file really is, where it is no safetensors file."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.core.finding import ERROR, WARNING, Check, Code, Finding, codes
from loratool.files.look import File

IN_CONTAINER = frozenset({"bom", "header-start", "header-length", "too-short"})
"""Kinds that are broken safetensors files: `container` tells of them."""

_CODES = codes(
    Code("is-empty", ERROR, "The file has no bytes."),
    Code("is-git-lfs", ERROR, "The file is a git-lfs pointer."),
    Code("is-html", ERROR, "The file is a web page."),
    Code("is-json", ERROR, "The file is JSON text."),
    Code("is-json-error", ERROR, "The file is a server's error message."),
    Code("is-gzip", ERROR, "The file is a gzip archive."),
    Code("is-bzip2", ERROR, "The file is a bzip2 archive."),
    Code("is-xz", ERROR, "The file is an xz archive."),
    Code("is-zstd", ERROR, "The file is a zstd archive."),
    Code("is-zip", ERROR, "The file is a zip archive."),
    Code("is-7z", ERROR, "The file is a 7z archive."),
    Code("is-rar", ERROR, "The file is a RAR archive."),
    Code("is-tar", ERROR, "The file is a tar archive."),
    Code("is-png", ERROR, "The file is a PNG image."),
    Code("is-jpeg", ERROR, "The file is a JPEG image."),
    Code("is-gif", ERROR, "The file is a GIF image."),
    Code("is-webp", ERROR, "The file is a WebP image or other RIFF file."),
    Code("is-mp4", ERROR, "The file is a video or an AVIF image."),
    Code("is-pdf", ERROR, "The file is a PDF document."),
    Code("is-gguf", ERROR, "The file is a GGUF model."),
    Code("is-onnx", ERROR, "The file is an ONNX model."),
    Code("is-hdf5", ERROR, "The file is an HDF5 file."),
    Code("is-numpy", ERROR, "The file is a NumPy array."),
    Code("is-sqlite", ERROR, "The file is an SQLite database."),
    Code("is-program", ERROR, "The file is a program."),
    Code("is-torch-zip", WARNING, "The file is a PyTorch file: a zip with a pickle in it."),
    Code("is-pickle", WARNING, "The file is a plain pickle."),
    Code("is-text", ERROR, "The file is plain text."),
    Code("is-zeros", ERROR, "The file begins with nothing but zero bytes."),
    Code("is-unknown", ERROR, "The file is nothing that is known."),
)


def _run(file: File) -> Iterator[Finding]:
    if file.kind is not None and file.kind.id not in IN_CONTAINER:
        message = f"is not a safetensors file: {file.kind.what}"
        yield CHECK.finding(f"is-{file.kind.id}", message, file.path, byte=0, hint=file.kind.hint)


CHECK = Check("identity", "What a file really is", "file", _CODES, _run)
