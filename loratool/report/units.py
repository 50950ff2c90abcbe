"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """A compact histogram: the value alone if there is one, else `8 ×192, 4 ×72, +3 more`; `none` without values."""
    if not values:
        return "none"
    if len(values) == 1:
        return str(next(iter(values)))
    shown = ", ".join(f"{value} ×{n}" for value, n in list(values.items())[:most])
    return shown + (f", +{len(values) - most} more" if len(values) > most else "")


def ranks(values: Mapping[Any, int]) -> str:
    """The histogram in letters that a terminal of any encoding shows: `8 x192, 4 x72`."""
    return histogram(values).replace("×", "x")


def spread(values: Sequence[int]) -> str:
    """`8/32/64`: the least, the median and the most; one number if they are the same."""
    from statistics import median_low  # takes longer to import than all the rest of this

    found = (min(values), median_low(values), max(values))
    return "/".join(map(str, found)) if len(set(found)) > 1 else str(found[0])


def short(error: float) -> str:
    """An error with two digits; 0 is exact."""
    return f"{error:.2g}" if error else "0"


def few(names: Iterable[str], most: int = 3) -> str:
    """The first names and how many more there are."""
    found = list(names)
    return ", ".join(found[:most]) + (f", +{len(found) - most} more" if len(found) > most else "")
