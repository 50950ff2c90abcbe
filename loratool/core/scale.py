"""Scale: a module's scale put into its factors, for layouts that have no place of their own for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from loratool.core.errors import NotExact
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor, same_bytes, scaled

_WIDE = ("F64", "F32")
_HALVES = (("up", "embedding_B"), ("down", "embedding_A"))
"""Which factor takes a scale: the outer one, or the inner one where the outer would lose values."""


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


def at_scale(module: Module, scale: float, inner: bool | None = None) -> Module:
    """A LoRA module with the same update at another scale: one factor takes the difference. Itself if it has it.

    `inner` says which factor; without it, it is the outer one, unless that would lose values. NotExact where `stuck`
    says why, and where a value leaves the range of its dtype: narrow factors are read for that.
    """
    reason = stuck(module, scale)
    if reason is not None:
        raise NotExact(reason, key=module.title, hint=TAKE_SCALE)
    if module.scale == scale:
        return module
    gain = module.scale / scale
    halves = _HALVES if inner is None else _HALVES[int(inner) :][:1]
    factors = next((made for half in halves if (made := _times(module, half, gain)) is not None), None)
    if factors is None:
        message = f"{module.dtype} cannot hold the values of either factor times {gain:g}"
        raise NotExact(message, key=module.title, hint=TAKE_SCALE)
    plain = replace(module, factors={**module.factors, **factors}, alpha=None)
    return plain if scale == 1.0 else replace(plain, alpha=module.family.alpha(plain.shapes, scale))


def all_at_scale(modules: Sequence[Module], scale: Callable[[Module], float]) -> tuple[Module, ...]:
    """LoRA modules at the scale of each. The same factor takes it in all of them, if that can be: parts of one weight
    then still share what they shared. Raises what `at_scale` does."""
    for inner in (False, True):
        with suppress(NotExact):
            return tuple(at_scale(module, scale(module), inner) for module in modules)
    return tuple(at_scale(module, scale(module)) for module in modules)


def inner_took(before: Module, after: Module) -> bool:
    """Whether `at_scale` made `after`, or the module that it is a part of, by changing the inner factor."""
    ours, theirs = (next((m.factors[role] for role in _HALVES[1] if role in m.factors), None) for m in (before, after))
    return ours is not None and theirs is not None and ours is not theirs and not same_bytes(ours, theirs)


def _times(module: Module, half: tuple[str, ...], gain: float) -> dict[str, LazyTensor] | None:
    """One half of a pair, and the bias, times `gain`; None where a value would be lost."""
    roles = [role for role in (*half, "bias") if role in module.factors]
    made = {role: scaled(module.factors[role], gain) for role in roles}
    for role, factor in made.items():
        if factor.dtype not in _WIDE and not same_bytes(scaled(factor, 1 / gain), module.factors[role]):
            return None
    return made
