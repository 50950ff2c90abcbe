"""Inputs: adapters with the strengths at which they are merged or baked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.core.adapter import Adapter
from loratool.ops.blocks import BlockWeights


@dataclass(frozen=True)
class Asked:
    """One input as it was asked for: a path, its strength, and what block weights it has (see `block_weights`).

    `name` is what the header calls it (the file's name, if None).
    """

    path: str
    weight: float = 1.0
    blocks: str | Mapping[str, Any] | None = None
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Input:
    """One adapter that was opened, its strength, and weights for its blocks."""

    adapter: Adapter
    weight: float = 1.0
    blocks: BlockWeights | None = None
