"""Respell: every tensor of a checkpoint under the name that another kind of checkpoint of its model has for it.

Nothing is read or computed: rows are put together, cut and turned over when somebody asks for the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.errors import FormatError, UsageError, few
from loratool.core.naming import Home, Naming
from loratool.core.registry import architectures
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor, concatenated
from loratool.files.checkpoint import PIPELINE, CheckpointFiles, WeightSet, read_index

Tensors = Mapping[str, LazyTensor]

_WEIGHT = "weight"
_KINDS = (_WEIGHT, "bias")
_SCALES = ("scale_weight", "weight_scale", "scale_input", "input_scale")
"""Of fp8 weights: one number may be for all rows, so that they can only go where the whole weight goes."""

_BUFFERS = re.compile(
    r"(.*\.)?(position_ids|logit_scale)|model_ema\.(decay|num_updates)|denoiser\.sigmas"
    r"|betas|logvar|(alphas|sqrt|log_one_minus|posterior)_\w+"
)
"""What is no weight of the model: constants that programs compute, and what only training reads."""

_CARRIED = re.compile(r".*(position_ids|logit_scale|text_projection\.weight|encoder\.embed_tokens\.weight)")
"""What text encoders hold beside the weights of the table, in the names of transformers."""

_NUMBERED = re.compile(r"(.*?[._])(\d+)(?:\.|$)")
"""The first number in a name, and what it is a number of."""

_OUTSIDE = ("safety_checker",)
"""Components of a folder that are no part of the model: files never hold them."""


@dataclass(frozen=True, eq=False)
class Respelled:
    """The tensors of a checkpoint under their new keys; `left_out` are those that the new kind has no place for."""

    tensors: Mapping[str, LazyTensor]
    left_out: tuple[str, ...]


# -- what is asked for ------------------------------------------------------------------------------------------------


def spelling_asked(checkpoint: CheckpointFiles, model: Architecture, name: str) -> Checkpoint | None:
    """The kind of checkpoint that `name` means for the `model` in `checkpoint`; None if it is of that kind already.

    Raises FormatError for a model without a table, and for what cannot be made of it, UsageError for a name that is
    none of the model's.
    """
    if model.open or model.id == "generic":
        known = ", ".join(one.title for one in architectures().values() if not one.open)
        raise FormatError(
            "is of no model whose other spellings are known", file=checkpoint.path, hint=f"--format is for {known}"
        )
    kinds = {one.id: one for one in model.checkpoints}
    if name not in kinds:
        raise UsageError(f"no checkpoint of {model.title} is spelled {name!r}", hint=f"known: {', '.join(kinds)}")
    wanted = kinds[name]
    spoken = [one for one in _parts(checkpoint.components, model) if one.component in model.components]
    if spoken and all(wanted.voice(one.component) == one.voice for one in spoken):
        return None
    if wanted.folder and checkpoint.folder:
        raise FormatError(
            f"is a folder, and spelled otherwise than {name}: a folder keeps its names",
            file=checkpoint.path,
            hint="leave --format out",
        )
    if wanted.folder:
        raise FormatError(
            f"{name} is a folder with configs, a scheduler and tokenizers, which cannot be made from weights",
            file=checkpoint.path,
            hint="name a diffusers folder of the model as --base, instead of this file",
        )
    return wanted


def one_copy(checkpoint: CheckpointFiles) -> tuple[CheckpointFiles, tuple[str, ...]]:
    """The checkpoint with one copy of the weights in every sub-folder that is part of a model, and what is left out.

    `model_index.json` says which those are, if there is one. Of several copies (fp16 beside fp32) it is the one without
    a variant in its name. Raises FormatError where that leaves none or several.
    """
    named = _named(checkpoint)
    sets: list[WeightSet] = []
    told: list[str] = []
    for folder in dict.fromkeys(one.folder for one in checkpoint.sets):
        if folder in _OUTSIDE:
            told.append(f"left out: {folder}, which is no part of such a file")
            continue
        if folder and named and folder not in named:
            told.append(f"left out: {folder}, which {PIPELINE} does not name")
            continue
        copies = [one for one in checkpoint.sets if one.folder == folder]
        plain = [one for one in copies if not _is_variant(one)] if len(copies) > 1 else copies
        if len(plain) != 1:
            raise FormatError(
                f"holds {len(copies)} copies of the weights of {folder or 'the model'}: "
                f"{few([one.files[0].name for one in copies])}",
                file=checkpoint.path,
                hint="name a folder with one of them",
            )
        sets += plain
        if len(copies) > 1:
            told.append(
                f"of {len(copies)} copies of the weights of {folder or 'the model'} {plain[0].files[0].name} is taken"
            )
    return replace(checkpoint, sets=tuple(sets)), tuple(told)


def _named(checkpoint: CheckpointFiles) -> frozenset[str]:
    """The components that the index of a pipeline names; empty without one."""
    index = Path(checkpoint.path, PIPELINE)
    if not checkpoint.folder or not index.is_file():
        return frozenset()
    return frozenset(key for key in read_index(index) if not key.startswith("_"))


def _is_variant(one: WeightSet) -> bool:
    """Whether the name says so: `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`."""
    return "." in one.files[0].name.rpartition("/")[2].removesuffix(".safetensors")


# -- the new spelling -------------------------------------------------------------------------------------------------


def respelled(path: str, parts: Mapping[str, Tensors], model: Architecture, target: Checkpoint) -> Respelled:
    """The tensors in `parts` (sub-folder, or "" for all of a file, -> key -> tensor) as `target` spells them.

    Every tensor lands once, but constants that `target` has no place for. Raises FormatError, which names `path`, for
    any other without a name, for a part of the model that `target` does not hold, for weights of which only some of
    what is fused is there, and for shapes of another model.
    """
    work = _Respelling(path, model, target)
    spoken = _parts(parts, model)
    absent = [one.component for one in spoken if target.voice(one.component) is None]
    if absent:
        main = next(iter(model.components))
        raise FormatError(
            f"{target.id} is a spelling for {', '.join(target.voices)} alone: it has no place for {', '.join(absent)}",
            file=path,
            hint=f"name {path}/{main} as --base" if main in parts else "choose another --format",
        )
    for part in spoken:
        work.move(part)
    work.rest(parts, spoken)
    return Respelled(work.made, tuple(work.left_out))


@dataclass(frozen=True, eq=False)
class _Part:
    """One component as it is spelled now; `tensors` are those of its sub-folder, or all of the file."""

    component: str
    folder: str
    tensors: Tensors
    voice: Voice


@dataclass(frozen=True, eq=False)
class _Piece:
    """The rows of one target: `tensor` out of `whole`, which is what is kept under `key` for the name `name`."""

    name: str
    key: str
    tensor: LazyTensor
    whole: LazyTensor


def _parts(parts: Mapping[str, Tensors], model: Architecture) -> list[_Part]:
    """The components that are there."""
    found = []
    main = next(iter(model.components))
    for component in (*model.components, *model.beside):
        folder = "" if "" in parts else component
        tensors = parts.get(folder, {})
        # In a file without prefixes only the model's own part is told from the others.
        voice = _voice(model, component, tensors, bare=component == main or folder != "")
        if voice is not None:
            found.append(_Part(component, folder, tensors, voice))
    return found


def _voice(model: Architecture, component: str, tensors: Tensors, bare: bool) -> Voice | None:
    """The prefix and the naming that most keys are of; None if there is none of them."""
    voices = [voice for one in model.checkpoints if (voice := one.voice(component)) is not None]
    prefixes = dict.fromkeys(voice.prefix for voice in voices if voice.prefix or bare)
    namings = dict.fromkeys([*(voice.naming for voice in voices), *model.namings(component)])
    best, found = 0, None
    for prefix in prefixes:
        for naming in namings:
            keys = _tensor_keys(model.naming(component, naming))
            held = sum(prefix + key in tensors for key in keys)
            if held > best:
                best, found = held, Voice(prefix, naming)
    return found


def _tensor_keys(naming: Naming) -> list[str]:
    return [naming.home(targets[0]).tensor_key for targets in naming.values()]


@dataclass(eq=False)
class _Respelling:
    """Puts tensors where they belong, and counts what has found its place (sub-folder -> keys)."""

    path: str
    model: Architecture
    target: Checkpoint
    made: dict[str, LazyTensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    _moved: dict[str, set[str]] = field(default_factory=dict)

    def move(self, part: _Part) -> None:
        """Every weight of the table, and what stands beside it under its name: a bias, the scales of fp8."""
        voice = self._voice_for(part)
        old, new = (self.model.naming(part.component, one.naming) for one in (part.voice, voice))
        moved = self._moved.setdefault(part.folder, set())
        named: dict[str, str] = {}
        for kind in (*_KINDS, *_SCALES):
            pieces = self._pieces(part, old, kind)
            landed = 0
            for name, targets in new.items():
                found = [pieces[target] for target in targets if target in pieces]
                if found:
                    self._land(kind, name, old, new, voice.prefix, pieces)
                    named.setdefault(name, found[0].key)
                landed += len(found)
            if landed != len(pieces):
                lost = next(piece for target, piece in pieces.items() if target not in new.targets)
                self._refuse(lost.key, f"has no name in {self.target.id}")
            moved.update(piece.key for piece in pieces.values())
        if old is not new:
            self._check_numbers(new, named)

    def _land(
        self, kind: str, name: str, old: Naming, new: Naming, prefix: str, pieces: Mapping[Target, _Piece]
    ) -> None:
        """Puts what is there of a name's targets under its new key."""
        targets = new[name]
        found = [pieces[target] for target in targets if target in pieces]
        source, home = found[0].key, new.home(targets[0])
        if len(found) != len(targets):
            lacking = next(target for target in targets if target not in pieces)
            self._refuse(source, f"belongs to {name} with {lacking.path}, which is not there")
        key = _key(home.tensor_key, kind)
        if key is None:
            self._refuse(source, f"has no name in {self.target.id}: {name} has no {kind} there")
        whole = old[found[0].name] == targets
        if not whole and kind in _SCALES:
            self._refuse(source, f"is a scale of fp8, and {name} is made of other rows")
        tensor = found[0].whole if whole else self._joined(found, name)
        if kind == _WEIGHT:
            tensor = self._turned(tensor, source, old.home(targets[0]), home, targets)
        self._put(prefix + key, tensor, source)

    def rest(self, parts: Mapping[str, Tensors], spoken: Sequence[_Part]) -> None:
        """What no table names: it goes where it is called the same, is left out if it is a constant, or is refused."""
        lost: list[str] = []
        for folder, tensors in parts.items():
            over = [key for key in tensors if key not in self._moved.get(folder, ())]
            for key in over:
                title = title_of(folder, key)
                place = self._place(_owner(folder, key, spoken), key)
                if place is not None:
                    self._put(place, tensors[key], key)
                elif _BUFFERS.fullmatch(key):
                    self.left_out.append(title)
                else:
                    lost.append(title)
        if lost:
            raise FormatError(
                f"{len(lost)} tensor{'s have' if len(lost) > 1 else ' has'} no name in {self.target.id}: {few(lost)}",
                file=self.path,
                hint="bake without --format: then every tensor keeps its name",
            )

    def _place(self, part: _Part | None, key: str) -> str | None:
        """The new key of a tensor that no table names: where the names of its component stay what they are."""
        if part is None:
            return None
        voice = self._voice_for(part)
        main = part.component == next(iter(self.model.components)) and not _BUFFERS.fullmatch(key)
        if voice.naming != part.voice.naming or not (main or _CARRIED.fullmatch(key)):
            return None
        return voice.prefix + key.removeprefix(part.voice.prefix)

    def _voice_for(self, part: _Part) -> Voice:
        voice = self.target.voice(part.component)
        assert voice is not None  # `respelled` looked
        return voice

    def _pieces(self, part: _Part, naming: Naming, kind: str) -> dict[Target, _Piece]:
        """The rows of every target of which this is there."""
        found: dict[Target, _Piece] = {}
        for name, targets in naming.items():
            home = naming.home(targets[0])
            key = _key(home.tensor_key, kind)
            tensor = None if key is None else part.tensors.get(part.voice.prefix + key)
            if key is None or tensor is None:
                continue
            key = part.voice.prefix + key
            if kind == _WEIGHT:
                self._check(tensor, key, home, targets)
            whole = len(targets) == 1 or kind in _SCALES
            cut = [tensor] * len(targets) if whole else list(self._cut(tensor, key, naming, targets))
            for target, rows in zip(targets, cut, strict=True):
                found[target] = _Piece(name, key, rows, tensor)
        return found

    def _cut(self, tensor: LazyTensor, key: str, naming: Naming, targets: Sequence[Target]) -> Iterator[LazyTensor]:
        """The rows of each target. They are counted in the standard model; this one may be narrower."""
        total = sum(target.rows for target in targets)
        size = tensor.shape[0]
        for target in targets:
            first = naming.home(target).first_row
            if first * size % total or target.rows * size % total:
                self._refuse(key, f"has {size} rows, which cannot be dealt to {len(targets)} parts as in the model")
            yield tensor.rows(first * size // total, (first + target.rows) * size // total)

    def _joined(self, pieces: Sequence[_Piece], name: str) -> LazyTensor:
        try:
            return concatenated([piece.tensor for piece in pieces])
        except ValueError as error:
            self._refuse(pieces[0].key, f"cannot be put into {name} with the others: {error}")

    def _check_numbers(self, new: Naming, named: Mapping[str, str]) -> None:
        """Raises FormatError where blocks have numbers that the model's own do not lead up to: programs number them
        differently (through all levels, or backwards), and those of a smaller relative otherwise than the table."""
        known: dict[str, set[int]] = {}
        there: dict[str, dict[int, str]] = {}
        for name in new:
            if found := _NUMBERED.match(name):
                known.setdefault(found[1], set()).add(int(found[2]))
                if name in named:
                    there.setdefault(found[1], {}).setdefault(int(found[2]), named[name])
        for block, numbers in there.items():
            last = max(numbers)
            lacking = next((n for n in sorted(known[block]) if n < last and n not in numbers), None)
            if lacking is not None:
                missing = f"there is no {block}{lacking}: not the blocks of {self.model.title}"
                self._refuse(numbers[last], f"would be {block}{last} in {self.target.id}, but {missing}")

    def _check(self, tensor: LazyTensor, key: str, home: Home, targets: Sequence[Target]) -> None:
        """Raises FormatError for a weight with other dimensions: that of a relative with the same names."""
        dimensions = len(targets[0].shape)
        if len(tensor.shape) != dimensions and not (home.pointwise and len(tensor.shape) == dimensions + 2):
            self._refuse(key, f"is {list(tensor.shape)}, expected {dimensions} dimensions as in {self.model.title}")

    def _turned(self, tensor: LazyTensor, key: str, old: Home, new: Home, targets: Sequence[Target]) -> LazyTensor:
        """A weight as the new naming stores it."""
        if old.transposed != new.transposed:
            if len(targets) > 1 or len(tensor.shape) != 2:
                self._refuse(key, "is stored as (in, out) in one of the two")
            return LazyTensor.computed(tensor.shape[::-1], tensor.dtype, lambda: tensor.load().T.contiguous())
        if old.pointwise != new.pointwise:
            return tensor.reshape((*tensor.shape[:2], 1, 1) if new.pointwise else tensor.shape[:2])
        return tensor

    def _put(self, key: str, tensor: LazyTensor, source: str) -> None:
        if key in self.made:
            self._refuse(source, f"would be called {key}, as another tensor is")
        self.made[key] = tensor

    def _refuse(self, key: str, message: str) -> NoReturn:
        raise FormatError(message, file=self.path, key=key, hint="bake without --format")


def _owner(folder: str, key: str, spoken: Sequence[_Part]) -> _Part | None:
    """The component that a key belongs to: that of its sub-folder, or of the longest prefix."""
    fitting = [one for one in spoken if one.folder == folder and key.startswith(one.voice.prefix)]
    return max(fitting, key=lambda one: len(one.voice.prefix), default=None)


def title_of(folder: str, key: str) -> str:
    """A tensor of a sub-folder, for people."""
    return f"{folder}/{key}" if folder else key


def _key(tensor_key: str, kind: str) -> str | None:
    """The key of what stands beside a weight; None beside one that is not called so."""
    if kind == _WEIGHT:
        return tensor_key
    return f"{tensor_key[: -len(_WEIGHT)]}{kind}" if tensor_key.endswith(_WEIGHT) else None
