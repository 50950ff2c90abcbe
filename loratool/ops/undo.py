"""Undo files: what it takes to get a base back, bit for bit, from what was baked into it."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratool import __version__
from loratool.core.errors import FormatError
from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.target import Target
from loratool.core.tensor import Held, LazyTensor
from loratool.files.atomic import atomic_write
from loratool.files.checkpoint import WeightFile
from loratool.files.safetensors import Header, read_header, write_safetensors
from loratool.files.stream import stretch
from loratool.ops.frames import packed
from loratool.ops.predict import Back, coarse_parts
from loratool.ops.sites import Fixed, Part, Site
from loratool.ops.stored import part_of, scale_column
from loratool.ops.weights import Span

ENTRY = "loratool.undo"
FORMAT = 1

MAX_HEADER = 100_000_008


class Recording:
    """Records, while a checkpoint is baked, what its undo file needs. A `baking.Recorder`."""

    def __init__(self, sites: Sequence[Site], norm: str) -> None:
        self._parts = coarse_parts(sites)
        self._norm = norm
        self._frames: dict[int, list[tuple[int, bytes]]] = {id(site): [] for site in sites}
        self._local = threading.local()

    def block(self, site: Site, row: int, stored: Tensor, written: Tensor, scale: Tensor | None) -> None:
        """Packs the difference between rows of the base and what is predicted for them."""
        device = "cpu" if stored.device.type == "cpu" else str(stored.device)
        back = self._back(site, device)
        old = None if site.scale is None else part_of(scale_column(site.scale, device), row, len(stored))
        new = None if scale is None else part_of(scale, row, len(stored))
        gains = back.gains(stored, row, old)
        predicted = back.rows(written, row, gains, old, new)
        self._frames[id(site)].append((row, packed(row, stored, predicted, gains)))

    def _back(self, site: Site, device: str) -> Back:
        key, back = getattr(self._local, "last", (None, None))
        if key != (id(site), device) or back is None:
            back = Back(self._parts[id(site)], site.tensor.dtype, device, self._norm)
            self._local.last = (id(site), device), back
        found: Back = back
        return found

    def frames(self, site: Site) -> bytes:
        """All frames of a site, in the order of rows."""
        return b"".join(data for _, data in sorted(self._frames[id(site)], key=lambda pair: pair[0]))

    def parts(self, site: Site) -> Sequence[Part | Fixed]:
        """What is added to a site, as an undo takes it off."""
        return self._parts[id(site)]


# -- writing --------------------------------------------------------------------------------------------------------


def write_undo(
    path: str | os.PathLike[str],
    sites: Sequence[Site],
    recording: Recording,
    record: Mapping[str, Any],
    digests: Mapping[WeightFile, str],
    overwrite: bool,
) -> int:
    """Writes the undo file of a bake, and says its size. `digests` are the sha256 of the base's files."""
    tensors: dict[str, LazyTensor] = {}
    modules: dict[int, str] = {}
    told: dict[str, Any] = {"format": FORMAT, "version": __version__, "baked": dict(record), "modules": {}}
    told["files"] = [_file(file, digest, tensors, number) for number, (file, digest) in enumerate(digests.items())]
    told["sites"] = []
    for number, site in enumerate(sites):
        name = f"site.{number}"
        tensors[name] = _bytes(recording.frames(site))
        entry: dict[str, Any] = {"file": site.file.name, "key": site.key, "frames": name, "parts": []}
        if site.scale is not None:
            tensors[f"{name}.scale"] = site.scale
            entry |= {"scale_key": site.scale_key, "scale": f"{name}.scale"}
        for at, part in enumerate(recording.parts(site)):
            entry["parts"].append(_part(part, f"{name}.{at}", tensors, modules, told["modules"]))
        told["sites"].append(entry)
    with atomic_write(path, overwrite) as file:
        write_safetensors(file, tensors, {ENTRY: json.dumps(told)})
    return os.path.getsize(path)


def _file(file: WeightFile, digest: str, tensors: dict[str, LazyTensor], number: int) -> dict[str, Any]:
    """The base's header as it stands in the file, and its hash."""
    source = stretch(next(iter(file.header.tensors.values()))).file
    tensors[f"header.{number}"] = _bytes(zlib.compress(source.pread(file.header.header_bytes, 0), 6))
    return {"name": file.name, "sha256": digest, "header": f"header.{number}", "size": file.header.size_bytes}


def _part(
    part: Part | Fixed,
    name: str,
    tensors: dict[str, LazyTensor],
    modules: dict[int, str],
    told: dict[str, Any],
) -> dict[str, Any]:
    if isinstance(part, Fixed):
        entry = {"start": part.start, "strength": part.strength, "first": part.first, "last": part.last}
        if part.replaces:
            return {**entry, "replaces": True}
        tensors[name] = part.values
        return {**entry, "values": name}
    module = part.module
    known = modules.get(id(module))
    if known is None:
        known = modules[id(module)] = name
        roles = {role: f"{name}.{role}" for role in module.tensors if role != "bias"}
        tensors.update({roles[role]: module.tensors[role] for role in roles})
        told[known] = {"family": module.family.id, "alpha": module.alpha, "roles": roles}
    span = part.span
    return {
        "module": known,
        "strength": part.strength,
        "first": span.first,
        "start": span.start,
        "stop": span.stop,
        "transposed": span.transposed,
    }


def _bytes(data: bytes) -> LazyTensor:
    return LazyTensor((len(data),), "U8", Held(data))


# -- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UndoFile:
    """One file of the base: its name in the folder ("" for a single file), hash, size, and its header's bytes."""

    name: str
    sha256: str
    size: int
    header: bytes


@dataclass(frozen=True, eq=False)
class UndoSite:
    """One tensor that was baked into: what to take off, the frames that correct the rest, the old fp8 scale."""

    file: str
    key: str
    parts: tuple[Part | Fixed, ...]
    frames: LazyTensor
    scale_key: str | None = None
    scale: LazyTensor | None = None


@dataclass(frozen=True, eq=False)
class Undo:
    """An undo file that was opened. `baked` is what the bake recorded in the header of its output."""

    path: str
    baked: Mapping[str, Any]
    files: tuple[UndoFile, ...]
    sites: tuple[UndoSite, ...]
    size: int = 0


def read_undo(path: str | os.PathLike[str]) -> Undo:
    """Opens an undo file. Raises FormatError for what is none, is damaged, or is of a newer loratool."""
    header = read_header(path)
    try:
        told = json.loads(header.metadata[ENTRY])
        if told["format"] != FORMAT:
            raise FormatError(f"has format {told['format']}, expected {FORMAT}", hint="use a newer loratool")
        files = tuple(
            UndoFile(str(one["name"]), str(one["sha256"]), int(one["size"]), _inflated(header.tensors[one["header"]]))
            for one in told["files"]
        )
        modules = {name: _module(one, header) for name, one in told["modules"].items()}
        sites = tuple(_site(one, header, modules) for one in told["sites"])
        return Undo(str(path), told["baked"], files, sites, header.size_bytes)
    except FormatError as error:
        raise error.with_file(path) from error.__cause__
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error, RecursionError) as error:
        raise FormatError(
            "is no undo file, or a damaged one", file=str(path), hint="name the file that `bake --undo` wrote"
        ) from error


def _inflated(tensor: LazyTensor) -> bytes:
    machine = zlib.decompressobj()
    data = machine.decompress(tensor.read(), MAX_HEADER)
    if not machine.eof:
        raise FormatError("holds a header that is too large")
    return data


def _module(one: Mapping[str, Any], header: Header) -> Module:
    tensors = {role: header.tensors[name] for role, name in one["roles"].items()}
    magnitude = tensors.pop("magnitude", None)
    family = families()[one["family"]]
    shapes = {role: tensor.shape for role, tensor in tensors.items()}
    problem = family.problem(shapes)
    if problem is not None:
        raise FormatError(f"holds a broken module: {problem}")
    alpha = None if one["alpha"] is None else float(one["alpha"])
    return Module((Target("", "", family.shape(shapes)),), family, tensors, alpha, magnitude)


def _site(one: Mapping[str, Any], header: Header, modules: Mapping[str, Module]) -> UndoSite:
    return UndoSite(
        str(one["file"]),
        str(one["key"]),
        tuple(_parts(one, header, modules)),
        header.tensors[one["frames"]],
        one.get("scale_key"),
        header.tensors[one["scale"]] if "scale" in one else None,
    )


def _parts(one: Mapping[str, Any], header: Header, modules: Mapping[str, Module]) -> Iterator[Part | Fixed]:
    for part in one["parts"]:
        strength, first, start = float(part["strength"]), int(part["first"]), int(part["start"])
        if "module" in part:
            span = Span(one["key"], first, start, int(part["stop"]), bool(part["transposed"]), 0)
            yield Part(modules[part["module"]], strength, span, ())
        elif part.get("replaces"):
            nothing = LazyTensor((0,), "F32", Held(b""))
            yield Fixed(nothing, start, strength, first, int(part["last"]), True, one["key"])
        else:
            yield Fixed(header.tensors[part["values"]], start, strength, first, int(part["last"]), False, one["key"])


def tensor_of(gain: Any) -> Tensor:
    """A gain that was stored, as a tensor."""
    return torch.from_numpy(gain.copy())
