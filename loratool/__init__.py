"""loratool: inspect, convert, merge, resize, bake and extract LoRA files.

The front door of the library. Names are imported when they are first used: `import loratool` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loratool.core.adapter import Adapter
    from loratool.core.errors import LoratoolError
    from loratool.ops.bake_file import bake_file
    from loratool.ops.check import check_file
    from loratool.ops.convert import convert
    from loratool.ops.convert_file import convert_file
    from loratool.ops.extract_file import extract_file
    from loratool.ops.inspect import inspect
    from loratool.ops.merge import merge
    from loratool.ops.merge_files import merge_files
    from loratool.ops.open import open_adapter
    from loratool.ops.replay import replay_file
    from loratool.ops.resize import resize
    from loratool.ops.resize_file import resize_file
    from loratool.ops.save import save
    from loratool.ops.unbake_file import unbake_file

_HOME = {
    "Adapter": "loratool.core.adapter",
    "LoratoolError": "loratool.core.errors",
    "bake_file": "loratool.ops.bake_file",
    "check_file": "loratool.ops.check",
    "convert": "loratool.ops.convert",
    "convert_file": "loratool.ops.convert_file",
    "extract_file": "loratool.ops.extract_file",
    "inspect": "loratool.ops.inspect",
    "merge": "loratool.ops.merge",
    "merge_files": "loratool.ops.merge_files",
    "open_adapter": "loratool.ops.open",
    "replay_file": "loratool.ops.replay",
    "resize": "loratool.ops.resize",
    "resize_file": "loratool.ops.resize_file",
    "save": "loratool.ops.save",
    "unbake_file": "loratool.ops.unbake_file",
}

__all__ = [
    "Adapter",
    "LoratoolError",
    "bake_file",
    "check_file",
    "convert",
    "convert_file",
    "extract_file",
    "inspect",
    "merge",
    "merge_files",
    "open_adapter",
    "replay_file",
    "resize",
    "resize_file",
    "save",
    "unbake_file",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
