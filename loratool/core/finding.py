"""Finding: one thing that is wrong, or worth a word, in a file. And Check: what finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
"""The worst first. An error: programs refuse the file, or do with it what nobody meant."""


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding: `id` for programs, a severity, what it means in one sentence, and what to do."""

    id: str
    severity: str
    title: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One case of a code. `file` is a path, `key` a key of the file, `byte` counts from the file's beginning."""

    code: str
    severity: str
    message: str
    file: str = ""
    key: str | None = None
    byte: int | None = None
    hint: str = ""


@dataclass(frozen=True, eq=False)
class Check:
    """A group of findings. `subject` says what `run` is given: a `file`, the `content` of one, or a `folder`."""

    id: str
    title: str
    subject: str
    codes: Mapping[str, Code]
    run: Callable[[Any], Iterable[Finding]]

    def finding(
        self,
        code: str,
        message: str,
        file: str = "",
        *,
        key: str | None = None,
        byte: int | None = None,
        hint: str | None = None,
        severity: str | None = None,
    ) -> Finding:
        """A finding of one of the check's codes, with the code's severity and hint where none are given."""
        kind = self.codes[code]
        return Finding(code, severity or kind.severity, message, file, key, byte, kind.hint if hint is None else hint)


def codes(*listed: Code) -> dict[str, Code]:
    """Codes by id. Raises ValueError for one that is listed twice."""
    found = {code.id: code for code in listed}
    if len(found) != len(listed):
        raise ValueError("a code is listed twice")
    return found
