"""Sites: which tensors of a checkpoint adapters change, and what is added to which of their rows. Nothing is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.registry import layouts
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.files.checkpoint import CheckpointFiles, WeightFile, WeightSet
from loratool.ops.inputs import Input
from loratool.ops.weights import BaseWeights, Span, weights_in

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""dtypes that can be added to."""

SCALED = frozenset({"F8_E4M3", "F8_E5M2"})
"""dtypes whose tensors may have a scale beside them."""

_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_OF_INPUTS = (".scale_input", ".input_scale")
_NEAR = 3


@dataclass(frozen=True, eq=False)
class Part:
    """What one module adds to a stretch of one tensor: `strength` times rows `span.start:span.stop` of its update.

    `places` are all spans of the module with the tensors they are in: what a DoRA norm over whole columns takes.
    `adapter` is the path of the file that it is from.
    """

    module: Module
    strength: float
    span: Span
    places: tuple[tuple[Span, LazyTensor, LazyTensor | None], ...]
    adapter: str = ""

    @property
    def first(self) -> int:
        """The first row of the tensor (column, if it is transposed) that is changed."""
        return self.span.first

    @property
    def last(self) -> int:
        """The row behind the last one that is changed."""
        return self.span.first + self.span.stop - self.span.start


@dataclass(frozen=True, eq=False)
class Fixed:
    """Values that stand for themselves: a bias, which is added times `strength`, or a whole tensor that takes the
    place of the base's (PEFT's modules_to_save; `replaces`)."""

    values: LazyTensor
    start: int
    strength: float
    first: int
    last: int
    replaces: bool
    title: str
    adapter: str = ""


@dataclass(frozen=True, eq=False)
class Site:
    """One tensor of one file that becomes another: `parts` are added to it, and it is stored as `dtype`.

    `scale_key` names the scale of a scaled fp8 tensor: the weight is tensor * `scale`. Without parts it is only cast.
    """

    component: str
    file: WeightFile
    key: str
    tensor: LazyTensor
    dtype: str
    parts: tuple[Part | Fixed, ...] = ()
    scale_key: str | None = None
    scale: LazyTensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return self.tensor.nbytes


@dataclass(frozen=True)
class Unmatched:
    """A module (or tensor) of an adapter that has no place in the checkpoint, and the name that comes nearest."""

    adapter: str
    title: str
    reason: str
    nearest: str | None = None


@dataclass(frozen=True, eq=False)
class Sites:
    """All sites of a checkpoint, and what found none. `silent` counts modules of strength 0."""

    sites: tuple[Site, ...]
    unmatched: tuple[Unmatched, ...]
    silent: int = 0


def find_sites(checkpoint: CheckpointFiles, inputs: Sequence[Input], dtype: str | None = None) -> Sites:
    """Where the inputs change the checkpoint, which is cast to `dtype` if one is given. Reads headers only.

    Raises FormatError for weights that cannot be added to (integers), and for shapes that do not fit.
    """
    found = _Finder(checkpoint, dtype)
    for one in inputs:
        found.add(one)
    return found.result(checkpoint)


class _Finder:
    """Collects what is added to which tensor."""

    def __init__(self, checkpoint: CheckpointFiles, dtype: str | None) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._parts: dict[tuple[int, str], tuple[str, list[Part | Fixed]]] = {}
        self._unmatched: list[Unmatched] = []
        self._silent = 0

    def add(self, one: Input) -> None:
        """Finds the places of one input."""
        adapter = one.adapter
        placed: set[int] = set()
        kept: set[str] = set()
        for index, weights in enumerate(self._checkpoint.sets):
            parts = {weights.folder: weights.tensors}
            base = weights_in(self._checkpoint.path, parts, adapter)
            here = [module for module in adapter.modules if base.key_of(module.targets[0]) is not None]
            missing = {id(module) for module in base.missing(here)}
            if len(missing) == len(here):
                missing = set()
                here = []  # another variant, or nothing of this adapter
            kept |= set(self._saved(index, base, one))  # first: updates are added to what takes the base's place
            for module in here:
                if id(module) not in missing:
                    placed.add(id(module))
                    self._place(index, base, one, module)
        self._miss(adapter, [module for module in adapter.modules if id(module) not in placed], kept)

    def _place(self, index: int, base: BaseWeights, one: Input, module: Module) -> None:
        tensors = base.components[module.component]
        module = base.sized(module)
        spans = base.spans(module)
        gains = one.blocks.of_module(module) if one.blocks is not None else (1.0,) * len(module.targets)
        strengths = [one.weight * gain for gain in gains]
        if not any(strengths):
            self._silent += 1
            return
        places = tuple((span, tensors[span.key], scale_of(tensors, span.key)[1]) for span in spans)
        for span, strength in _joined(spans, strengths):
            if strength and module.factors.keys() != {"bias"}:
                self._note(index, span.key, module.component, Part(module, strength, span, places, one.adapter.path))
        factors = module.family.on_bias(module.factors)
        if factors is not None:
            layer = replace(
                module, factors=factors, targets=(Target(module.component, module.title, (module.shape[0], 1)),)
            )
            self._place_on_bias(index, base, one, layer, list(zip(spans, strengths, strict=True)))
        if "bias" in module.factors:
            self._place_bias(index, base, one, module, list(zip(spans, strengths, strict=True)))

    def _place_bias(
        self, index: int, base: BaseWeights, one: Input, module: Module, spans: Sequence[tuple[Span, float]]
    ) -> None:
        tensors = base.components[module.component]
        for span, strength in spans:
            key = span.bias_key
            if key is None or key not in tensors:
                reason = "its bias (lora_bias) has no place: the layer has none in the checkpoint"
                self._unmatched.append(Unmatched(one.adapter.path, f"{module.title} (bias)", reason))
                return
            last = span.first + span.stop - span.start
            fixed = Fixed(
                module.factors["bias"],
                span.start,
                strength * module.scale,
                span.first,
                last,
                False,
                module.title,
                one.adapter.path,
            )
            self._note(index, key, module.component, fixed)

    def _place_on_bias(
        self, index: int, base: BaseWeights, one: Input, module: Module, spans: Sequence[tuple[Span, float]]
    ) -> None:
        """Notes what a module does to the bias of its layer; nothing where the layer has none."""
        tensors = base.components[module.component]
        keys = [span.bias_key for span, _ in spans]
        if any(key is None or key not in tensors for key in keys):
            return
        moved = [replace(span, key=key, transposed=False) for (span, _), key in zip(spans, keys, strict=True) if key]
        places = tuple((span, tensors[span.key], None) for span in moved)
        for span, (_, strength) in zip(moved, spans, strict=True):
            if strength:
                self._note(index, span.key, module.component, Part(module, strength, span, places, one.adapter.path))

    def _saved(self, index: int, base: BaseWeights, one: Input) -> Iterator[str]:
        """Keys of the extras that are whole tensors of the base, which they replace: PEFT's modules_to_save, and the
        embedding that it keeps (as `base_layer`) beside an update of it."""
        if one.adapter.layout != "peft":
            return
        for key, tensor in one.adapter.extras.items():
            path = key.rpartition("/")[2].removeprefix("base_model.model.").replace(".base_layer.", ".")
            for component, tensors in base.components.items():
                name = base.respelled(component, path)
                if name in tensors and tensors[name].shape == tensor.shape:
                    rows = tensor.shape[0] if tensor.shape else 1
                    fixed = Fixed(tensor, 0, one.weight, 0, rows, True, key, one.adapter.path)
                    if one.weight:
                        self._note(index, name, component, fixed)
                    yield key

    def _note(self, index: int, key: str, component: str, part: Part | Fixed) -> None:
        self._parts.setdefault((index, key), (component, []))[1].append(part)

    def _miss(self, adapter: Adapter, modules: Sequence[Module], kept: set[str]) -> None:
        names = [key.removesuffix(".weight") for key in self._checkpoint.keys if key.endswith("weight")]
        base = weights_in(self._checkpoint.path, self._checkpoint.components, adapter)
        for number, module in enumerate(modules):
            wanted = next((base.key_of(t) for t in module.targets if base.find(t) is None), None)
            name = (wanted or module.targets[0].path).removesuffix(".weight")
            near = _nearest(name, names, number)
            reason = "is not in the checkpoint" if wanted else f"the checkpoint has no {module.component}"
            self._unmatched.append(Unmatched(adapter.path, module.title, reason, near))
        self._unmatched += _strays(adapter, [key for key in adapter.extras if key not in kept], base)

    def result(self, checkpoint: CheckpointFiles) -> Sites:
        """Everything that was found, in the order of the files and of the data in them."""
        sites: list[Site] = []
        for index, weights in enumerate(checkpoint.sets):
            sites += self._sites(index, weights)
        return Sites(tuple(sites), tuple(self._unmatched), self._silent)

    def _sites(self, index: int, weights: WeightSet) -> Iterator[Site]:
        scales = {scale_of(weights.tensors, key)[0] for key in weights.tensors}
        for key, tensor in weights.tensors.items():
            component, parts = self._parts.get((index, key), (weights.folder, []))
            dtype = self._stored_as(key, tensor, scales)
            if not parts and dtype == tensor.dtype:
                continue
            if tensor.dtype not in FLOATS:
                raise FormatError(
                    f"holds {tensor.dtype} {list(tensor.shape)}, which nothing can be added to",
                    file=weights.homes[key].path,
                    key=key,
                    hint="it is quantised: bake into the full-precision checkpoint and quantise that",
                )
            scale_key, scale = scale_of(weights.tensors, key)
            _check_scale(weights, key, tensor, scale_key, scale)
            yield Site(component, weights.homes[key], key, tensor, dtype, tuple(parts), scale_key, scale)

    def _stored_as(self, key: str, tensor: LazyTensor, scales: set[str | None]) -> str:
        """The dtype of a tensor in the output: scales stay what they are, and vectors do not become fp8."""
        if self._dtype is None or tensor.dtype not in FLOATS or key in scales or key.endswith(_OF_INPUTS):
            return tensor.dtype
        return tensor.dtype if self._dtype in SCALED and len(tensor.shape) < 2 else self._dtype


def _strays(adapter: Adapter, keys: Sequence[str], base: BaseWeights) -> Iterator[Unmatched]:
    """What keys that are no module's name, module by module where they are spelled as one's; with the nearest weight
    that has a name in the adapter's layout."""
    if not keys:
        return
    model, layout = adapter.architecture, layouts()[adapter.layout]
    parsed = layout.parse(keys)
    named = [stem for stem in parsed.groups if not layout.resolve(stem, model, adapter.metadata)]
    known = dict(_stems(layout, base)) if named and not model.open else {}
    for stem in parsed.groups:
        if stem not in named:
            yield Unmatched(adapter.path, stem, "is no module that can be baked")
    for number, stem in enumerate(named):
        near = _nearest(stem, known, number)
        reason = f"is no name in {model.title}"
        yield Unmatched(adapter.path, stem, reason, known[near].removesuffix(".weight") if near else None)
    for key in parsed.unknown:
        yield Unmatched(adapter.path, key, "is no module that can be baked")


def _nearest(name: str, known: Collection[str], number: int) -> str | None:
    """The known name that comes nearest, of the first few names that are asked for: each takes milliseconds."""
    near = get_close_matches(name, known, 1, 0.6) if number < _NEAR else []
    return near[0] if near else None


def _stems(layout: Layout, base: BaseWeights) -> Iterator[tuple[str, str]]:
    """Every name that a layout has for a weight of the checkpoint, and the weight's key."""
    for component, voice in layout.voices(base.architecture):
        for name, targets in base.architecture.naming(component, voice.naming).items():
            if base.find(targets[0]) is not None:
                yield voice.prefix + name.replace(".", layout.separator), base.key_of(targets[0]) or ""


def scale_of(tensors: Mapping[str, LazyTensor], key: str) -> tuple[str | None, LazyTensor | None]:
    """The key and the tensor of the scale that belongs to a scaled fp8 weight; None, None for any other tensor."""
    if tensors[key].dtype in SCALED and key.endswith("weight"):
        for name in _SCALES:
            other = key[: -len("weight")] + name
            if other in tensors:
                return other, tensors[other]
    return None, None


def _check_scale(
    weights: WeightSet, key: str, tensor: LazyTensor, scale_key: str | None, scale: LazyTensor | None
) -> None:
    """Raises FormatError for a scale that is neither one number nor one per row."""
    if scale is None or scale.numel == 1 or scale.numel == scale.shape[0] == tensor.shape[0]:
        return
    raise FormatError(
        f"has shape {list(scale.shape)}, expected one number, or one for each of {tensor.shape[0]} rows",
        file=weights.homes[key].path,
        key=scale_key,
        hint="block-wise scales are not supported: bake into the full-precision checkpoint",
    )


def _joined(spans: Iterable[Span], strengths: Sequence[float]) -> Iterator[tuple[Span, float]]:
    """Spans with their strengths; neighbours of one strength as one."""
    last: tuple[Span, float] | None = None
    for span, strength in zip(spans, strengths, strict=True):
        if last and last[1] == strength and last[0].joins(span):
            before = last[0]
            last = Span(before.key, before.first, before.start, span.stop, before.transposed, before.index), strength
            continue
        if last:
            yield last
        last = span, strength
    if last:
        yield last
