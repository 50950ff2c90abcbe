"""Weights: the base weights that modules update, found in a checkpoint: one file, shards, or a folder per component."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loratool.core.adapter import CONFIG, Adapter
from loratool.core.architecture import Architecture, Voice
from loratool.core.errors import FormatError, LoratoolError, few
from loratool.core.identify import checkpoint_of
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.files.safetensors import read_header

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, eq=False)
class _Row:
    """Where the rows of one target begin: in `tensor`, or in its columns if it is `transposed`."""

    tensor: LazyTensor
    first: int
    total: int
    transposed: bool


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """The weights of a model in a checkpoint. Nothing is read before it is asked for.

    `transposed` says whether a model without a table stores its square weights as `(in, out)`, as GPT-2's Conv1D does;
    None: nobody knows. Of other weights, the shape tells.
    """

    path: str
    architecture: Architecture
    components: Mapping[str, Tensors]
    voices: Mapping[str, Voice]
    transposed: bool | None = False

    def load(self, module: Module, device: str = "cpu") -> Tensor:
        """The weight that a module updates, float32, `(out, in * kh * kw)`. Raises FormatError if it is not there."""
        rows = []
        for target, height in zip(module.targets, module.heights(), strict=True):
            found = self._row(target)
            # Rows are counted in the standard model; this one may be narrower.
            first = found.first * height // max(target.rows, 1)
            tensor = found.tensor
            if found.transposed or (self.architecture.open and self._is_transposed(module, tensor)):
                part = tensor.load(device)[:, first : first + height].T
            else:
                part = tensor.rows(first, min(first + height, tensor.shape[0])).load(device)
            rows.append(part.float().flatten(1))
        weight = torch.cat(rows)
        width = module.delta_width
        if weight.shape != (module.shape[0], width):
            raise FormatError(
                f"the base weight is {list(weight.shape)}, the adapter's {[module.shape[0], width]}",
                file=self.path,
                key=module.title,
                hint="the checkpoint is of another model than the adapter",
            )
        return weight

    def _is_transposed(self, module: Module, tensor: LazyTensor) -> bool:
        found = _stored_transposed(module, tensor)
        if found is None:
            found = self.transposed
        if found is None:
            raise FormatError(
                f"the weight is {list(tensor.shape)}: it may be stored as (out, in) or as (in, out)",
                file=self.path,
                key=module.title,
                hint="keep the adapter_config.json beside the adapter: its fan_in_fan_out tells",
            )
        return found

    def missing(self, modules: Sequence[Module]) -> list[str]:
        """Titles of the modules whose weight is not in the checkpoint."""
        return [module.title for module in modules if any(self.find(target) is None for target in module.targets)]

    def _row(self, target: Target) -> _Row:
        found = self.find(target)
        if found is None:
            raise FormatError("is not in the checkpoint", file=self.path, key=f"{target.component}.{target.path}")
        return found

    def find(self, target: Target) -> _Row | None:
        """Where the rows of a target are; None if they are not in the checkpoint."""
        tensors = self.components.get(target.component)
        if tensors is None:
            return None
        if self.architecture.open:
            tensor = tensors.get(f"{target.path}.weight")
            return None if tensor is None else _Row(tensor, 0, tensor.shape[0], False)
        voice = self.voices.get(target.component)
        if voice is None:
            return None
        home = self.architecture.naming(target.component, voice.naming).home(target)
        tensor = tensors.get(voice.prefix + home.tensor_key)
        return None if tensor is None else _Row(tensor, home.first_row, tensor.shape[0], home.transposed)


def base_weights(path: str | os.PathLike[str], adapter: Adapter) -> BaseWeights:
    """The weights that `adapter` updates, in the checkpoint at `path`. Reads headers only.

    Raises FormatError for a checkpoint of another model, or one that lacks a weight that the adapter updates.
    """
    place = Path(path)
    try:
        parts = _parts(place)
    except LoratoolError as error:
        raise error.with_file(str(path)) from error.__cause__
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=str(path)) from error
    architecture = adapter.architecture
    every = {key: None for part in parts.values() for key in part}
    model = checkpoint_of(every)
    if model is not None and not architecture.open and model is not architecture and model.id != architecture.id:
        raise FormatError(
            f"is a checkpoint of {model.title}, the adapter is for {architecture.title}",
            file=str(path),
            hint="name a checkpoint of the adapter's model",
        )
    single = len(parts) == 1 and "" in parts
    components = {c: parts[""] if single else parts.get(c, {}) for c in adapter.components}
    voices = {c: voice for c in adapter.components if (voice := _voice(architecture, c, components[c])) is not None}
    found = BaseWeights(str(path), architecture, components, voices)
    missing = found.missing(adapter.modules)
    if not missing and architecture.open:
        found = replace(found, transposed=_square_transposed(found, adapter))
    if missing:
        raise FormatError(
            f"lacks {len(missing)} of the {len(adapter.modules)} weights that the adapter updates: {few(missing)}",
            file=str(path),
            hint="name a complete checkpoint of the adapter's model",
        )
    return found


def _stored_transposed(module: Module, tensor: LazyTensor) -> bool | None:
    """Whether a weight is stored as (in, out), by its shape; None where it is square. An embedding never is."""
    straight = (module.shape[0], module.delta_width)
    if len(tensor.shape) != 2 or tensor.shape != straight[::-1] or module.product.transposed:
        return False
    return None if straight[0] == straight[1] else True


def _square_transposed(weights: BaseWeights, adapter: Adapter) -> bool | None:
    """Whether square weights are stored as (in, out): what PEFT's config and the other weights say with one voice."""
    told = [json.loads(text).get("fan_in_fan_out") for name, text in adapter.side_files.items() if CONFIG in name]
    said = {value for value in told if isinstance(value, bool)}
    for module in adapter.modules:
        row = weights.find(module.targets[0])
        square = module.shape[0] == module.delta_width
        if row is not None and not square and not module.product.transposed:
            said.add(bool(_stored_transposed(module, row.tensor)))
    return said.pop() if len(said) == 1 else None


def _voice(architecture: Architecture, component: str, tensors: Tensors) -> Voice | None:
    """The voice of the kind of checkpoint whose keys for this component are most often there."""
    voices = [checkpoint.voices[component] for checkpoint in architecture.checkpoints if component in checkpoint.voices]
    voices += [voice for layout, voice in architecture.voices("diffusers") if layout == component and not voice.prefix]
    scores = []
    for voice in voices:
        naming = architecture.naming(component, voice.naming)
        keys = {voice.prefix + naming.home(targets[0]).tensor_key for targets in naming.values()}
        scores.append(len(keys & tensors.keys()))
    best = max(scores, default=0)
    return voices[scores.index(best)] if best else None


def _parts(place: Path) -> dict[str, dict[str, LazyTensor]]:
    """Component -> key -> tensor; a file, or a folder of shards, is the one component ""."""
    if place.is_file():
        return {"": read_header(place).tensors}
    if not place.exists():
        raise FormatError("does not exist")
    own = sorted(place.glob("*.safetensors"))
    folders = (
        {"": own} if own else {s.name: sorted(s.glob("*.safetensors")) for s in sorted(place.iterdir()) if s.is_dir()}
    )
    found = {}
    for name, files in folders.items():
        if files:
            found[name] = {key: tensor for file in files for key, tensor in read_header(file).tensors.items()}
    if not found:
        raise FormatError("holds no safetensors weights", hint="name a checkpoint file or a model's folder")
    return found
