"""The place: a path at which there is nothing to read, or nothing that may be read."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from loratool.core.finding import ERROR, Check, Code, Finding, codes
from loratool.files.look import special
from loratool.files.subjects import Place

_CODES = codes(
    Code("not-found", ERROR, "There is no such file.", "check the path"),
    Code("is-special", ERROR, "A pipe, a device or a socket: it is not opened.", "name a file on disk"),
    Code("link-loop", ERROR, "Links lead in a circle.", "name the file itself"),
    Code("cannot-be-opened", ERROR, "The file cannot be opened or read.", "check its permissions"),
    Code("file-changed", ERROR, "The file became shorter while it was read.", "something else is writing to it"),
    Code(
        "pickle-refused",
        ERROR,
        "A pickle that asks for more than tensors, or is broken: opening it with PyTorch may run code.",
        "delete it, unless you know who made it",
    ),
    Code("no-adapter-here", ERROR, "A folder without an adapter or a checkpoint.", "name a LoRA file or a PEFT folder"),
)


def _run(place: Place) -> Iterator[Finding]:
    message, cause = place.error.message, place.error.__cause__
    path = place.error.file or place.path
    if special(path) is not None:
        code, message = "is-special", f"is {special(path)}, expected a file; it was not opened"
    elif isinstance(cause, OSError) and cause.errno == errno.ELOOP:
        code = "link-loop"
    elif place.pickled:
        code = "pickle-refused"
    elif "became shorter" in message:
        code = "file-changed"
    elif isinstance(cause, OSError) and cause.errno != errno.ENOENT:
        code = "cannot-be-opened"
    elif "no such file" in message or "does not exist" in message:
        code = "not-found"
    else:
        code = "no-adapter-here" if "folder" in message or "holds" in message else "cannot-be-opened"
    yield CHECK.finding(code, message, path, hint=place.error.hint)


CHECK = Check("place", "The place", "place", _CODES, _run)
