"""Every program keeps the contract, and what is converted for it, it loads fully by its own rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loratool.core.errors import LoratoolError
from loratool.core.program import REFUSES, KeyRule, Program, Rule, When
from loratool.core.registry import architectures, programs
from loratool.ops.check import candidates, check
from loratool.ops.conformance import FULLY, conform
from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from tests.builders import LAYOUTS, Style, build, typical_parts, write_file
from tests.contracts import check_program

PROGRAMS = ("a1111", "comfyui", "diffusers", "invokeai", "kohya", "lycoris", "onetrainer", "peft", "vllm")


def test_the_programs_that_are_promised() -> None:
    assert tuple(sorted(programs())) == PROGRAMS


@pytest.mark.parametrize("name", PROGRAMS)
def test_contract(name: str) -> None:
    check_program(programs()[name])


def program(**changes: object) -> Program:
    """A small program, with something changed."""
    small = Program(
        id="small",
        title="Small",
        version="1",
        sources=("https://example.org",),
        reads=(When(layouts=("kohya",)),),
        writes={"*": ("kohya",)},
    )
    return replace(small, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": ""}, "small"),
        ({"sources": ()}, "small"),
        ({"writes": {"sdxl": ("kohya",)}}, "no layouts for models"),
        ({"writes": {"*": ("kohia",)}}, "kohia"),
        ({"reads": (When(layouts=("kohya",), families=("lorra",)),)}, "lorra"),
        ({"reads": (When(architectures=("sd16",)),)}, "sd16"),
        ({"rules": (Rule(When(has=("dora",)), REFUSES, "refuses"),)}, "no facts"),
        ({"rules": (Rule(When(), "hates", "hates it"),)}, "no effect"),
        ({"rules": (Rule(When(), REFUSES, "Refuses it."),)}, "Refuses it"),
        ({"keys": (KeyRule("x", REFUSES),)}, "small"),
    ],
)
def test_the_contract_itself(changes: dict[str, object], match: str) -> None:
    check_program(program())
    with pytest.raises(AssertionError, match=match):
        check_program(program(**changes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_converted_for_it_loads_fully(name: str, architecture: str, layout: str, tmp_path: Path) -> None:
    """Or nothing is written, and the error says why."""
    parts = typical_parts(architecture, layout, rank=4, alpha=2.0)
    source = tmp_path / ("in" if layout == "peft" else "in.safetensors")
    write_file(source, build(parts, layout, Style(metadata={"title": "x"})))
    output, aim = tmp_path / "out", programs()[name]
    expected = any(one.fully for one in candidates(open_adapter(source), aim) if not one.approximated)
    try:
        report = convert_file(source, None, output, program=aim)
    except LoratoolError as error:
        assert not expected
        assert aim.title in str(error)
        assert not output.exists()
        return
    assert expected
    assert report.program == name
    assert report.layout_after in aim.layouts_for(architecture)
    found = check(open_adapter(output), aim)
    assert (found.conformance.verdict, found.remedy, found.conformance.reasons) == (FULLY, None, ())


def test_every_model_that_a_program_knows_can_be_converted_for_it() -> None:
    """The layouts that it chooses from are among those that it reads."""
    for one in programs().values():
        for names in one.writes.values():
            assert any(set(names) & set(when.layouts) for when in one.reads), one.id


def test_rules_hold_for_every_architecture_without_a_crash(tmp_path: Path) -> None:
    for architecture in architectures().values():
        if architecture.open or architecture.id not in ("sd15", "sdxl", "flux"):
            continue
        for layout in LAYOUTS:
            place = tmp_path / f"{architecture.id}-{layout}"
            adapter = open_adapter(write_file(place, build(typical_parts(architecture.id, layout), layout)))
            for one in programs().values():
                assert len(conform(adapter, one).fates) == len(adapter.modules)
