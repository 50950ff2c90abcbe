"""extract: the difference of two checkpoints as low-rank pairs, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from threading import Condition, Semaphore
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loratool.core.errors import FormatError, LoratoolError, NotRepresentable, UsageError
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.tensor import DTYPES, LazyTensor, torch_dtype
from loratool.ops.compare import EXACT, ROUNDING
from loratool.ops.finite import all_finite
from loratool.ops.pool import Tick, each
from loratool.ops.probe import vectors
from loratool.ops.ranks import Candidate, Limits, Rule, choose
from loratool.ops.resize import Cut
from loratool.ops.sides import EMBEDDING, LINEAR, NORM, Place, Sides, distance, hollow
from loratool.ops.truncate import Pair, leading, norm_of, singular_values, take_away

if TYPE_CHECKING:
    from loratool.core.tensor import Array

BIAS, OTHER = "bias", "other"
"""Kinds of what no pair can update, beside norms and embeddings."""

FULL_LAYOUTS = ("kohya", "comfyui")
"""Layouts that have a spelling (`.diff`, `.diff_b`) for the full difference of a norm or a bias."""

LARGEST = 1e18
"""Frobenius norm of a difference whose square float32 still holds."""

ROOM = 1_200_000_000
"""Bytes that all weights together may take while they are worked on, however many threads there are."""

_PER_VALUE = 8
"""Bytes for each value of a weight: its difference, and one of the two as it is stored, or what is computed of it."""

_AT_ONCE = 2
"""Weights in a GPU's memory at a time: one that is computed with and one that is brought."""

Written = Callable[[Sequence[Module]], int]
"""Bytes of the file with these modules."""


@dataclass(frozen=True)
class Wish:
    """What an extraction is asked for. `dtype` (a safetensors code) is that of the factors; differences of at most
    `min_norm` times the weight's norm are skipped; `clamp` is a quantile, or None."""

    rule: Rule
    limits: Limits = field(default_factory=Limits)
    dtype: str = "F16"
    min_norm: float = 0.0
    exact: bool = False
    clamp: float | None = None
    device: str = "cpu"


def check_wish(wish: Wish) -> None:
    """Raises UsageError for numbers that make no sense."""
    if not 0 <= wish.min_norm < math.inf:
        raise UsageError(f"--min-norm is {wish.min_norm:g}, expected a share of the weight's norm such as 0.001")
    if wish.clamp is not None and not 0.5 < wish.clamp <= 1:
        raise UsageError(f"--clamp is {wish.clamp:g}, expected a quantile such as 0.99")


@dataclass(frozen=True)
class Skipped:
    """A weight without a module: `norm` of its difference (Frobenius), `change` is that over the norm of the weight."""

    title: str
    component: str
    norm: float
    change: float


@dataclass(frozen=True, eq=False)
class Found:
    """A pair and how good it is. `image` is the product, before its factors were rounded, times the vectors of `probe`;
    `exact` says how it was found."""

    module: Module
    cut: Cut
    image: Array
    exact: bool


@dataclass(frozen=True, eq=False)
class Extraction:
    """The pairs in the order of the layout's names, and the weights that have none, unchanged ones among them."""

    found: tuple[Found, ...]
    skipped: tuple[Skipped, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole difference of the weights that pairs can update."""
        return math.hypot(*(one.cut.norm for one in self.found), *(one.norm for one in self.skipped))

    @property
    def error(self) -> float:
        """||difference - pairs|| / ||difference|| over all these weights, skipped ones included."""
        lost = math.hypot(*(one.cut.error * one.cut.norm for one in self.found), *(one.norm for one in self.skipped))
        return lost / self.norm if self.norm else 0.0


class _Measured(NamedTuple):
    """Norm of a difference, that of the weight in the base, and the singular values, where they were asked for."""

    norm: float
    whole: float
    values: tuple[float, ...] = ()

    @property
    def change(self) -> float:
        return self.norm / self.whole if self.whole else math.inf if self.norm else 0.0


def extract(
    sides: Sides,
    places: Sequence[Place],
    wish: Wish,
    *,
    written: Written | None = None,
    measuring: Tick | None = None,
    decomposing: Tick | None = None,
) -> Extraction:
    """The best pair for the difference of every linear and convolution among `places`, of the rank the rule gives it.

    Differences are float32. A rank is found by the randomised SVD unless `wish.exact`; rules that look at singular
    values read everything twice and know them all, from float64. `written` is needed for a size. Memory holds the
    factors and ROOM bytes of weights, or the largest weight. Raises FormatError for NaN and infinite values.
    """
    places = [place for place in places if place.kind == LINEAR]
    skipped: dict[int, Skipped] = {}
    gate = Gate(wish.device)
    measured: Mapping[int, _Measured] = {}
    if wish.rule.kind != "rank":
        measured = dict(enumerate(each(lambda place: _measured(sides, place, wish, gate), places, measuring)))
        skipped = {at: _skipped(places[at], one) for at, one in measured.items() if _is_small(one, wish)}
    kept = [at for at in range(len(places)) if at not in skipped]
    ranks = _ranks([places[at] for at in kept], [measured.get(at) for at in kept], wish, written)
    jobs = [(places[at], rank) for at, rank in zip(kept, ranks, strict=True)]
    made = each(lambda job: _made(sides, *job, wish, gate), jobs, decomposing)
    skipped |= {at: one for at, one in zip(kept, made, strict=True) if isinstance(one, Skipped)}
    found = tuple(one for one in made if isinstance(one, Found))
    return Extraction(found, tuple(skipped[at] for at in sorted(skipped)))


def _ranks(
    places: Sequence[Place], measured: Sequence[_Measured | None], wish: Wish, written: Written | None
) -> list[int]:
    candidates = [_candidate(place.module, one, wish.dtype) for place, one in zip(places, measured, strict=True)]

    def size(ranks: Sequence[int]) -> int:
        assert written is not None
        modules = [
            hollow(place.module.targets, place.module.shape, rank, wish.dtype)
            for place, rank in zip(places, ranks, strict=True)
        ]
        return written(modules)

    return choose(wish.rule, candidates, wish.limits, size)


def _candidate(module: Module, measured: _Measured | None, dtype: str) -> Candidate:
    rows, columns = module.shape[0], module.delta_width
    return Candidate(
        values=measured.values if measured else (),
        norm=measured.norm if measured else 0.0,
        full=min(rows, columns),
        unit=(rows + columns) * DTYPES[dtype] // 8,
        kernel=any(size > 1 for size in module.shape[2:]),
    )


def _is_small(measured: _Measured, wish: Wish) -> bool:
    return measured.norm == 0 or measured.change <= wish.min_norm


def _skipped(place: Place, measured: _Measured) -> Skipped:
    return Skipped(place.module.title, place.module.component, measured.norm, measured.change)


class Gate:
    """Lets threads work on weights as long as there is room for them, in memory and on the device."""

    def __init__(self, device: str, room: int = ROOM) -> None:
        self._room, self._used, self._changed = room, 0, Condition()
        self.device: Any = nullcontext()
        if device != "cpu":
            self.device = Semaphore(_AT_ONCE)
            # torch loads its solvers at their first call, and fails where two threads make it.
            torch.linalg.eigh(torch.eye(2, device=device))

    @contextmanager
    def open(self, place: Place) -> Iterator[None]:
        """Waits for room for one weight; the largest has it when it is alone."""
        size = _PER_VALUE * place.module.shape[0] * place.module.delta_width
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._room)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def _difference(sides: Sides, place: Place) -> tuple[Tensor, _Measured]:
    difference, whole = sides.difference(place.module)
    if not all_finite(difference):
        raise sides.sick(place.module.title, (piece for _, piece in sides.base.pieces(place.module)))
    norm = norm_of(difference)
    if norm > LARGEST:
        too_much = f"differs by {norm:.2g}, more than float32 can be computed with"
        raise FormatError(too_much, file=sides.tuned.path, key=place.module.title)
    return difference, _Measured(norm, whole)


def _measured(sides: Sides, place: Place, wish: Wish, gate: Gate) -> _Measured:
    with gate.open(place):
        difference, found = _difference(sides, place)
        if _is_small(found, wish):
            return found
        with gate.device:
            return found._replace(values=tuple(singular_values(difference.to(wish.device))))


def _made(sides: Sides, place: Place, rank: int, wish: Wish, gate: Gate) -> Found | Skipped:
    with gate.open(place):
        difference, measured = _difference(sides, place)
        if _is_small(measured, wish):
            return _skipped(place, measured)
        with gate.device:
            found = _stored(difference.to(wish.device), rank, measured.norm, wish)
    up, down, error, image, exact = found
    shape, count = place.module.shape, down.shape[0]
    ones = (1,) * len(shape[2:])
    factors = {
        "up": LazyTensor.from_torch(up.reshape(shape[0], count, *ones)),
        "down": LazyTensor.from_torch(down.reshape(count, *shape[1:])),
    }
    module = replace(place.module, factors=factors, alpha=float(count))
    share = error / measured.norm
    cut = Cut(
        title=module.title,
        component=module.component,
        rank_before=min(shape[0], module.delta_width),
        rank_after=count,
        norm=measured.norm,
        energy=max(1 - share * share, 0.0),
        error=share,
        bytes_before=shape[0] * module.delta_width * DTYPES[_dtype_of(sides, place)] // 8,
        bytes_after=sum(factor.nbytes for factor in factors.values()),
        importance=measured.change if math.isfinite(measured.change) else None,
    )
    return Found(module, cut, image, exact)


def _dtype_of(sides: Sides, place: Place) -> str:
    row = sides.tuned.find(place.module.targets[0])
    assert row is not None
    return row.tensor.dtype


class _Stored(NamedTuple):
    """Rounded factors on the CPU, the norm of what they miss, and what `Found` has."""

    up: Tensor
    down: Tensor
    error: float
    image: Array
    exact: bool


def _stored(difference: Tensor, rank: int, norm: float, wish: Wish) -> _Stored:
    """The pair as it will be stored, and its distance from the difference: computed, not inferred from the values.

    A randomised pair that is farther off than its singular values and rounding explain is found again exactly.
    """
    pair = leading(difference, rank, exact=wish.exact)
    up, down = (factor.to(torch_dtype(wish.dtype)).contiguous() for factor in _clamped(pair, wish.clamp))
    error = take_away(difference, up, down)
    if not pair.exact and wish.clamp is None and _explained(pair, norm, wish.dtype) < error < math.inf:
        difference.addmm_(up.float(), down.float())
        return _stored(difference, rank, norm, replace(wish, exact=True))
    left, right = _clamped(pair, wish.clamp)
    seen = torch.from_numpy(vectors(right.shape[1])).to(right.device).double()
    image: Array = (left.double() @ (right.double() @ seen)).float().cpu().numpy()
    return _Stored(up.cpu(), down.cpu(), error, image, pair.exact)


def _explained(pair: Pair, norm: float, dtype: str) -> float:
    """How far off a pair may be: by the values that it leaves out, by rounding of its factors and in float32."""
    kept = float(pair.values.square().sum())
    rounding = ROUNDING.get(dtype, EXACT) * math.sqrt(kept)
    return math.sqrt(max(norm**2 - kept, 0.0) + rounding**2) * 1.001 + 1e-3 * norm


def _clamped(pair: Pair, quantile: float | None) -> tuple[Tensor, Tensor]:
    """The factors; with a quantile as the popular scripts make them: all singular values in the left one, and entries
    beyond that quantile of both cut off."""
    if quantile is None:
        return pair.left, pair.right
    root = pair.values.sqrt().to(pair.left)
    up, down = pair.left * root, pair.right / root[:, None]
    entries = torch.cat([up.flatten(), down.flatten()]).cpu().numpy()
    most = float(np.quantile(entries, quantile))
    return up.clamp(-most, most), down.clamp(-most, most)


# -- what no pair can update ------------------------------------------------------------------------------------------


class Rest(NamedTuple):
    """A norm, a bias or an embedding that differs: `norm` is that of its difference; `tensor` is the difference, made
    when it is written, under the key of a layout (None where that has none)."""

    kind: str
    norm: float
    key: str | None
    tensor: LazyTensor | None


def check_full(layout: str) -> None:
    """Raises NotRepresentable for a layout without a spelling for full differences."""
    if layout not in FULL_LAYOUTS:
        raise NotRepresentable(
            f"{layout} has no spelling for the full difference of a norm or a bias",
            hint=f"leave --full out, or use --to {' or --to '.join(FULL_LAYOUTS)}",
        )


def rest_of(sides: Sides, places: Sequence[Place], layout: Layout, dtype: str) -> tuple[Rest, ...]:
    """All norms, biases and embeddings that differ, and other parameters of a model without a table.

    Each is compared in float32. Raises FormatError for NaN and infinite values.
    """
    found = []
    for place in places:
        if place.kind in (NORM, EMBEDDING):
            found += _weight_rest(sides, place, layout, dtype)
        found += _bias_rest(sides, place, layout, dtype)
    for title, before, after in sides.others():
        norm = distance(before, after)
        if not math.isfinite(norm):
            raise sides.sick(title, [before.load()])
        found += [Rest(OTHER, norm, None, None)] if norm else []
    return tuple(found)


def _weight_rest(sides: Sides, place: Place, layout: Layout, dtype: str) -> list[Rest]:
    _, measured = _difference(sides, place)
    if not measured.norm:
        return []
    rows, width = place.module.shape[:2]
    shape = (rows,) if place.kind == NORM else (rows, width)
    tensor = LazyTensor.computed(
        shape, dtype, lambda: _fitting(sides.difference(place.module)[0].reshape(shape), dtype, place)
    )
    return [Rest(place.kind, measured.norm, _key(sides, place, layout, ".diff"), tensor)]


def _bias_rest(sides: Sides, place: Place, layout: Layout, dtype: str) -> list[Rest]:
    both = sides.biases(place.module)
    if both is None:
        return []
    before, after = both
    difference = after - before
    if not bool((difference != 0).any()):
        return []
    norm = norm_of(difference[None])
    if not math.isfinite(norm):
        raise sides.sick(f"{place.module.title}.bias", [before])
    key = _key(sides, place, layout, ".diff_b")
    tensor = None if key is None else LazyTensor.from_torch(_fitting(difference, dtype, place))
    return [Rest(BIAS, norm, key, tensor)]


def _fitting(difference: Tensor, dtype: str, place: Place) -> Tensor:
    """A difference as it is stored. Raises LoratoolError where it is beyond the range of the dtype."""
    made = difference.to(torch_dtype(dtype)).contiguous()
    if not bool(made.isfinite().all()):
        raise LoratoolError(f"the difference does not fit {dtype}", key=place.module.title, hint="--dtype bf16 or fp32")
    return made


def _key(sides: Sides, place: Place, layout: Layout, suffix: str) -> str | None:
    """The key of a difference; ComfyUI calls a parameter that is no module's `weight` by its own name. In kohya a bias
    beside a pair would be a second adapter of one module."""
    if layout.id not in FULL_LAYOUTS or (layout.id == "kohya" and place.kind == LINEAR):
        return None
    voices = layout.written(sides.architecture)
    stem = layout.stem(place.module, sides.architecture, voices)
    naming = sides.architecture.naming(place.module.component, voices[place.module.component].naming)
    home = naming.home(place.module.targets[0])
    if suffix == ".diff" and layout.separator == "." and not home.tensor_key.endswith(".weight"):
        stem = stem[: -len(home.name)] + home.tensor_key
    return stem + suffix


def finite_or_raise(extraction: Extraction, dtype: str) -> None:
    """Raises LoratoolError where factors are beyond the range of the dtype they are stored in."""
    for one in extraction.found:
        if not math.isfinite(one.cut.error):
            raise LoratoolError(f"the factors do not fit {dtype}", key=one.module.title, hint="--dtype bf16 or fp32")
