"""Finite: what is computed with must hold no NaN and no infinity."""

from __future__ import annotations

import math
from typing import Any

from loratool.core.errors import FormatError
from loratool.core.module import Module

TRAINED = "the training went wrong: use an earlier file"
STORED = "the checkpoint is broken: use another copy of it"
"""What to do about values that are not finite: of what was trained, and of its base."""


def check_finite(module: Module, values: Any) -> None:
    """Raises FormatError where an array or tensor of the module (float32 or better) holds NaN or infinite values."""
    if not all_finite(values):
        raise not_finite(module.title)


def all_finite(values: Any) -> bool:
    """Whether an array or tensor (float32 or better) holds no NaN and no infinity."""
    # One pass; finite values may add up to infinity, hence the second look.
    return math.isfinite(float(values.sum())) or bool((abs(values) < math.inf).all())


def not_finite(title: str, cure: str = TRAINED) -> FormatError:
    """The error of a module, or of a base's weight, with NaN or infinite values."""
    return FormatError("holds NaN or infinite values", key=title, hint=cure)
