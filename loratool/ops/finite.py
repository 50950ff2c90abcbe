"""Finite: what is computed with must hold no NaN and no infinity."""

from __future__ import annotations

import math
from typing import Any

from loratool.core.errors import FormatError
from loratool.core.module import Module


def check_finite(module: Module, values: Any) -> None:
    """Raises FormatError where an array or tensor of the module (float32 or better) holds NaN or infinite values."""
    # One pass; finite values may add up to infinity, hence the second look.
    if not math.isfinite(float(values.sum())) and not bool((abs(values) < math.inf).all()):
        raise not_finite(module.title)


def not_finite(title: str) -> FormatError:
    """The error of a module with NaN or infinite values."""
    return FormatError("holds NaN or infinite values", key=title, hint="the training went wrong: use an earlier file")
