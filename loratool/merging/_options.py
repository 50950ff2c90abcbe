"""Checks of option values: what a method refuses, told with the range that it expects."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from loratool.core.errors import UsageError


def check_share(name: str, value: float) -> None:
    """UsageError unless a value is in 0..1."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is {value}, expected a number from 0 to 1")


def check_number(name: str, value: float, least: float = -math.inf, most: float = math.inf) -> None:
    """UsageError unless a value is finite and from `least` to `most`."""
    # Not isfinite: it fails for whole numbers that no float can hold.
    if not (least <= value <= most and abs(value) <= sys.float_info.max):
        low = "" if least == -math.inf else f" from {least:g}"
        high = f" to {most:g}" if most < math.inf else " up" if low else ""
        raise UsageError(f"{name} is {value}, expected a number{low}{high}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """UsageError unless a value is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, expected {' or '.join(choices)}")
