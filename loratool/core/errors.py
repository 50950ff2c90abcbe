"""Errors that a user is meant to read: one line each, with the file, the key and what to do next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

_LONGEST_KEY = 200
_Error = TypeVar("_Error", bound="LoratoolError")


class LoratoolError(Exception):
    """Something the user can act on, told in one line.

    `message` says what was found and what was expected, `key` which key of the file it is about, `hint`
    what to do next. Raise it where it is known, without the file; the boundary that opened the file adds
    it once with `with_file`. `exit_code` is the exit status of a command that ends with it.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, file: str | None = None, key: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.key = key
        self.hint = hint

    def with_file(self: _Error, path: str | os.PathLike[str]) -> _Error:
        """Names the file, unless one is named already, and returns the error itself."""
        if self.file is None:
            self.file = os.fspath(path)
        return self

    def __str__(self) -> str:
        key = None if self.key is None else _shortened(self.key)
        line = ": ".join(part for part in (self.file, key, self.message) if part)
        return _one_line(f"{line}; {self.hint}" if self.hint else line)


class FormatError(LoratoolError):
    """The file is not what it should be."""


class NotExact(LoratoolError):
    """The asked rows cut a structure (a Kronecker block, say), so that no exact answer exists."""


class NotRepresentable(LoratoolError):
    """The target layout cannot express the content; `modules` names what it cannot express."""

    def __init__(
        self,
        message: str,
        *,
        modules: tuple[str, ...] = (),
        file: str | None = None,
        key: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, file=file, key=key, hint=hint)
        self.modules = modules


class UnknownModel(LoratoolError):
    """No architecture fits the keys, or several fit equally well."""


class UsageError(LoratoolError):
    """The command or call itself makes no sense."""

    exit_code = 2


def few(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _shortened(key: str) -> str:
    return key if len(key) <= _LONGEST_KEY else key[:_LONGEST_KEY] + "..."


def _one_line(text: str) -> str:
    # Keys and messages quote hostile files: a line break or a terminal escape in them must not reach the terminal.
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
