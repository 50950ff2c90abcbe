"""Zeros at the end of the data: what a download that broke off leaves in a file that was made in full size first."""

from __future__ import annotations

from loratool.files.look import File

LEAST = 4096
"""A block of a disk: fewer zeros are none that a download leaves."""

_STEP = 1 << 20
_FARTHEST = 64 << 20
"""Zeros beyond are not counted."""


def zero_tail(file: File) -> tuple[int, str] | None:
    """Where zeros begin that go on to the end of the file, and in which tensor; None if they are few, or begin with
    one: a factor of zeros is a module that was not trained."""
    assert file.scan is not None
    begin, end = file.begin, file.handle.size
    position = end
    while position > max(begin, end - _FARTHEST):
        size = min(_STEP, position - begin)
        piece = file.handle.pread(size, position - size)
        held = len(piece.rstrip(b"\0"))
        position -= size - held
        if held:
            break
    if end - position < LEAST or position <= begin:
        return None
    inside = position - begin
    for key, entry in file.scan.entries.items():
        # The last number before may end in zero bytes: a tensor begins within its 8 bytes.
        if entry.start <= inside < entry.stop:
            return None if inside - entry.start < 8 else (position, key)
    return None
