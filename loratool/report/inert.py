"""Inert text: what comes from a file is data. Nothing in it moves the cursor, colours the terminal or is markup."""

from __future__ import annotations

import unicodedata

_DANGEROUS = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that are escaped: controls (ANSI), formats (bidi, zero width), line separators, surrogates."""


def inert(text: str, limit: int | None = None) -> str:
    """`text` with every control, bidi and unassigned character escaped; past `limit`, how many were left out."""
    cut = text if limit is None else text[:limit]
    left = len(text) - len(cut)
    if not cut.isprintable():
        cut = "".join(_escaped(c) if unicodedata.category(c) in _DANGEROUS else c for c in cut)
    return f"{cut}... (+{left} characters)" if left else cut


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
