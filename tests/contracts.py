"""The contracts that every plug-in must keep, each one function that raises AssertionError."""

from __future__ import annotations

from collections.abc import Iterable

from loratool.core.architecture import Architecture, Voice
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
