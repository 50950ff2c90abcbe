"""The documents are true of the code: command lines parse, JSON fields and plug-ins are named, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.main

import loratool
from loratool.cli.info import info as info_command
from loratool.cli.main import COMMANDS, app, command
from loratool.core.adapter import Bundle
from loratool.core.registry import architectures, families, layouts, methods, programs
from loratool.core.tensor import LazyTensor
from loratool.ops.approximate import Approximated
from loratool.ops.bake_check import Checked
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.bases import add_base, known_bases
from loratool.ops.blocks import blocks_of
from loratool.ops.check import check_file
from loratool.ops.convert_file import convert_file
from loratool.ops.extract import Wish
from loratool.ops.extract_file import extract_file
from loratool.ops.fix import FixReport, Mended
from loratool.ops.inputs import Asked
from loratool.ops.inspect import inspect
from loratool.ops.made import Held
from loratool.ops.merge import MergedModule
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from loratool.ops.ranks import parse_rule
from loratool.ops.replay import replay_file
from loratool.ops.resave import Resaved
from loratool.ops.resize_file import resize_file
from loratool.ops.save import Proof
from loratool.ops.summary import Summary
from loratool.ops.unbake_file import unbake_file
from loratool.ops.validate import validate
from loratool.report import bake as bake_report
from loratool.report import bases as bases_report
from loratool.report import blocks as blocks_report
from loratool.report import check as check_report
from loratool.report import convert as convert_report
from loratool.report import extract as extract_report
from loratool.report import info as info_report
from loratool.report import merge as merge_report
from loratool.report import methods as methods_report
from loratool.report import replay as replay_report
from loratool.report import resize as resize_report
from loratool.report import unbake as unbake_report
from loratool.report import validate as validate_report
from tests.bakes import KEYS, K, Q, kohya, noise, save
from tests.builders import build, typical_parts, write_file
from tests.checkpoints import sparse_checkpoint

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ENDS = {"|", "||", "&&", ";", ">", ">>", "2>"}
"""Where the shell's part of a line begins."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """(page, arguments) of every `$ loratool ...` in a console block."""
    for page in PAGES:
        for block in CONSOLE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("$ loratool"):
                    words = shlex.split(line[2:], comments=True)[1:]
                    end = next((at for at, word in enumerate(words) if word in ENDS), len(words))
                    yield page.name, words[:end]


COMMAND_LINES = list(command_lines())


def parse(words: list[str]) -> None:
    """Parses a command line without running it; raises what the command line's parser raises."""
    group: Any = typer.main.get_command(app)
    try:
        context = group.make_context("loratool", list(words))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)
    except typer.Exit as done:  # --version and --help
        assert done.exit_code == 0, words


@pytest.mark.parametrize(("page", "words"), COMMAND_LINES, ids=[" ".join(words) for _, words in COMMAND_LINES])
def test_command_lines_parse(page: str, words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize("words", [["inform", "x"], ["info", "--nope", "x"], ["convert", "x", "--to", "kohya"]])
def test_other_command_lines_do_not(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"inform|--nope|output"):
        parse(words)


def sections(page: Path) -> dict[str, list[str]]:
    """Heading -> the first cells of its tables, below the header."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip("`")
            assert heading not in found, f"two sections are called {heading}"
            found[heading] = []
        elif match := re.match(r"\| `([^`]+)` \|", line):
            found[heading].append(match[1])
    return {name: cells for name, cells in found.items() if cells}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    tagged = replace(bundle, metadata={"ss_tag_frequency": '{"set": {"red scarf": 3}}'})
    return write_file(tmp_path / "style.safetensors", tagged)


def test_json_fields(file: Path, tmp_path: Path) -> None:
    info = info_report.as_json(inspect(file, keys=True))
    report = convert_report.as_json(convert_file(file, "diffusers", tmp_path / "out.safetensors"))
    blocks = blocks_report.as_json(blocks_of(open_adapter(file)))
    resized = resize_report.as_json(
        resize_file(file, [parse_rule("rank", "2")], tmp_path / "small.safetensors"), modules=True
    )
    (outcome,) = resized["outcomes"]
    assert outcome["held"].keys() == {field.name for field in fields(Held)}
    assert report["proof"].keys() == {field.name for field in fields(Proof)}
    expected = {
        "loratool info --json": info,
        "components": next(iter(info["components"].values())),
        "tags": info["tags"][0],
        "module_list": info["module_list"][0],
        "A file that cannot be read": ("path", "error"),
        **validate_fields(file, tmp_path),
        "loratool convert --json": report,
        "loratool convert without --to": [field.name for field in fields(Resaved)],
        "approximated": [field.name for field in fields(Approximated)],
        **check_fields(file),
        "loratool fix --json": [field.name for field in fields(FixReport)],
        "mended": [field.name for field in fields(Mended)],
        "proof": report["proof"],
        "loratool blocks --json": blocks,
        "blocks": blocks["blocks"][0],
        "loratool resize --json": resized,
        "outcomes": outcome,
        "outcomes: modules": outcome["modules"][0],
        "outcomes: components": outcome["components"][0],
        "held": outcome["held"],
        **merge_fields(file, tmp_path),
        **bake_fields(tmp_path),
        **extract_fields(tmp_path),
        **bases_fields(tmp_path / "home"),
    }
    assert sections(DOCS / "json.md") == {name: list(value) for name, value in expected.items()}


def check_fields(file: Path) -> dict[str, Any]:
    """The fields of what `check` tells, by their sections."""
    told = check_report.as_json(check_file(file, "kohya"), keys=True)
    assert check_report.as_json(check_file(file, "kohya")).keys() == told.keys() - {"module_list"}
    return {
        "loratool check --json": told,
        "check: reasons": told["reasons"][0],
        "check: remedy": told["remedy"],
        "check: module_list": told["module_list"][0],
    }


def validate_fields(file: Path, tmp_path: Path) -> dict[str, Any]:
    """The fields of what `validate` tells, by their sections."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-1])
    (told,) = validate_report.as_json(validate(broken))
    return {"loratool validate --json": told, "findings": told["findings"][0]}


def bake_fields(tmp_path: Path) -> dict[str, Any]:
    """The fields of what `bake` and `unbake` tell, by their sections."""
    folder = tmp_path / "bakes"
    base = save(folder / "base.safetensors", {KEYS[Q]: noise(16, 8)})
    lora = save(folder / "lora.safetensors", kohya({Q: (16, 8), K: (16, 8)}))
    output, undo = folder / "baked.safetensors", folder / "undo"
    done = bake_file(base, [Asked(str(lora))], output, Options(allow_unmatched=True), undo=undo)
    told = bake_report.as_json(done, tensors=True)
    assert told["checked"].keys() == {field.name for field in fields(Checked)}
    return {
        "loratool bake --json": told,
        "bake: adapters": told["adapters"][0],
        "bake: components": told["components"][0],
        "bake: tensor_list": told["tensor_list"][0],
        "bake: unmatched": told["unmatched"][0],
        "bake: checked": told["checked"],
        "bake: memory": told["memory"],
        "loratool unbake --json": unbake_report.as_json(unbake_file(output, undo, folder / "again.safetensors")),
    }


def extract_fields(tmp_path: Path) -> dict[str, Any]:
    """The fields of what `extract` tells, by their sections."""
    sides = []
    for at, name in enumerate(("before", "after")):
        tensors = {"a.proj.weight": torch.eye(4) * (at + 1), "a.norm.weight": torch.ones(4) * at}
        stored = {key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()}
        sides.append(write_file(tmp_path / f"{name}.safetensors", Bundle(stored)))
    done = extract_file(sides[0], sides[1], tmp_path / "difference.safetensors", Wish(parse_rule("rank", "2")))
    told = extract_report.as_json(done)
    assert told["components"][0].keys() == {field.name for field in fields(Summary)}
    return {
        "loratool extract --json": told,
        "extract: modules": told["modules"][0],
        "extract: others": told["others"][0],
    }


def merge_fields(file: Path, tmp_path: Path) -> dict[str, Any]:
    """The fields of what `merge` and `replay` tell, by their sections."""
    small = write_file(tmp_path / "few.safetensors", build(typical_parts("sd15", "kohya")[:4], "kohya"))
    output = tmp_path / "merged.safetensors"
    merged = merge_report.as_json(merge_files([Asked(str(small))], output, methods()["concat"]), modules=True)
    replayed = replay_report.as_json(replay_file(output))
    assert merged["held"].keys() == {field.name for field in fields(Held)}
    row = MergedModule("", "", (), 1, 1.0, 0.0)
    return {
        "loratool merge --json": merged,
        "merge: inputs": merged["inputs"][0],
        "merge: approximated": merge_report.approximated(row),
        "merge: module_list": merged["module_list"][0],
        "loratool merge --list-methods --json": methods_report.as_json(list(methods().values()))[0],
        "loratool replay --json": replayed,
        "replay: inputs": replayed["inputs"][0],
    }


def bases_fields(home: Path) -> dict[str, Any]:
    """The fields of what `bases` tells, by their sections."""
    folder = home / "ComfyUI/models/checkpoints"
    model = sparse_checkpoint(folder / "a.safetensors", "sd15", "ldm")
    (folder / "old.ckpt").write_bytes(b"")
    listing = bases_report.as_json(known_bases(environ={}, home=home))
    return {
        "loratool bases --json": listing,
        "bases: names": listing["names"][0],
        "bases: files": listing["files"][0],
        "bases: places": listing["places"][0],
        "bases: skipped": listing["skipped"][0],
        "loratool bases add --json": bases_report.added_as_json(add_base("mine", str(model), environ={}, home=home)),
    }


def test_json_of_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        info_command([str(tmp_path / "none.safetensors")], as_json=True)
    assert list(json.loads(capsys.readouterr().out)) == sections(DOCS / "json.md")["A file that cannot be read"]


@pytest.mark.parametrize(
    ("page", "ids"),
    [
        ("formats.md", layouts()),
        ("architectures.md", architectures()),
        ("mathematics.md", families()),
        ("merging.md", methods()),
        ("programs.md", programs()),
    ],
    ids=["layouts", "architectures", "families", "methods", "programs"],
)
def test_every_plugin_is_named(page: str, ids: dict[str, object]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [name for name in ids if f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", programs())
def test_programs_are_documented_as_their_rules_are(name: str) -> None:
    """Version, sources, the layouts that are tried, and every rule's sentence."""
    text = (DOCS / "programs.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]
    program = programs()[name]
    told = [program.version, *program.sources, *program.notes, *(rule.why for rule in program.rules)]
    told += [f"`{layout}`" for layouts in program.writes.values() for layout in layouts]
    told += [rule.why for rule in program.keys]
    assert [one for one in told if one not in section] == []


def test_the_front_door_is_documented() -> None:
    named = {cell.partition("(")[0] for cells in sections(DOCS / "library.md").values() for cell in cells}
    assert set(loratool.__all__) <= named


def test_every_option_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in COMMANDS:
        for option in command(name).params:
            spellings = [*option.opts, *option.secondary_opts]
            if spellings[0].startswith("-"):
                assert any(re.search(rf"(?<![\w-]){one}(?![\w-])", text) for one in spellings), spellings


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []
