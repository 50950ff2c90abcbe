"""Checkpoints on disk: one safetensors file, shards with their index, or a folder with one sub-folder per component."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loratool.core.errors import FormatError, LoratoolError, few
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import INDEX, PICKLES
from loratool.files.safetensors import Header, OpenFile, is_pickle, read_header

WEIGHTS = ".safetensors"
PIPELINE = "model_index.json"
"""What says that a folder is a pipeline of diffusers, with one sub-folder per component."""

MAX_INDEX = 64 << 20
"""An index names every tensor of a model: more than 64 MiB of it is refused."""

_INDEX = re.compile(INDEX)


@dataclass(frozen=True, eq=False)
class WeightFile:
    """One safetensors file of a checkpoint; `name` is its path below the checkpoint's folder ("" for a single file)."""

    name: str
    path: str
    header: Header


@dataclass(frozen=True, eq=False)
class WeightSet:
    """One whole copy of the weights of one component: a file, or shards, with their `index` if there is one.

    `folder` is the component's sub-folder, "" where there is none: then it may hold several components. A folder with
    variants (fp16 beside fp32) has several sets.
    """

    folder: str
    files: tuple[WeightFile, ...]
    index: str | None = None

    @cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """All tensors by key, shards merged."""
        return {key: tensor for file in self.files for key, tensor in file.header.tensors.items()}

    @cached_property
    def homes(self) -> Mapping[str, WeightFile]:
        """Which file holds which key."""
        return {key: file for file in self.files for key in file.header.tensors}


@dataclass(frozen=True, eq=False)
class CheckpointFiles:
    """A checkpoint that was opened: headers are read, weights are not. `folder` says that `path` is one."""

    path: str
    folder: bool
    sets: tuple[WeightSet, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.header.size_bytes for one in self.sets for file in one.files)

    @cached_property
    def components(self) -> Mapping[str, Mapping[str, LazyTensor]]:
        """Sub-folder -> key -> tensor, of the first set of each; "" for a file or a folder without sub-folders."""
        found: dict[str, Mapping[str, LazyTensor]] = {}
        for one in self.sets:
            found.setdefault(one.folder, one.tensors)
        return found

    @cached_property
    def keys(self) -> Mapping[str, LazyTensor]:
        """All keys of all components; those of a component that has the same key twice are lost."""
        return {key: tensor for tensors in self.components.values() for key, tensor in tensors.items()}


def read_checkpoint(path: str | os.PathLike[str]) -> CheckpointFiles:
    """Opens the checkpoint at `path`: a file, or a folder with shards or with one sub-folder per component.

    Reads headers and indices only. Raises FormatError where there are no safetensors weights, for a shard that is
    missing or lacks tensors that the index promises, and for an index that leads out of its folder.
    """
    place = Path(path)
    try:
        if not place.exists():
            raise FormatError("does not exist", hint="name a checkpoint file or a model's folder")
        if not place.is_dir():
            return CheckpointFiles(str(path), False, (WeightSet("", (_file(place, ""),)),))
        # A pipeline may have the single file that other programs load beside its components: those are the model.
        sets = tuple(_components(place)) if (place / PIPELINE).is_file() else ()
        sets = sets or tuple(_sets(place, "")) or tuple(_components(place))
    except LoratoolError as error:
        raise error.with_file(str(path)) from error.__cause__
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=str(path)) from error
    if not sets:
        raise FormatError("holds no safetensors weights", file=str(path), hint=_advice(place))
    return CheckpointFiles(str(path), True, sets)


def _advice(place: Path) -> str:
    if any(file.suffix in PICKLES for file in (*place.glob("*"), *place.glob("*/*"))):
        return "it holds pickles (.bin, .ckpt): rewrite each once: loratool convert FILE -o FILE.safetensors"
    return "name a checkpoint file or a model's folder"


def _components(place: Path) -> Iterator[WeightSet]:
    for sub in sorted(sub for sub in place.iterdir() if sub.is_dir() and not sub.name.startswith(".")):
        yield from _sets(sub, sub.name)


def _file(path: Path, name: str) -> WeightFile:
    if is_pickle(path):
        raise not_read(path)
    return WeightFile(name, str(path), read_header(path))


def not_read(path: Path) -> FormatError:
    """A pickle where a checkpoint is wanted: bakes copy bytes from safetensors to safetensors."""
    import shlex

    words = (str(path), "-o", str(path.with_suffix(WEIGHTS)))
    return FormatError(
        "is a pickle; checkpoints are only read from safetensors",
        file=str(path),
        hint=f"rewrite it once: loratool convert {shlex.join(words)}",
    )


def _sets(folder: Path, below: str) -> Iterator[WeightSet]:
    """The sets of weights in one folder: one for every index, then the files that no index names."""
    prefix = f"{below}/" if below else ""
    named: set[str] = set()
    for index in sorted(file for file in folder.iterdir() if _INDEX.fullmatch(file.name)):
        shards = _shards(index)
        named |= shards.keys()
        files = tuple(_file(folder / shard, prefix + shard) for shard in shards)
        for file, promised in zip(files, shards.values(), strict=True):
            lacking = [key for key in promised if key not in file.header.tensors]
            if lacking:
                raise FormatError(
                    f"lacks {len(lacking)} tensors that {index.name} promises ({few(lacking)})",
                    file=file.path,
                    hint="download the folder again",
                )
        yield WeightSet(below, files, prefix + index.name)
    rest = [_file(f, prefix + f.name) for f in sorted(folder.glob(f"*{WEIGHTS}")) if f.name not in named]
    # Shards without an index complement one another; a variant (fp16) has the same keys again.
    groups: list[list[WeightFile]] = []
    for file in rest:
        fitting = (g for g in groups if not any(o.header.tensors.keys() & file.header.tensors.keys() for o in g))
        group = next(fitting, None)
        if group is None:
            groups.append(group := [])
        group.append(file)
    yield from (WeightSet(below, tuple(group)) for group in groups)


def _shards(index: Path) -> dict[str, list[str]]:
    """File name -> the keys that an index promises in it, in the order of names."""
    weight_map = read_index(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("names no tensors (no weight_map)", file=str(index), hint="download it again")
    found: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise FormatError(
                f"says that {key!r} is in {name!r}, expected the name of a file beside it",
                file=str(index),
                hint="do not use this folder: its index leads elsewhere",
            )
        found.setdefault(name, []).append(key)
    return dict(sorted(found.items()))


def read_index(index: Path) -> dict[str, Any]:
    """The JSON of an index. Raises FormatError for what is none."""
    file = OpenFile(str(index))
    if file.size > MAX_INDEX:
        raise FormatError(f"is larger than {MAX_INDEX >> 20} MiB", file=str(index))
    try:
        data = json.loads(file.pread(file.size, 0).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is no JSON: {error}", file=str(index)) from error
    if not isinstance(data, dict):
        raise FormatError("is no JSON object", file=str(index))
    return data
