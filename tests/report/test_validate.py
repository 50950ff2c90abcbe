"""Findings as text, JSON and SARIF: bounded, inert, and of the documented form."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loratool.ops.validate import Validated, validate
from loratool.report.validate import LIMIT, as_json, as_sarif, show
from tests.hostile.bytes import UNET, file, lora, packed, tensor


def printed(results: list[Validated], **options: bool) -> str:
    console = Console(file=io.StringIO(), width=80, markup=False, highlight=False, emoji=False)
    show(results, console, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def odd(tmp_path: Path) -> list[Validated]:
    tensors = {**lora(up=None), "\x1b[31m[bold]x[/bold]\u202e" * 30: tensor("F16", (1,))}
    tensors[f"{UNET}v.lora_down.weight"] = ("F16", (4, 320), b"\0\x7e" * 1280)
    path = tmp_path / "st\x1byle.safetensors"
    path.write_bytes(file(tensors))
    return validate(path)


@pytest.fixture
def many(tmp_path: Path) -> list[Validated]:
    results = []
    for number in range(30):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(packed({f"a rather long name of a tensor {i} of {number}": i for i in range(600)}))
        results += validate(path)
    return results


def test_text_is_inert_and_narrow(odd: list[Validated]) -> None:
    text = printed(odd)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]x[/bold]" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "error: not-finite" in text
    assert "1,280 of 1,280 values" in " ".join(text.split())


def test_text_is_bounded(many: list[Validated]) -> None:
    assert len(printed(many)) <= LIMIT
    assert len(printed(many, everything=True)) > LIMIT


def test_json_is_bounded_and_counts_the_rest(many: list[Validated]) -> None:
    short, whole = as_json(many), as_json(many, everything=True)
    assert len(json.dumps(short, indent=2)) <= LIMIT
    assert len(json.dumps(whole, indent=2)) > LIMIT
    for some, every in zip(short, whole, strict=True):
        assert len(some["findings"]) + sum(some["more"].values()) == len(every["findings"]) + sum(
            every["more"].values()
        )


def test_sarif_is_of_the_standard_form(odd: list[Validated], many: list[Validated]) -> None:
    log = as_sarif(odd)
    assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
    check_run(log["runs"][0])
    results = log["runs"][0]["results"]
    numbers = next(result for result in results if result["ruleId"] == "not-finite")
    place = numbers["locations"][0]
    assert place["physicalLocation"]["region"]["byteOffset"] > 0
    assert place["physicalLocation"]["artifactLocation"]["uri"].endswith("st%1Byle.safetensors")
    assert place["logicalLocations"][0]["fullyQualifiedName"] == f"{UNET}v.lora_down.weight"
    long = as_sarif(many)
    check_run(long["runs"][0])
    assert len(json.dumps(long, indent=2)) <= LIMIT
    assert long["runs"][0]["properties"]["more"] > 0


def check_run(run: dict[str, Any]) -> None:
    """What SARIF 2.1.0 (OASIS, 3.14, 3.27, 3.49) asks of a run."""
    rules = run["tool"]["driver"]["rules"]
    ids = [rule["id"] for rule in rules]
    assert len(set(ids)) == len(ids)
    for rule in rules:
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
        assert rule["shortDescription"]["text"]
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        assert result["locations"]
