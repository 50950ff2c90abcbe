"""Network: what sd-scripts' header says of a network's rank and alpha, against what its modules have."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loratool.core.adapter import Adapter
from loratool.core.layout import ALPHA
from loratool.core.module import Module

DIM, ALPHA_ENTRY = "ss_network_dim", "ss_network_alpha"


def expected_alpha(code: str, metadata: Mapping[str, str], module: Module) -> float:
    """The alpha that a module should have, where a finding of that code is about its file."""
    if code == "diluted-concat":
        return alpha_of(module) * module.rank / (number(metadata.get(DIM)) or module.rank)
    stated = number(metadata.get(ALPHA_ENTRY))
    return float(module.rank) if stated is None else stated


def main_modules(adapter: Adapter) -> list[Module]:
    """The modules that `ss_network_dim` and `ss_network_alpha` are about: convolutions have their own."""
    with_alpha = [module for module in adapter.modules if ALPHA in module.keys and has_rank(module)]
    linear = [module for module in with_alpha if not any(size > 1 for size in module.shape[2:])]
    return linear or with_alpha


def has_rank(module: Module) -> bool:
    """Whether the rank is that of the update: LoKr's is that of a part of it, the header's what was asked for."""
    product = module.product
    return product is not None and product.whole


def number(text: str | None) -> float | None:
    """A number in a header; None for anything else ("Dynamic", "None")."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def alpha_of(module: Module) -> float:
    """The alpha; the rank where there is none: the same scale."""
    return float(module.rank if module.alpha is None else module.alpha)
