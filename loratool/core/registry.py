"""Registry: finds the plug-ins. A plug-in is one module-level object in a file of its folder."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratool.core.architecture import Architecture
    from loratool.core.family import Family
    from loratool.core.finding import Check
    from loratool.core.layout import Layout
    from loratool.core.method import Method
    from loratool.core.program import Program


def _discover(folder: str, attribute: str) -> dict[str, Any]:
    """id -> the object called `attribute` in every module of `loratool/<folder>` without a leading underscore."""
    package = import_module(f"loratool.{folder}")
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        plugin = getattr(import_module(f"{package.__name__}.{info.name}"), attribute)
        if plugin.id in found:
            raise RuntimeError(f"two plug-ins in {folder}/ have the id {plugin.id!r}")
        found[plugin.id] = plugin
    return found


@cache
def architectures() -> Mapping[str, Architecture]:
    """Every known model by id, tables not yet built."""
    return _discover("architectures", "ARCHITECTURE")


@cache
def layouts() -> Mapping[str, Layout]:
    """Every known spelling by id."""
    return _discover("layouts", "LAYOUT")


@cache
def families() -> Mapping[str, Family]:
    """Every known kind of adapter by id."""
    return _discover("families", "FAMILY")


@cache
def methods() -> Mapping[str, Method]:
    """Every known way to merge by id. Imports torch."""
    return _discover("merging", "METHOD")


@cache
def checks() -> Mapping[str, Check]:
    """Every group of findings by id."""
    return _discover("checks", "CHECK")


@cache
def programs() -> Mapping[str, Program]:
    """Every program that files can be checked for, by id."""
    return _discover("programs", "PROGRAM")
