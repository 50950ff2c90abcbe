"""Scale: a module's scale put into its factors, for layouts that have no place of their own for it."""

from __future__ import annotations

import math
from dataclasses import replace

from loratool.core.module import Module

_WIDE = ("F64", "F32")

TAKE_SCALE = "write float32 factors, which can take any scale: --dtype fp32"
"""The way out of what `stuck` says."""


def stuck(module: Module, scale: float) -> str | None:
    """Why a module cannot be written at another scale without rounding it, in words; None if it can.

    Times a power of two nothing is rounded; times anything else each value of a float32 is, by at most 6e-8 of it.
    """
    if module.scale == scale:
        return None
    if not module.scale or not scale or not math.isfinite(module.scale):
        return f"the scale is {module.scale:g}"
    if abs(math.frexp(module.scale / scale)[0]) == 0.5 or module.dtype in _WIDE:
        return None
    return f"the scale {module.scale:g} cannot be put into {module.dtype} factors without rounding them"


def at_scale(module: Module, scale: float) -> Module:
    """The module with the same update at another scale: its factors take the difference. Itself if it has that scale.

    Raises TooLarge where the factors' dtype cannot hold the values.
    """
    if module.scale == scale:
        return module
    factors = module.family.scaled(module.factors, module.scale / scale)
    plain = replace(module, factors=factors, alpha=None)
    return plain if scale == 1.0 else replace(plain, alpha=module.family.alpha(plain.shapes, scale))
