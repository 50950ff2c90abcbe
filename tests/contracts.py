"""The contracts that every plug-in must keep, each one function that raises AssertionError."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import pytest
import torch

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture, Voice
from loratool.core.errors import NotExact
from loratool.core.family import Factors, Family, Part, Product
from loratool.core.layout import Layout
from loratool.core.method import Method, Update
from loratool.core.naming import Naming, kind
from loratool.core.program import DROPS, EFFECTS, FACTS, IGNORES, REFUSES, SCALES, SCALINGS, Program, When
from loratool.core.registry import architectures, families, layouts
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor

# A PEFT folder and a diffusers component folder each hold one component, which their names do not tell.
ONE_COMPONENT_LAYOUTS = frozenset({"peft"})
ONE_COMPONENT_CHECKPOINTS = frozenset({"diffusers", "diffusers-short"})


def check_architecture(architecture: Architecture) -> None:
    """In every size namings are bijections over the same targets, shapes add up, voices exist and never say two things;
    and no two sizes are the same."""
    for size in architecture.sizes:
        _check_size(size)
    for size in architecture.sizes[1:]:
        if size.blocks is architecture.blocks and size.blocks is not None:
            _check_as_many_blocks(architecture, size)
    assert len({size.title for size in architecture.sizes}) == len(architecture.sizes), "two sizes with one title"
    assert len({size.targets for size in architecture.sizes}) == len(architecture.sizes), "two sizes that are the same"


def _check_as_many_blocks(standard: Architecture, size: Architecture) -> None:
    """Detection takes it that a size with the standard's blocks has the same names of every kind that both have."""
    for component in standard.components:
        for naming_id, naming in standard.namings(component).items():
            other = size.namings(component)[naming_id]
            shared = {kind(name) for name in naming} & {kind(name) for name in other}
            ours, theirs = ({name for name in table if kind(name) in shared} for table in (naming, other))
            assert ours == theirs, f"{size.title}, {component} {naming_id}: other blocks, but no `blocks` of its own"


def _check_size(architecture: Architecture) -> None:
    assert architecture.components, "an architecture has components"
    for component in architecture.components:
        _check_namings(architecture, component)
    for component in architecture.outlines:
        _check_outline(architecture, component)
    for layout in {*architecture.writes, *architecture.reads}:
        voices = architecture.voices(layout)
        _check_voices_exist(architecture, voices)
        assert len(set(voices)) == len(voices), f"{layout} has a voice twice"
        if written := architecture.writes.get(layout):  # some layouts can only be read
            unwritten = set(architecture.reads.get(layout, ())) - set(written)
            assert not unwritten, f"{layout} reads {unwritten} but cannot write it"
        _check_spellings(architecture, voices, by_component=layout in ONE_COMPONENT_LAYOUTS)
    for checkpoint in architecture.checkpoints:
        spoken = list(checkpoint.voices.items())
        _check_voices_exist(architecture, spoken)
        _check_tensor_keys(architecture, spoken, by_component=checkpoint.id in ONE_COMPONENT_CHECKPOINTS)
    ids = [checkpoint.id for checkpoint in architecture.checkpoints]
    assert len(set(ids)) == len(ids), "two checkpoints with one id"


def _check_namings(architecture: Architecture, component: str) -> None:
    namings = architecture.namings(component)
    canonical = next(iter(namings.values()))
    _check_targets(canonical.targets, component)
    for name, targets in canonical.items():
        assert {target.module_path for target in targets} == {name}, f"{name} is not canonical"
    for naming_id, naming in namings.items():
        assert naming.targets == canonical.targets, f"{component} {naming_id}: other targets than the canonical naming"
        keys = set()
        for name, targets in naming.items():
            where = f"{component} {naming_id} {name}"
            assert targets, f"{where} holds nothing"
            assert naming.name_of(targets) == name, where
            assert len({target.shape[1:] for target in targets}) == 1, f"{where}: its targets cannot be stacked"
            row = 0
            for target in targets:
                home = naming.home(target)
                assert (home.name, home.first_row) == (name, row), f"{where}: {target.path} does not find home"
                row += target.rows
            keys.add(naming.home(targets[0]).tensor_key)
        assert len(keys) == len(naming), f"{component} {naming_id}: one tensor key for two names"
        rows = sum(target.rows for targets in naming.values() for target in targets)
        assert rows == sum(target.rows for target in canonical.targets), f"{component} {naming_id}: rows do not add up"


def _check_outline(architecture: Architecture, component: str) -> None:
    """An outline is smaller than its tables, and has every kind of name of theirs in every shape."""
    whole, outline = architecture.namings(component), architecture.outlines[component]()
    assert outline.keys() == whole.keys(), f"{component}: the outline has other namings"
    for naming_id, naming in whole.items():
        assert len(outline[naming_id]) < len(naming), f"{component} {naming_id}: the outline is no smaller"
        assert _kinds(outline[naming_id]) == _kinds(naming), f"{component} {naming_id}: kinds that the outline lacks"


def _kinds(naming: Naming) -> set[tuple[str, tuple[int, ...]]]:
    return {
        (kind(name), (sum(target.rows for target in targets), *targets[0].shape[1:]))
        for name, targets in naming.items()
    }


def _check_targets(targets: Iterable[Target], component: str) -> None:
    paths = set()
    for target in targets:
        assert target.component == component, f"{target.path} is of {target.component}, not of {component}"
        assert target.shape and all(size > 0 for size in target.shape), f"{target.path} has no shape"
        assert target.path not in paths, f"{target.path} is two targets"
        paths.add(target.path)


def _check_voices_exist(architecture: Architecture, voices: Iterable[tuple[str, Voice]]) -> None:
    for component, voice in voices:
        assert component in architecture.components, f"no component {component}"
        assert voice.naming in architecture.namings(component), f"{component} has no naming {voice.naming}"


def _check_spellings(architecture: Architecture, voices: list[tuple[str, Voice]], by_component: bool) -> None:
    """No flattened spelling of two voices of a layout means two things, be they written or only read.

    Nor of one voice: there the dots tell names apart that the underscores may not.
    """
    said: dict[tuple[str, str], tuple[Target, ...]] = {}
    for component, voice in voices:
        names = architecture.naming(component, voice.naming)
        spellings = {f"{voice.prefix}{name}".replace(".", "_") for name in names}
        assert len(spellings) == len(names), f"{component} {voice} collides with itself"
        for name, targets in names.items():
            spelling = (component if by_component else "", f"{voice.prefix}{name}".replace(".", "_"))
            assert said.setdefault(spelling, targets) == targets, f"{spelling[1]} means two things"


def _check_tensor_keys(architecture: Architecture, voices: list[tuple[str, Voice]], by_component: bool) -> None:
    seen: set[tuple[str, str]] = set()
    for component, voice in voices:
        naming = architecture.naming(component, voice.naming)
        for key in {naming.home(targets[0]).tensor_key for targets in naming.values()}:
            entry = (component if by_component else "", voice.prefix + key)
            assert entry not in seen, f"two components have the key {entry[1]}"
            seen.add(entry)


def check_family(
    family: Family, samples: Mapping[str, tuple[Factors, float | None]], optional: Iterable[str] = ()
) -> None:
    """A family keeps its promises on every sample, a pair of factors (float64) and alpha.

    `optional` are the roles without which a module is still whole; a module without any other one is reported.
    """
    for name, (factors, alpha) in samples.items():
        shapes = {role: factor.shape for role, factor in factors.items()}
        assert family.problem(shapes) is None, f"{name}: {family.problem(shapes)}"
        for role in factors.keys() - set(optional):
            rest = {other: shape for other, shape in shapes.items() if other != role}
            assert family.problem(rest) is not None, f"{name}: nobody misses {role}"
        if not family.additive:
            _check_change(family, factors, family.scale(shapes, alpha), name)
            continue
        whole = dense(family, factors, family.scale(shapes, alpha))
        assert tuple(whole.shape) == family.shape(shapes), name
        assert family.rank(shapes) >= 0, name
        loaded = {role: factor.load().double() for role, factor in factors.items()}
        weight = torch.randn(whole.reshape(len(whole), -1).shape, dtype=torch.float64)
        applied = family.apply(loaded, family.scale(shapes, alpha), weight, -0.7)
        assert_same(applied, weight - 0.7 * whole.reshape(weight.shape), f"{name}: applied")
        _check_scale(family, factors, name)
        _check_rows(family, factors, whole / family.scale(shapes, alpha), name)
        _check_components(family, factors, name)
        _check_product(family, factors, name)


def _check_change(family: Family, factors: Factors, scale: float, name: str) -> None:
    """A family that changes the weight: linear in it, exact by rows, told in words where it has no answer."""
    shapes = {role: factor.shape for role, factor in factors.items()}
    out, width = family.shape(shapes)[0] or 7, prod(family.shape(shapes)[1:]) or 18
    torch.manual_seed(0)
    weight, other = (torch.randn(out, width, dtype=torch.float64) for _ in range(2))

    def applied(factors: Factors, weight: torch.Tensor, strength: float) -> torch.Tensor:
        loaded = {role: factor.load().to(weight.dtype) for role, factor in factors.items()}
        kept = {role: tensor.clone() for role, tensor in loaded.items()}
        made = family.apply(loaded, scale, weight, strength)
        assert all(torch.equal(kept[role], tensor) for role, tensor in loaded.items()), f"{name}: factors changed"
        return made

    whole = applied(factors, weight, 0.6)
    assert whole.shape == weight.shape and whole.dtype == weight.dtype, name
    single = applied(factors, weight.float(), 0.6)
    assert single.dtype == torch.float32, name
    assert_same(single, whole, f"{name} in float32", 1e-5)
    mixed = applied(factors, weight * 0.25 + other * 0.75, 0.6)
    assert_same(mixed, whole * 0.25 + applied(factors, other, 0.6) * 0.75, f"{name}: affine in the weight")
    assert family.rank(shapes) >= 0 and family.product(factors) is None and family.live(factors) is None, name
    if grain := family.grain(shapes):
        for start in range(0, out, grain):
            stop = min(start + grain, out)
            part = applied(family.rows(factors, start, stop), weight[start:stop], 0.6)
            assert_same(part, whole[start:stop], f"{name}, grain {start}")
    cuts = sorted({0, 1, out // 2, out - 1, out} | {n for n in range(1, out) if out % n == 0})
    for start, stop in ((a, b) for a in cuts for b in cuts if a < b):
        try:
            part = family.rows(factors, start, stop)
        except NotExact as error:
            assert str(error), name
            continue
        assert family.problem({role: factor.shape for role, factor in part.items()}) is None, name
        assert_same(applied(part, weight[start:stop], 0.6), whole[start:stop], f"{name}[{start}:{stop}]")
    for cut in cuts[1:-1]:
        try:
            parts = [Part(cut, family.rows(factors, 0, cut)), Part(out - cut, family.rows(factors, cut, out))]
            stacked = family.stacked(parts)
        except NotExact as error:
            assert str(error), name
            continue
        assert_same(applied(stacked, weight, 0.6), whole, f"{name} cut at {cut}")
    for refused in (
        lambda: family.delta({}, 1.0),
        lambda: family.scaled(factors, 0.5),
        lambda: family.stacked([Part(3, factors), Part(4, factors, 0.5)]),
    ):
        with pytest.raises(NotExact) as told:
            refused()
        assert str(told.value), name
    assert family.scaled(factors, 1.0) == dict(factors), name


def dense(family: Family, factors: Factors, scale: float = 1.0) -> torch.Tensor:
    """The update of some factors, float64."""
    return family.delta({role: factor.load().double() for role, factor in factors.items()}, scale)


def assert_same(found: torch.Tensor, expected: torch.Tensor, message: str, tolerance: float = 1e-12) -> None:
    """Equal shapes, and values up to a relative Frobenius error."""
    assert found.shape == expected.shape, f"{message}: {tuple(found.shape)} instead of {tuple(expected.shape)}"
    error = float((found.double() - expected.double()).norm())
    assert error <= tolerance * float(expected.double().norm()), f"{message}: differs by {error:.3g}"


def _check_scale(family: Family, factors: Factors, name: str) -> None:
    """`scale` and `alpha` are inverse, alpha = rank is scale 1, and the update is proportional to the scale."""
    shapes = {role: factor.shape for role, factor in factors.items()}
    assert family.scale(shapes, None) == 1.0, name
    assert family.scale(shapes, float(family.rank(shapes))) == 1.0, name
    if family.scale(shapes, 2.0 * family.rank(shapes)) != 1.0:  # else alpha means nothing to these factors
        for scale in (0.125, 0.3, 1.0, 7.0):
            assert family.scale(shapes, family.alpha(shapes, scale)) == pytest.approx(scale, rel=1e-12), name
    assert_same(dense(family, factors, 0.25), dense(family, factors) * 0.25, f"{name}: scale 0.25")


def _check_rows(family: Family, factors: Factors, whole: torch.Tensor, name: str) -> None:
    """`rows` are rows of the update, and `stacked` puts them together again. Or NotExact, told in words."""
    out = whole.shape[0]
    if grain := family.grain({role: factor.shape for role, factor in factors.items()}):
        for start in range(0, out, grain):
            part = family.rows(factors, start, min(start + grain, out))
            assert_same(dense(family, part), whole[start : start + grain], f"{name}, grain {start}")
    cuts = sorted({0, 1, out // 3, out // 2, out - 1, out} | {n for n in range(1, out) if out % n == 0})
    for start, stop in ((a, b) for a in cuts for b in cuts if a < b):
        try:
            part = family.rows(factors, start, stop)
        except NotExact as error:
            assert str(error), name
            continue
        shapes = {role: factor.shape for role, factor in part.items()}
        assert family.problem(shapes) is None, f"{name}[{start}:{stop}]: {family.problem(shapes)}"
        assert family.shape(shapes) == (stop - start, *whole.shape[1:]), f"{name}[{start}:{stop}]"
        assert_same(dense(family, part), whole[start:stop], f"{name}[{start}:{stop}]")
    for cut in cuts[1:-1]:
        try:
            upper, lower = family.rows(factors, 0, cut), family.rows(factors, cut, out)
        except NotExact:
            continue
        _check_stack(family, [Part(cut, upper), Part(out - cut, lower)], whole, f"{name} cut at {cut}")
        swapped = torch.cat([whole[cut:], whole[:cut]])
        _check_stack(family, [Part(out - cut, lower), Part(cut, upper)], swapped, f"{name} swapped at {cut}")
        scaled = torch.cat([whole[:cut], whole[cut:] * 0.5])
        _check_stack(family, [Part(cut, upper), Part(out - cut, lower, 0.5)], scaled, f"{name} with a gain")
        holed = torch.cat([whole[:cut], torch.zeros_like(whole[cut:])])
        _check_stack(family, [Part(cut, upper), Part(out - cut, None)], holed, f"{name} with a hole")


def _check_stack(family: Family, parts: list[Part], expected: torch.Tensor, name: str) -> None:
    try:
        factors = family.stacked(parts)
    except NotExact as error:
        assert str(error), name
        return
    shapes = {role: factor.shape for role, factor in factors.items()}
    assert family.problem(shapes) is None, f"{name}: {family.problem(shapes)}"
    assert_same(dense(family, factors), expected, name)


def _check_components(family: Family, factors: Factors, name: str) -> None:
    """Keeping the live rank components keeps the update."""
    live = family.live(factors)
    if live is None:
        return
    assert sorted(set(live)) == list(live), name
    kept = family.keep(factors, live)
    assert family.rank({role: factor.shape for role, factor in kept.items()}) == len(live), name
    assert_same(dense(family, kept), dense(family, factors), f"{name}: its live components")


def _check_product(family: Family, factors: Factors, name: str) -> None:
    """The product is (part of) the update: put back it changes nothing, its norm times `gain` is the update's, and a
    product of a lower rank makes a whole module of the same shape."""
    shapes = {role: factor.shape for role, factor in factors.items()}
    loaded = {role: factor.load().double() for role, factor in factors.items()}
    whole, product = dense(family, factors), family.product(factors)
    _check_scaled(family, factors, whole, name)
    if product is None:
        return
    left = product.left.load()
    if product.right is None:
        matrix = left
    elif product.core is None:
        matrix = left @ product.right.load()
    else:
        matrix = torch.einsum("mp,pqk,qn->mnk", left, product.core.load().flatten(2), product.right.load()).flatten(1)
    if product.whole:
        assert_same((matrix.T if product.transposed else matrix).reshape(whole.shape), whole, f"{name}: its product")
    gain = family.gain(loaded)
    assert gain * float(matrix.norm()) == pytest.approx(float(whole.norm()), rel=1e-9), name
    assert product.rank >= 1, name
    if product.right is not None:
        again = family.with_product(factors, product)
        assert {role: factor.shape for role, factor in again.items()} == shapes, name
        assert_same(dense(family, again), whole, f"{name}: its own product put back")
    if product.whole and product.right is None:  # the update itself: another one of the same size
        again = family.with_product(factors, Product(LazyTensor.from_torch(left * 2), None))
        assert_same(dense(family, again), whole * 2, f"{name}: another whole")
        with pytest.raises(NotExact):
            family.with_product(factors, Product(product.left, product.left))
        return
    for rank in range(1, min(product.rank, 4)):
        one = LazyTensor.from_torch(left[:, :1].repeat(1, rank).contiguous())
        row = matrix[:1] if product.right is None else product.right.load()[:1]
        other = LazyTensor.from_torch(row.repeat(rank, 1).contiguous())
        core = (
            None
            if product.core is None
            else LazyTensor.from_torch(
                product.core.load()[:1, :1].repeat(rank, rank, *(1,) * (len(product.core.shape) - 2)).contiguous()
            )
        )
        made = family.with_product(factors, Product(one, other, core, product.whole, product.transposed))
        kept = {role: factor.shape for role, factor in made.items()}
        assert family.problem(kept) is None, f"{name} at rank {rank}: {family.problem(kept)}"
        assert prod(family.shape(kept)) == prod(family.shape(shapes)), f"{name} at rank {rank}"
        assert family.shape(kept)[0] == family.shape(shapes)[0], f"{name} at rank {rank}"
        assert family.product(made).rank == rank, f"{name} at rank {rank}"
        assert family.scale(kept, family.alpha(kept, 0.3)) == pytest.approx(0.3), f"{name} at rank {rank}"


def _check_scaled(family: Family, factors: Factors, whole: torch.Tensor, name: str) -> None:
    """`scaled` scales, and keeps shapes and dtypes."""
    assert family.scaled(factors, 1.0) == dict(factors), name
    for by in (-0.5, 3.0, 0.0):
        made = family.scaled(factors, by)
        assert {role: (f.shape, f.dtype) for role, f in made.items()} == {
            role: (f.shape, f.dtype) for role, f in factors.items()
        }, name
        assert_same(dense(family, made), whole * by, f"{name} times {by}")
        if "bias" in factors:
            assert_same(made["bias"].load(), factors["bias"].load() * by, f"{name}: its bias times {by}")


# -- layouts --------------------------------------------------------------------------------------------------------


def check_layout(layout: Layout, bundle: Bundle, architecture: Architecture) -> None:
    """`write(read(x)) == x`, byte for byte, for a file whose keys are those that the layout writes.

    What a layout says in the header or beside the file may be said in other words the first time (the same ranks and
    scales as one pattern or as twenty); from then on every byte stays.
    """
    adapter = layout.read(bundle, architecture)
    assert adapter.layout == layout.id
    assert not adapter.extras, f"unread: {list(adapter.extras)}"
    written = layout.write(adapter)
    assert_same_tensors(bundle, written)
    entries = {*layout.header_entries, "format"}
    assert _without(written.metadata, entries) == _without(bundle.metadata, entries)
    again = layout.read(written, architecture)
    assert [m.targets for m in again.modules] == [m.targets for m in adapter.modules]
    for before, after in zip(adapter.modules, again.modules, strict=True):
        assert before.scale == after.scale, before.title
    twice = layout.write(again)
    assert list(twice.tensors) == list(written.tensors)
    assert_same_tensors(written, twice)
    assert (twice.metadata, twice.side_files) == (written.metadata, written.side_files)


def assert_same_tensors(left: Bundle, right: Bundle) -> None:
    """The same keys with the same dtypes, shapes and bytes, in any order."""
    assert left.tensors.keys() == right.tensors.keys()
    for key, tensor in left.tensors.items():
        other = right.tensors[key]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key
        assert bytes(tensor.read()) == bytes(other.read()), key


def _without(metadata: Mapping[str, str], entries: set[str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in entries}


# -- merge methods --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairUpdate:
    """An update for tests: a pair of factors with the scale in them."""

    index: int
    name: str
    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left, self.right

    def dense(self) -> torch.Tensor:
        return self.left @ self.right


NEUTRAL = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}
ACTIVE = {"density": 0.6, "epsilon": 0.2, "gamma": 0.1, "select_topk": 0.5, "t": 0.2}
"""Option values with which a method does all that it can do."""


def random_updates(ranks: Iterable[int], shape: tuple[int, int] = (12, 9), seed: int = 0) -> list[PairUpdate]:
    """float64 updates of one weight, of these ranks; rank 0 is an adapter without the module."""
    noise = torch.Generator().manual_seed(seed)
    out, columns = shape
    return [
        PairUpdate(
            index,
            "blocks.0.attn",
            torch.randn(out, rank, generator=noise, dtype=torch.float64),
            torch.randn(rank, columns, generator=noise, dtype=torch.float64),
        )
        for index, rank in enumerate(ranks)
    ]


def merged(method: Method, updates: Sequence[Update], weights: Sequence[float], **options: Any) -> torch.Tensor:
    """What a method makes of some updates, dense. Checks shape, dtype and that every value is finite."""
    found = method.apply(updates, weights, options)
    if isinstance(found, tuple):
        left, right = found
        assert left.shape[1] == right.shape[0], method.id
        found = left @ right
    assert tuple(found.shape) == updates[0].shape, method.id
    assert found.dtype == updates[0].dense().dtype, f"{method.id} changes the dtype"
    assert torch.isfinite(found).all(), f"{method.id}: not finite with weights {list(weights)}, {options}"
    return found


def check_merge_method(method: Method) -> None:
    """One input is itself, order matters just where the method says so, and no input gives NaN."""
    assert all((method.title, method.source, method.when)) and len(method.formula.splitlines()) == 1
    fewest, most = method.inputs
    assert fewest == 1, "one input is itself"
    for option in method.options.values():
        assert option.default is not inspect.Parameter.empty, f"{method.id}: {option.name} has no default"
    neutral = {name: value for name, value in NEUTRAL.items() if name in method.options}
    active = {name: value for name, value in ACTIVE.items() if name in method.options}
    _check_identity(method, neutral)
    _check_degenerate(method, [{}, neutral, active], 2 if most == 2 else 3)
    _check_order(method, active, 2 if most == 2 else 3)
    _check_inputs_stay(method, active)
    if method.exact:
        updates, weights = random_updates((2, 3, 0)), (0.5, -1.5, 2.0)
        expected = sum((u.dense() * w for u, w in zip(updates, weights)), torch.zeros(12, 9, dtype=torch.float64))
        assert_same(merged(method, updates, weights), expected, f"{method.id} calls itself exact")


def _check_identity(method: Method, neutral: Mapping[str, Any]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        one = random_updates((3,))[0]
        one = PairUpdate(0, one.name, one.left.to(dtype), one.right.to(dtype))
        assert_same(merged(method, [one], [1.0], **neutral), one.dense(), f"{method.id}: one input", tolerance)
    assert_same(merged(method, [one], [1.0]), one.dense(), f"{method.id}: one input, defaults", 2e-6)


def _check_degenerate(method: Method, settings: Iterable[Mapping[str, Any]], inputs: int) -> None:
    full, other, missing = random_updates((2, 2, 0))
    groups = {
        "missing": [missing] * inputs,
        "some missing": [full, missing, other][:inputs],
        "zero": [_times(full, 0.0)] * inputs,
        "some zero": [full, _times(full, 0.0), other][:inputs],
        "parallel": [full, _times(full, 3.0), full][:inputs],
        "nearly parallel": [full, _times(full, 1 + 1e-9), full][:inputs],
        "opposite": [full, _times(full, -1.0), full][:inputs],
        "opposite, unlike": [full, _times(full, -2.5), missing][:inputs],
        "tiny": [_times(full, 1e-12), _times(other, 1e-12), _times(full, -1e-12)][:inputs],
        "uneven": [_times(full, 1e6), _times(other, 1e-6), full][:inputs],
    }
    for options in settings:
        for name, group in groups.items():
            for weights in ((1.0, 1.0, 1.0), (0.5, -0.5, 0.0), (0.0, 0.0, 0.0), (-1.0, 2.0, 0.3)):
                for dtype in (torch.float64, torch.float32):
                    updates = [
                        PairUpdate(index, u.name, u.left.to(dtype), u.right.to(dtype)) for index, u in enumerate(group)
                    ]
                    found = merged(method, updates, weights[:inputs], **options)
                    largest = max(float(u.dense().abs().max()) for u in updates)
                    assert found.abs().max() <= 100 * largest, f"{method.id} blows up what is {name}"


def _times(update: PairUpdate, factor: float) -> PairUpdate:
    return PairUpdate(update.index, update.name, update.left * factor, update.right)


def _check_order(method: Method, active: Mapping[str, Any], inputs: int) -> None:
    """In another order, every adapter gets another index, as on the command line."""
    updates, weights = random_updates([2] * inputs), [1.0, 0.4, 0.7][:inputs]
    same = []
    for order in permutations(range(inputs)):
        moved = [PairUpdate(new, updates[old].name, *updates[old].pair()) for new, old in enumerate(order)]
        found = merged(method, moved, [weights[old] for old in order], **active)
        expected = merged(method, updates, weights, **active)
        same.append(float((found - expected).norm()) <= 1e-9 * float(expected.norm()))
    assert all(same) is method.symmetric, f"{method.id}: symmetric is {method.symmetric}, same results: {same}"


def _check_inputs_stay(method: Method, active: Mapping[str, Any]) -> None:
    updates, untouched = random_updates((2, 2)), random_updates((2, 2))
    first = merged(method, updates, [1.0, -0.5], **active)
    assert torch.equal(first, merged(method, updates, [1.0, -0.5], **active)), f"{method.id} is not reproducible"
    for update, before in zip(updates, untouched):
        assert torch.equal(update.left, before.left) and torch.equal(update.right, before.right), method.id


# -- programs -------------------------------------------------------------------------------------------------------


def check_program(program: Program) -> None:
    """Rules name what exists, say why, and can be told; version and source are told."""
    assert all((program.title, program.version, program.sources)), program.id
    assert all(source.startswith("https://") for source in program.sources), program.id
    assert "*" in program.writes, f"{program.id}: no layouts for models that it does not name"
    assert When() not in program.reads, f"{program.id}: one of `reads` is every file"
    _check_ids(program)
    whens = [*program.reads, *(rule.when for rule in program.rules)]
    for expression in (text for when in whens for text in (when.keys, when.paths, when.first, when.beside)):
        re.compile(expression)
    for when in whens:
        re.compile(when.lacking.replace("{parent}", "a"))
        assert set(when.has) <= set(FACTS), f"{program.id}: {set(when.has) - set(FACTS)} are no facts"
    for rule in program.rules:
        assert rule.does in EFFECTS, f"{program.id}: {rule.does} is no effect"
        assert (rule.what in SCALINGS) is (rule.does == SCALES), f"{program.id}: {rule.why}"
        assert bool(rule.what) is (rule.does in (SCALES, DROPS)), f"{program.id}: {rule.why}"
        assert not rule.unread or rule.does == REFUSES, f"{program.id}: only what is refused may be unread"
        assert rule.why and not rule.why.endswith(".") and rule.why[0].islower(), f"{program.id}: {rule.why!r}"
    for key in (*program.keys, program.other_keys):
        re.compile(key.keys)
        assert key.does in ("", REFUSES, IGNORES), program.id
        assert bool(key.why) is bool(key.does), f"{program.id}: {key.keys}"
    if program.rank is not None:
        assert list(program.rank.choices) == sorted(program.rank.choices)
        assert program.rank.default in program.rank.choices


def _check_ids(program: Program) -> None:
    whens = [*program.reads, *(rule.when for rule in program.rules)]
    named = {
        "families": {one for when in whens for one in when.families},
        "layouts": {one for when in whens for one in when.layouts}
        | {one for key in program.keys for one in key.layouts}
        | {one for names in program.writes.values() for one in names},
        "architectures": {one for when in whens for one in when.architectures}
        | {one for key in program.keys for one in key.architectures}
        | program.writes.keys() - {"*"},
    }
    known = {"families": families(), "layouts": layouts(), "architectures": architectures()}
    for what, ids in named.items():
        strange = ids - known[what].keys()
        assert not strange, f"{program.id}: no {what} are called {', '.join(sorted(strange))}"
