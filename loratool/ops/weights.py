"""Weights: where a model's checkpoint keeps the weights that modules update: keys, rows, orientation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from loratool.core.adapter import CONFIG, Adapter
from loratool.core.architecture import Architecture, Voice
from loratool.core.errors import FormatError, few
from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.files.checkpoint import read_checkpoint
from loratool.ops.base import BACKBONES, known_model

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, LazyTensor]

_WEIGHT = "weight"


@dataclass(frozen=True)
class Span:
    """Rows `start:stop` of an update are the rows from `first` on of the tensor `key`: its columns if `transposed`.

    `index` is the place of its first target in the module's targets. `key` is that of the weight in the checkpoint.
    """

    key: str
    first: int
    start: int
    stop: int
    transposed: bool
    index: int

    @property
    def bias_key(self) -> str | None:
        """The key of the bias beside the weight; None for weights that have none by their name."""
        return f"{self.key[: -len(_WEIGHT)]}bias" if self.key.endswith(_WEIGHT) else None

    def joins(self, other: Span) -> bool:
        """Whether `other` goes on where this one ends, in the update and in the tensor."""
        height = self.stop - self.start
        same = self.key == other.key and self.transposed == other.transposed
        return same and other.start == self.stop and other.first == self.first + height


@dataclass(frozen=True, eq=False)
class _Row:
    """Where the rows of one target begin: in the tensor `key`, or in its columns if it is `transposed`.

    `first` and the `total` of the tensor are counted in the standard model.
    """

    key: str
    tensor: LazyTensor
    first: int
    total: int
    transposed: bool


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """The weights of a model in a checkpoint. Nothing is read before it is asked for.

    `transposed` says whether a model without a table stores its square weights as `(in, out)`, as GPT-2's Conv1D does;
    None: nobody knows. Of other weights, the shape tells. `renamed` is, per component of a model without a table, what
    its names have in front that the checkpoint's have not, and the other way round.
    """

    path: str
    architecture: Architecture
    components: Mapping[str, Tensors]
    voices: Mapping[str, Voice]
    transposed: bool | None = False
    renamed: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def spans(self, module: Module) -> tuple[Span, ...]:
        """Where the rows of a module's update are, target by target. Raises FormatError if they are not there, or do
        not fit."""
        found: list[Span] = []
        start = 0
        for index, (target, height) in enumerate(zip(module.targets, module.heights(), strict=True)):
            row = self._row(target)
            # Rows are counted in the standard model; this one may be narrower.
            first = row.first * height // max(target.rows, 1)
            transposed = row.transposed or (self._by_shape and self._is_transposed(module, row.tensor))
            self._check(module, row, target, height, transposed)
            found.append(Span(row.key, first, start, start + height, transposed, index))
            start += height
        return tuple(found)

    def sized(self, module: Module) -> Module:
        """The module with the sizes of the weight, where neither its factors nor a table tell them."""
        if 0 not in module.family.shape(module.shapes):
            return module
        if not self._by_shape:
            return replace(module, weight_shape=self.shape(module.targets))
        row = self.find(module.targets[0])
        if row is None or len(row.tensor.shape) < 2:
            return module
        shape = row.tensor.shape
        if row.transposed or self._is_transposed(module, row.tensor):
            shape = (shape[1], shape[0], *shape[2:])
        return replace(module, targets=(module.targets[0]._replace(shape=shape),))

    def sized_all(self, adapter: Adapter) -> Adapter:
        """The adapter with every module `sized`."""
        return replace(adapter, modules=tuple(self.sized(module) for module in adapter.modules))

    def changed_bias(self, module: Module) -> Tensor | None:
        """What a module that changes the layer's bias adds to it, float32, `(out,)`; None where it does not, or where
        the layer has no bias."""
        import torch

        factors = module.family.on_bias(module.factors)
        if factors is None:
            return None
        found = []
        for span in self.spans(self.sized(module)):
            tensor = self.components[module.component].get(span.bias_key or "")
            if tensor is None:
                return None
            found.append(tensor.rows(span.first, span.first + span.stop - span.start).load().float())
        bias = torch.cat(found).reshape(-1, 1)
        loaded = {role: factor.load().float() for role, factor in factors.items()}
        return (module.family.apply(loaded, module.scale, bias, 1.0) - bias).flatten()

    def load(self, module: Module, device: str = "cpu") -> Tensor:
        """The weight that a module updates, float32, `(out, in * kh * kw)`. Raises what `spans` does."""
        import torch

        rows = []
        for span in self.spans(self.sized(module)):
            tensor = self.components[module.component][span.key]
            height = span.stop - span.start
            if span.transposed:
                part = tensor.load(device)[:, span.first : span.first + height].T
            else:
                part = tensor.rows(span.first, span.first + height).load(device)
            rows.append(part.float().flatten(1))
        return torch.cat(rows)

    def pieces(self, module: Module, device: str = "cpu") -> Iterator[tuple[Span, Tensor]]:
        """What `load` puts together, one stretch of rows after the other: `(stop - start, in * kh * kw)`, in the dtype
        in which it is stored. Raises what `spans` does."""
        for span in self.spans(module):
            tensor, height = self.components[module.component][span.key], span.stop - span.start
            if span.transposed:
                part = tensor.load(device)[:, span.first : span.first + height].T
            else:
                part = tensor.rows(span.first, span.first + height).load(device)
            yield span, part.reshape(height, -1)

    def shape(self, targets: Sequence[Target]) -> tuple[int, ...] | None:
        """Shape of the weight that these targets make up in this checkpoint, `(out, in)`, `(out, in, kh, kw)` or
        `(size,)`, at its width; None if one of them is not there. Raises FormatError for a tensor without values."""
        rows = [self.find(target) for target in targets]
        height, width = 0, 1
        for target, row in zip(targets, rows, strict=True):
            if row is None:
                return None
            if not row.tensor.numel or not row.tensor.shape:
                raise FormatError(f"is {list(row.tensor.shape)}, expected a weight", file=self.path, key=row.key)
            size = row.tensor.shape[1 if self._stands_on_end(target.component, row) else 0]
            height += target.rows * size // row.total if row.total != size else target.rows
            width = row.tensor.numel // size
        standard = targets[0].shape
        if len(standard) < 2:
            return (height,)
        kernel = standard[2:]
        return (height, width // max(prod(kernel), 1), *kernel)

    def _stands_on_end(self, component: str, row: _Row) -> bool:
        """Whether a weight is stored as (in, out): by the table, or, without one, by its bias."""
        if row.transposed or not self._by_shape or not self.transposed:
            return row.transposed
        bias = self.components[component].get(f"{row.key[: -len(_WEIGHT)]}bias")
        return bias is not None and len(row.tensor.shape) == 2 and bias.shape == row.tensor.shape[1:]

    def _check(self, module: Module, row: _Row, target: Target, height: int, transposed: bool) -> None:
        shape = row.tensor.shape if len(row.tensor.shape) > 1 else (*row.tensor.shape, 1)
        rows = shape[1] if transposed else shape[0]
        width = row.tensor.numel // max(rows, 1)
        if module.factors.keys() == {"bias"} and rows * target.rows == height * row.total:
            return  # nothing is added to the weight itself
        if width != module.delta_width or rows * target.rows != height * row.total:
            raise FormatError(
                f"the base weight is {list(row.tensor.shape)}, the adapter's {[module.shape[0], module.delta_width]}",
                file=self.path,
                key=module.title,
                hint="the checkpoint is of another model than the adapter",
            )

    @property
    def _by_shape(self) -> bool:
        """Whether no table says how weights are stored, so that their shapes have to."""
        return self.architecture.open or self.architecture.id == "generic"

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

    def missing(self, modules: Sequence[Module]) -> list[Module]:
        """The modules whose weight is not in the checkpoint."""
        return [module for module in modules if any(self.find(target) is None for target in module.targets)]

    def key_of(self, target: Target) -> str | None:
        """Under which key the checkpoint would hold the rows of a target; None for a component that it has not."""
        voice = self.voices.get(target.component)
        if target.component not in self.components:
            return None
        if self.architecture.open:
            return f"{self.respelled(target.component, target.path)}.{_WEIGHT}"
        if voice is None:
            return None
        return voice.prefix + self.architecture.naming(target.component, voice.naming).home(target).tensor_key

    def respelled(self, component: str, path: str) -> str:
        """A path of a model without a table as the checkpoint has it (see `renamed`)."""
        strip, add = self.renamed.get(component, ("", ""))
        return add + path.removeprefix(strip)

    def _row(self, target: Target) -> _Row:
        found = self.find(target)
        if found is None:
            raise FormatError("is not in the checkpoint", file=self.path, key=f"{target.component}.{target.path}")
        return found

    def find(self, target: Target) -> _Row | None:
        """Where the rows of a target are; None if they are not in the checkpoint."""
        key = self.key_of(target)
        tensor = None if key is None else self.components[target.component].get(key)
        if key is None or tensor is None:
            return None
        if self._by_shape:
            return _Row(key, tensor, 0, target.rows, False)
        naming = self.architecture.naming(target.component, self.voices[target.component].naming)
        home = naming.home(target)
        return _Row(key, tensor, home.first_row, sum(one.rows for one in naming[home.name]), home.transposed)


def base_weights(path: str | os.PathLike[str], adapter: Adapter) -> BaseWeights:
    """The weights that `adapter` updates, in the checkpoint at `path`. Reads headers only.

    Raises FormatError for a checkpoint of another model, or one that lacks a weight that the adapter updates.
    """
    checkpoint = read_checkpoint(path)
    check_model(str(path), known_model(checkpoint), adapter.architecture)
    found = weights_in(str(path), checkpoint.components, adapter)
    missing = [module.title for module in found.missing(adapter.modules)]
    if missing:
        raise FormatError(
            f"lacks {len(missing)} of the {len(adapter.modules)} weights that the adapter updates: {few(missing)}",
            file=str(path),
            hint="name a complete checkpoint of the adapter's model",
        )
    return found


def check_model(path: str, model: Architecture | None, wanted: Architecture) -> None:
    """Raises FormatError for a checkpoint of a model that an adapter is not for. None and open ones fit everything."""
    if model is not None and not wanted.open and model is not wanted and model.id != wanted.id:
        raise FormatError(
            f"is a checkpoint of {model.title}, the adapter is for {wanted.title}",
            file=path,
            hint="name a checkpoint of the adapter's model",
        )


def weights_in(path: str, parts: Mapping[str, Tensors], adapter: Adapter) -> BaseWeights:
    """The weights that `adapter` updates among `parts` (sub-folder, or "" for all components, -> key -> tensor).

    What is not there is missing, which is no error yet.
    """
    architecture = adapter.architecture
    components = {c: tensors for c in adapter.components if (tensors := _part(parts, c)) is not None}
    voices = {c: voice for c in components if (voice := _voice(architecture, c, components[c])) is not None}
    renamed = {c: _renaming(adapter.of(c), components[c]) for c in components} if architecture.open else {}
    found = BaseWeights(path, architecture, components, voices, renamed=renamed)
    return replace(found, transposed=_square_transposed(found, adapter)) if found._by_shape else found


def weights_for(path: str, parts: Mapping[str, Tensors], architecture: Architecture) -> BaseWeights:
    """All weights of a model with a table, its own or one made of a checkpoint, among `parts` (as for `weights_in`).

    Components that are not there are left out. Of a model whose table was made of another checkpoint, the keys are
    respelled as there: checkpoints of one model differ in what stands in front of their names.
    """
    components = {c: tensors for c in architecture.components if (tensors := _part(parts, c)) is not None}
    if architecture.id == "generic":
        components = {c: _respelled(architecture, c, tensors) for c, tensors in components.items()}
    voices = {c: voice for c in components if (voice := _voice(architecture, c, components[c])) is not None}
    found = BaseWeights(path, architecture, {c: components[c] for c in voices}, voices)
    return replace(found, transposed=_stored_on_end(found)) if found._by_shape else found


def _respelled(architecture: Architecture, component: str, tensors: Tensors) -> Tensors:
    """The tensors under the keys of the checkpoint that the table was made of."""
    (checkpoint,) = architecture.checkpoints
    prefix, naming = checkpoint.voices[component].prefix, architecture.naming(component, "base")
    # The name with the most parts first: it is the one that every copy of the model has.
    targets = sorted((one for (one,) in naming.values()), key=lambda target: -target.path.count("."))
    strip, add = _renaming((Module((target,), families()["lora"], {}) for target in targets), tensors)
    if (strip, add) == ("", prefix):
        return tensors
    respelled = {prefix + strip + key[len(add) :]: one for key, one in tensors.items() if key.startswith(add)}
    return {**tensors, **respelled}


def _stored_on_end(weights: BaseWeights) -> bool:
    """Whether a model keeps its weights as (in, out), as GPT-2's Conv1D does: the sizes of its biases tell."""
    said = set()
    for component, voice in weights.voices.items():
        tensors = weights.components[component]
        for name in weights.architecture.naming(component, voice.naming):
            weight, bias = (tensors.get(f"{voice.prefix}{name}.{kind}") for kind in (_WEIGHT, "bias"))
            if weight is None or bias is None or len(weight.shape) != 2 or weight.shape[0] == weight.shape[1]:
                continue
            said.add(bias.shape == weight.shape[1:])
    return said == {True}


def _part(parts: Mapping[str, Tensors], component: str) -> Tensors | None:
    if "" in parts:
        return parts[""]
    if component == "model":
        backbones = [name for name in BACKBONES if name in parts]
        return parts[backbones[0]] if len(backbones) == 1 else None
    return parts.get(component)


def _renaming(modules: Iterable[Module], tensors: Tensors) -> tuple[str, str]:
    """(what to take off, what to put in front) of the names of a model without a table, so that most are there.

    Checkpoints of one model differ in wrappers: GPT-2's on the hub have no `transformer.`, a saved one has.
    """
    paths = [target.path for module in modules for target in module.targets]
    if not paths:
        return "", ""
    names = {key.removesuffix(f".{_WEIGHT}") for key in tensors if key.endswith(f".{_WEIGHT}")}
    first = paths[0]
    candidates = [("", "")]
    candidates += [("", name[: -len(first)]) for name in names if name.endswith(f".{first}")]
    candidates += [(first[: -len(name)], "") for name in names if first.endswith(f".{name}")]
    candidates += [("", wrapper) for wrapper in ("model.", "model.diffusion_model.", "diffusion_model.")]

    def held(way: tuple[str, str]) -> int:
        strip, add = way
        return sum(path.startswith(strip) and add + path[len(strip) :] in names for path in paths)

    return max(candidates, key=held)


def _stored_transposed(module: Module, tensor: LazyTensor) -> bool | None:
    """Whether a weight is stored as (in, out), by its shape; None where it is square. An embedding never is."""
    straight = (module.shape[0], module.delta_width)
    if len(tensor.shape) != 2 or _is_embedding(module):
        return False
    here, turned = (
        all(a in (0, b) for a, b in zip(straight, s, strict=True)) for s in (tensor.shape, tensor.shape[::-1])
    )
    return None if here and turned else turned


def _is_embedding(module: Module) -> bool:
    return module.product is not None and module.product.transposed


def _square_transposed(weights: BaseWeights, adapter: Adapter) -> bool | None:
    """Whether square weights are stored as (in, out): what PEFT's config and the other weights say with one voice."""
    told = [json.loads(text).get("fan_in_fan_out") for name, text in adapter.side_files.items() if CONFIG in name]
    said = {value for value in told if isinstance(value, bool)}
    for module in adapter.modules:
        row = weights.find(module.targets[0])
        square = module.shape[0] == module.delta_width
        if row is not None and not square and not _is_embedding(module):
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
