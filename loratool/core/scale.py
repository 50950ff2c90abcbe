"""Scale: a module's scale put into its factors, for layouts that have no place of their own for it."""

from __future__ import annotations

import math
from dataclasses import replace

from loratool.core.errors import NotExact
from loratool.core.module import Module
from loratool.core.tensor import same_bytes, scaled

_WIDE = ("F64", "F32")
_OUTER = ("up", "embedding_B", "bias")

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
    """A LoRA module with the same update at another scale: its outer factor takes the difference. Itself if it has it.

    NotExact where `stuck` says why, and where a value leaves the range of its dtype: narrow factors are read for that.
    """
    reason = stuck(module, scale)
    if reason is not None:
        raise NotExact(reason, key=module.title, hint=TAKE_SCALE)
    if module.scale == scale:
        return module
    gain = module.scale / scale
    outer = {role: scaled(factor, gain) for role, factor in module.factors.items() if role in _OUTER}
    for role, factor in outer.items():
        if factor.dtype not in _WIDE and not same_bytes(scaled(factor, 1 / gain), module.factors[role]):
            raise NotExact(f"{factor.dtype} cannot hold its values times {gain:g}", key=module.title, hint=TAKE_SCALE)
    plain = replace(module, factors={**module.factors, **outer}, alpha=None)
    return plain if scale == 1.0 else replace(plain, alpha=module.family.alpha(plain.shapes, scale))
