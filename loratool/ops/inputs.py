"""Inputs: adapters with the strengths at which they are merged or baked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture
from loratool.core.errors import LoratoolError
from loratool.ops.blocks import BlockWeights, block_weights
from loratool.ops.open import open_adapter, open_detected


@dataclass(frozen=True)
class Asked:
    """One input as it was asked for: a path, its strength, and what block weights it has (see `block_weights`).

    `name` is what the header calls it (the file's name, if None).
    """

    path: str
    weight: float = 1.0
    blocks: str | Mapping[str, Any] | None = None
    name: str | None = None

    @property
    def blocks_told(self) -> str | None:
        """The block weights in words: as they were given, or `text_encoder* 0.5, others 0.8` of plain data."""
        if self.blocks is None or isinstance(self.blocks, str):
            return self.blocks
        entries = [f"{pattern} {weight:g}" for pattern, weight in self.blocks["entries"]]
        return ", ".join([*entries, f"others {self.blocks['rest']:g}"])


@dataclass(frozen=True, eq=False)
class Input:
    """One adapter that was opened, its strength, and weights for its blocks."""

    adapter: Adapter
    weight: float = 1.0
    blocks: BlockWeights | None = None


def opened_together(asked: Sequence[Asked], architecture: Architecture | str | None = None) -> list[Input]:
    """The inputs that were asked for, all for one size of their model where that can be (see `of_one_size`).

    What may be for several models is for the one that the others are for, if that is among them.
    """
    found = [open_detected(one.path, architecture=architecture) for one in asked]
    models = {one.adapter.architecture.id for one in found if not one.adapter.architecture.open}
    adapters = []
    for one, look in zip(asked, found, strict=True):
        shared = models.intersection(look.detection.tie)
        adapters.append(open_adapter(one.path, architecture=shared.pop()) if len(shared) == 1 else look.adapter)
    return of_one_size([weighed(one, adapter) for one, adapter in zip(asked, adapters, strict=True)])


def weighed(asked: Asked, adapter: Adapter) -> Input:
    """An adapter with the strength and block weights that were asked for. Raises UsageError for weights that its model
    has no blocks for."""
    if asked.blocks is None:
        return Input(adapter, asked.weight)
    try:
        if isinstance(asked.blocks, str):
            blocks = block_weights(asked.blocks, adapter.architecture, adapter.modules)
        else:
            blocks = BlockWeights.from_data(asked.blocks, adapter.architecture)
    except LoratoolError as error:
        raise error.with_file(asked.path) from error.__cause__
    return Input(adapter, asked.weight, blocks)


def of_one_size(inputs: Sequence[Input]) -> list[Input]:
    """The inputs, all for the one size of their model that holds every target of theirs; as they are if none does.

    Sizes have most names in common, and many also the shapes: what only touches those is for any of them.
    """
    sizes = dict.fromkeys(one.adapter.architecture for one in inputs)
    if len(sizes) > 1 and len({size.id for size in sizes}) == 1:
        targets = {target for one in inputs for module in one.adapter.modules for target in module.targets}
        for size in sizes:
            if targets <= size.targets:
                return [replace(one, adapter=replace(one.adapter, architecture=size)) for one in inputs]
    return list(inputs)


def same_size(one: Architecture, other: Architecture) -> bool:
    """Whether adapters for these have the same targets; a model without a table has those of any other of its id."""
    return one.id == other.id and (one.title == other.title or one.open or other.open)
