"""Sides: two checkpoints of one model, weight by weight, however each of them is spelled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loratool.core.architecture import Architecture
from loratool.core.errors import FormatError, few
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.files.checkpoint import CheckpointFiles, read_checkpoint
from loratool.ops.base import known_model, model_of
from loratool.ops.finite import STORED, TRAINED, not_finite
from loratool.ops.truncate import norm_of
from loratool.ops.weights import BaseWeights, weights_for

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""What weights may be stored as. Quantised ones have no difference that could be taken number by number."""

LINEAR, NORM, EMBEDDING = "linear", "norm", "embedding"
"""Kinds of weights: what a pair can update (convolutions, too), and what only a full difference can."""

_SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|weight_scale_inv|quant_state\..*|absmax)$")
"""Keys of quantised checkpoints: what is stored under `weight` is not the weight."""

_EMBEDDING = re.compile(r"(embeddings?|^embed_\w+|^wte|^wpe|^shared|^relative_attention_bias|^pos_embed)$")
_ADAPTED = re.compile(r"model|unet|transformer(_\d)?|prior|text_encoder(_\d)?")
"""Components that adapters are made for."""


class Place(NamedTuple):
    """One weight of both checkpoints under a layout's name: `module` has its targets and its shape, and no values."""

    module: Module
    kind: str


_Shapes = tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]
"""A parameter's title and its shapes in BASE and in TUNED, None where it is not there."""


class Places(NamedTuple):
    """The weights under the names of a layout that both checkpoints have; by title those that one of them has not, and
    those of another shape, their biases and a model's other parameters among them."""

    both: tuple[Place, ...]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Sides:
    """The checkpoints before and after training. `unmatched` are components that only one of them has."""

    architecture: Architecture
    base: BaseWeights
    tuned: BaseWeights
    base_files: CheckpointFiles
    tuned_files: CheckpointFiles
    unmatched: tuple[str, ...]

    @property
    def components(self) -> tuple[str, ...]:
        """The components that both have and that adapters are made for."""
        shared = (c for c in self.base.components if c in self.tuned.components)
        return tuple(component for component in shared if _ADAPTED.fullmatch(component))

    def places(self, layout: Layout) -> Places:
        """Every weight under the name that `layout` writes, so that nothing has to be grouped anew.

        Raises FormatError for weights that are quantised, and where most have another shape: another model's.
        """
        both: list[Place] = []
        missing, misshapen = [], []
        voices = layout.written(self.architecture)
        for component in (c for c in self.components if c in voices):
            for targets in self.architecture.naming(component, voices[component].naming).values():
                shape, other = self.base.shape(targets), self.tuned.shape(targets)
                if shape is None or other is None:
                    missing += [_title(targets)] if shape != other else []
                elif shape != other:
                    misshapen.append(f"{_title(targets)} {list(shape)} and {list(other)}")
                else:
                    both.append(Place(hollow(targets, shape, 1, "F32"), _kind(targets, shape)))
        if len(misshapen) > len(both):
            raise FormatError(
                f"{len(misshapen)} of {len(misshapen) + len(both)} weights have another shape than in the base: "
                f"{few(misshapen)}",
                file=self.tuned.path,
                hint="name two checkpoints of one model",
            )
        for side in (self.base, self.tuned):
            _check_stored(side, both)
        for name, before, after in (*self._biases(both), *self._unnamed()):
            if before is None or after is None:
                missing.append(name)
            elif before != after:
                misshapen.append(f"{name} {list(before)} and {list(after)}")
        return Places(tuple(both), tuple(missing), tuple(misshapen))

    def _biases(self, places: Sequence[Place]) -> Iterator[_Shapes]:
        """The biases beside weights that one of the two has."""
        for place in places:
            before, after = (_bias_shape(side, place.module) for side in (self.base, self.tuned))
            if before is not None or after is not None:
                yield f"{place.module.title}.bias", before, after

    def _unnamed(self) -> Iterator[_Shapes]:
        """Everything of a model without a table that is no weight of the base nor the bias of one: other parameters,
        and weights that TUNED alone has."""
        for component in self.components if self.architecture.id == "generic" else ():
            prefix = self.base.voices[component].prefix
            named = {prefix + name for name in self.architecture.naming(component, "base")}
            before, after = self.base.components[component], self.tuned.components[component]
            # What is spelled differently in TUNED has the base's name behind its own: see `weights_for`.
            own = {id(tensor): key for key, tensor in after.items()}
            for key in (*before, *(key for key in own.values() if key not in before)):
                name, _, kind = key.rpartition(".")
                if not key.startswith(prefix) or (name in named and kind in ("weight", "bias")):
                    continue
                title = f"{component}.{key[len(prefix) :].removesuffix('.weight')}"
                yield title, _shape(before.get(key)), _shape(after.get(key))

    def difference(self, module: Module, device: str = "cpu") -> tuple[Tensor, float]:
        """TUNED - BASE of a weight, float32 `(out, in * kh * kw)`, and the Frobenius norm of that in BASE.

        One float32 matrix and one weight as stored are in memory at a time.
        """
        found = torch.empty(module.shape[0], module.delta_width, device=device)
        for span, piece in self.tuned.pieces(module, device):
            found[span.start : span.stop] = piece
            del piece  # before the next one is read, here and below
        squares = 0.0
        for span, piece in self.base.pieces(module, device):
            squares += norm_of(piece) ** 2
            # torch subtracts 16 bits from float32 as they are; smaller and larger ones it does not.
            plain = piece if piece.dtype in (torch.float32, torch.float16, torch.bfloat16) else piece.float()
            found[span.start : span.stop] -= plain
            del piece, plain
        return found, squares**0.5

    def biases(self, module: Module) -> tuple[Tensor, Tensor] | None:
        """BASE's and TUNED's biases beside a weight, float32 `(out,)`; None if one of them has none."""
        before, after = (_bias(side, module) for side in (self.base, self.tuned))
        return None if after is None or before is None or after.shape != before.shape else (before, after)

    def dtypes(self, places: Sequence[Place]) -> tuple[frozenset[str], frozenset[str]]:
        """How the weights at these places are stored in BASE and in TUNED."""
        before, after = (
            frozenset(tensor.dtype for place in places for tensor in _tensors(side, place.module))
            for side in (self.base, self.tuned)
        )
        return before, after

    @property
    def outside(self) -> int:
        """Weights of a file without a table that are outside of its diffusion model: nothing is made of them."""
        if self.architecture.id != "generic":
            return 0
        named = {c: self.base.voices[c].prefix for c in self.components}
        return sum(
            key.endswith(".weight") and not key.startswith(prefix)
            for component, prefix in named.items()
            for key in self.base.components[component]
        )

    def sick(self, title: str, before: Iterable[Tensor]) -> FormatError:
        """The error of a difference that is not finite: BASE's, if its values (`before`) are not, else TUNED's."""
        broken = not all(bool(piece.float().isfinite().all()) for piece in before)
        file, cure = (self.base.path, STORED) if broken else (self.tuned.path, TRAINED)
        return not_finite(title, cure).with_file(file)

    def others(self) -> Iterator[tuple[str, LazyTensor, LazyTensor]]:
        """Parameters beside weights and biases that no table names (a modulation, a scale): titles, BASE's, TUNED's."""
        for component in self.components if self.architecture.id == "generic" else ():
            named = self.base.voices[component].prefix
            before, after = self.base.components[component], self.tuned.components[component]
            for key, tensor in before.items():
                other = after.get(key)
                plain = key.endswith((".weight", ".bias")) or not key.startswith(named)
                if not plain and other is not None and other.shape == tensor.shape and tensor.dtype in FLOATS:
                    yield f"{component}.{key[len(named) :]}", tensor, other


def open_sides(base: str, tuned: str, architecture: Architecture | None = None) -> Sides:
    """Both checkpoints, of the model `architecture`, or of the one that their names tell. Reads headers only.

    Raises FormatError where they are of different models, or share no component.
    """
    before, after = read_checkpoint(base), read_checkpoint(tuned)
    model = architecture or _common_model(before, after)
    sides = [weights_for(files.path, files.components, model) for files in (before, after)]
    ours, theirs = sides
    if not ours.components.keys() & theirs.components.keys():
        raise FormatError(
            f"has no part of {model.title} that the base has, too",
            file=tuned,
            hint=f"the base has {', '.join(ours.components) or 'none'}, this {', '.join(theirs.components) or 'none'}",
        )
    unmatched = tuple(c for c in model.components if (c in ours.components) != (c in theirs.components))
    return Sides(model, ours, theirs, before, after, unmatched)


def hollow(targets: Sequence[Target], shape: tuple[int, ...], rank: int, dtype: str) -> Module:
    """A pair of that rank for a weight of that shape, without values: to ask for its shapes and sizes.

    A norm `(size,)` counts as a matrix of one column.
    """
    width = shape[1:] or (1,)
    ones = (1,) * (len(width) - 1)
    shapes = {"up": (shape[0], rank, *ones), "down": (rank, *width)}
    factors = {role: LazyTensor.computed(one, dtype, torch.Tensor) for role, one in shapes.items()}  # never read
    return Module(tuple(targets), families()["lora"], factors, float(rank))


# -- which model ------------------------------------------------------------------------------------------------------


def _common_model(base: CheckpointFiles, tuned: CheckpointFiles) -> Architecture:
    """The one model of both. Raises FormatError for two."""
    model, other = known_model(base), known_model(tuned)
    if model is not other:
        told = [f"a checkpoint of {one.title}" if one else "of no model that is known" for one in (other, model)]
        raise FormatError(
            f"is {told[0]}, the base is {told[1]}", file=tuned.path, hint="name two checkpoints of one model"
        )
    if model is not None:
        return model
    made = model_of(base)
    _check_shared(made, base, tuned)
    return made


def _check_shared(model: Architecture, base: CheckpointFiles, tuned: CheckpointFiles) -> None:
    """Raises FormatError where less than half of a component's names are in the other checkpoint."""
    ours, theirs = (weights_for(files.path, files.components, model) for files in (base, tuned))
    for component in ours.components.keys() & theirs.components.keys():
        names = [target for targets in model.naming(component, "base").values() for target in targets]
        shared = sum(theirs.find(target) is not None for target in names)
        if 2 * shared < len(names):
            raise FormatError(
                f"has {shared} of the {len(names)} weights that the base has in {component}",
                file=tuned.path,
                hint="name two checkpoints of one model",
            )


# -- single weights ---------------------------------------------------------------------------------------------------


def _title(targets: Sequence[Target]) -> str:
    return f"{targets[0].component}.{targets[0].path}"


def _kind(targets: Sequence[Target], shape: tuple[int, ...]) -> str:
    if len(shape) < 2:
        return NORM
    name = targets[0].module_path.rpartition(".")[2]
    return EMBEDDING if len(shape) == 2 and _EMBEDDING.search(name) else LINEAR


def _tensors(side: BaseWeights, module: Module) -> Iterator[LazyTensor]:
    rows = (side.find(target) for target in module.targets)
    return (row.tensor for row in rows if row is not None)


def _check_stored(side: BaseWeights, places: Sequence[Place]) -> None:
    for place in places:
        odd = next((tensor for tensor in _tensors(side, place.module) if tensor.dtype not in FLOATS), None)
        if odd is not None:
            raise FormatError(
                f"is stored as {odd.dtype}, expected one of {', '.join(FLOATS)}",
                file=side.path,
                key=place.module.title,
                hint="name a checkpoint that is not quantised",
            )
    scaled = next((key for tensors in side.components.values() for key in tensors if _SCALED.search(key)), None)
    if scaled is not None:
        raise FormatError("belongs to quantised weights", file=side.path, key=scaled, hint="name one in 16 or 32 bits")


def _bias_shape(side: BaseWeights, module: Module) -> tuple[int, ...] | None:
    """The shape of the tensor that the bias beside a weight is in; None where there is none."""
    key = side.spans(module)[0].bias_key
    return None if key is None else _shape(side.components[module.component].get(key))


def _shape(tensor: LazyTensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.shape


def _bias(side: BaseWeights, module: Module) -> Tensor | None:
    tensors: Mapping[str, LazyTensor] = side.components[module.component]
    found = []
    for span in side.spans(module):
        bias = None if span.bias_key is None else tensors.get(span.bias_key)
        stop = span.first + span.stop - span.start
        if bias is None or len(bias.shape) != 1 or bias.shape[0] < stop:
            return None
        found.append(bias.rows(span.first, stop).load().float())
    return torch.cat(found)


def distance(one: LazyTensor, other: LazyTensor) -> float:
    """||one - other|| (Frobenius), computed in float32."""
    return norm_of((one.load().float() - other.load().float()).reshape(1, -1))
