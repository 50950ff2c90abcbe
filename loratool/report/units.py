"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def size(count: int) -> str:
    """Bytes in B, KiB, MiB or GiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count} B"


def count(number: int) -> str:
    """A number of parameters, as 1.2 M."""
    for unit, power in (("G", 9), ("M", 6), ("k", 3)):
        if number >= 10**power:
            return f"{number / 10**power:.1f} {unit}"
    return str(number)


def plural(number: int, word: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def histogram(values: Mapping[Any, int], most: int = 4) -> str:
    """A compact histogram: the value alone if there is one, else `8 ×192, 4 ×72, +3 more`."""
    if len(values) == 1:
        return str(next(iter(values)))
    shown = ", ".join(f"{value} ×{n}" for value, n in list(values.items())[:most])
    return shown + (f", +{len(values) - most} more" if len(values) > most else "")
