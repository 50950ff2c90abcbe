"""Whether a file is a pickle, by its bytes: asked of every file, so that the machine is loaded only for one that is."""

from __future__ import annotations

import os
import re

from loratool.files.kinds import MAX_HEADER
from loratool.files.safetensors import OpenFile

MAGIC = b"PK\x03\x04"
"""How a zip file begins."""

_HEAD = 4096
_TAIL = 1 << 16
_MARKS = (b"/data.pkl", b"/.format_version", b"/.data/")
# Pickles before protocol 2 have no magic number: they begin with a name, a mark, an empty dict or list, or the number
# with which PyTorch begins.
_OLD = re.compile(
    rb"\(*[ci][\w.]+\r?\n[\w.]+\r?\n[(pq)}X]|[(]([dl]p?\d*\n|[dlt])|[\]}](q.|p\d+\n)|L\d+L\n\.", re.DOTALL
)


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether the file's first bytes (a zip's last ones, too) are those of a PyTorch file or another pickle.

    Raises FormatError for what is no regular file or cannot be opened.
    """
    file = OpenFile(os.fspath(path))
    head = file.pread(min(file.size, _HEAD), 0)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return False  # safetensors
    if head.startswith(MAGIC):
        size = min(file.size, _TAIL)
        return any(mark in part for part in (head, file.pread(size, file.size - size)) for mark in _MARKS)
    return (head[:1] == b"\x80" and head[1:2] in b"\1\2\3\4\5" and len(head) > 1) or _OLD.match(head) is not None
