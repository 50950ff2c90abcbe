"""Transformers that diffusers renames: one walk through the model names every weight twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from loratool.core.naming import Naming
from loratool.core.target import Target

Shape = tuple[int, ...]

Row = tuple[str, tuple[tuple[str, Shape], ...]]
"""(original name, its parts in row order: (diffusers path, shape))."""

SCALE_FIRST: Mapping[str, int] = {"scale": 0, "shift": 1}
"""diffusers stacks scale on shift in its last modulation, the original models shift on scale."""


def one(name: str, path: str, *shape: int) -> Row:
    """A weight that is one in both spellings."""
    return name, ((path, shape),)


def fused(name: str, paths: Iterable[str], *shape: int) -> Row:
    """A weight that is several in diffusers, all of one shape."""
    return name, tuple((path, shape) for path in paths)


def shift_and_scale(name: str, path: str, width: int, size: int) -> Row:
    """The last modulation, whose halves diffusers swaps."""
    return name, ((f"{path}:shift", (width, size)), (f"{path}:scale", (width, size)))


def two_namings(rows: Iterable[Row], component: str = "transformer") -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`, of the original model."""
    diffusers: dict[str, tuple[Target, ...]] = {}
    native: dict[str, tuple[Target, ...]] = {}
    for name, parts in rows:
        native[name] = targets = tuple([Target(component, path, shape) for path, shape in parts])
        for target in targets:
            if ":" in target.path:
                path = target.module_path
                diffusers[path] = _ordered((*diffusers.get(path, ()), target))
            else:
                diffusers[target.path] = (target,)
    return {"diffusers": Naming(diffusers), "native": Naming(native)}


def respelled(naming: Naming, rename: Callable[[str], str], tensor_key: Callable[[str], str] | None = None) -> Naming:
    """The same targets under other names; `tensor_key` gives the checkpoint keys, where they are not plain weights."""
    table = {rename(name): targets for name, targets in naming.items()}
    return Naming(table, {name: tensor_key(name) for name in table} if tensor_key else None)


def _ordered(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    return tuple(sorted(targets, key=lambda target: SCALE_FIRST.get(target.path.rpartition(":")[2], 0)))
