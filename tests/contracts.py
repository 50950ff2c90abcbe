"""The contracts that every plug-in must keep, each one function that raises AssertionError."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
import torch

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture, Voice
from loratool.core.errors import NotExact
from loratool.core.family import Factors, Family, Part
from loratool.core.layout import Layout
from loratool.core.target import Target

# A PEFT folder and a diffusers component folder each hold one component, which their names do not tell.
ONE_COMPONENT_LAYOUTS = frozenset({"peft"})
ONE_COMPONENT_CHECKPOINTS = frozenset({"diffusers", "diffusers-short"})


def check_architecture(architecture: Architecture) -> None:
    """Namings are bijections over the same targets, shapes add up, voices exist and never say two things."""
    assert architecture.components, "an architecture has components"
    for component in architecture.components:
        _check_namings(architecture, component)
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
        whole = dense(family, factors, family.scale(shapes, alpha))
        assert tuple(whole.shape) == family.shape(shapes), name
        assert family.rank(shapes) >= 1, name
        _check_scale(family, factors, name)
        _check_rows(family, factors, whole / family.scale(shapes, alpha), name)
        _check_components(family, factors, name)


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
