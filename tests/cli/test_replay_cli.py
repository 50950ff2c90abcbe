"""`loratool replay`: what it says, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.registry import methods
from loratool.ops import recipe
from loratool.ops.inputs import Asked
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from tests.cli.test_info import BAD, HOSTILE, assert_fits, assert_inert
from tests.ops.test_merge_files import make
from tests.ops.test_replay import forged, rewritten


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    asked = [Asked(str(make(tmp_path / "a.safetensors"))), Asked(str(make(tmp_path / "b.safetensors", seed=1)), 0.5)]
    merge_files(asked, tmp_path / "out.safetensors", methods()["dare_ties"], {"density": 0.5, "seed": 3})
    return tmp_path / "out.safetensors"


def test_the_same(merged: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run(merged)
    assert (result.exit_code, result.stderr) == (0, "")
    assert_fits(result.stdout)
    text = " ".join(result.stdout.split())
    for fact in ("merge, method dare_ties", "density 0.5", "seed 3", str(tmp_path), "identical, bit for bit"):
        assert fact in text or fact == str(tmp_path)
    assert "metadata" not in text and "lambda" not in text and "normalize" not in text  # defaults
    assert sorted(tmp_path.iterdir()) == before
    assert run(merged, "-o", tmp_path / "new.safetensors").exit_code == 0
    assert (tmp_path / "new.safetensors").read_bytes() == merged.read_bytes()
    assert run(merged, "-o", tmp_path / "new.safetensors").exit_code == 1
    assert run(merged, "-o", tmp_path / "new.safetensors", "--overwrite", "--device", "cpu").exit_code == 0


def test_json(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "b.safetensors").rename(tmp_path / "moved" / "c.safetensors")
    data: dict[str, Any] = json.loads(run(merged, "--json", "--from", tmp_path / "moved").stdout)
    assert (data["result"], data["command"], data["output"]) == ("identical", "merge", None)
    assert data["inputs"][1]["path"] == str(tmp_path / "moved" / "c.safetensors")
    assert data["settings"]["options"]["seed"] == 3


def test_a_renamed_input_is_named_by_both(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    result = run(merged)
    assert result.exit_code == 0
    assert "(then b.safetensors; the same sha256)" in " ".join(result.stdout.split())


def test_what_differs_ends_with_1(merged: Path) -> None:
    made = recipe.decode(open_adapter(merged).metadata)
    rewritten(merged, other=HOSTILE.replace("\n", ""), **{recipe.ENTRY: recipe.encode({**made, "version": "9.9"})})
    result = run(merged)
    assert (result.exit_code, result.stderr) == (1, "")
    assert_inert(result.stdout)
    text = " ".join(result.stdout.split())
    assert "the same tensors, but another header" in text
    assert "other" in text and "loratool.recipe (version)" in text and "written by loratool 9.9" in text
    forged(merged, options={**made["options"], "seed": 4}, version=made["version"])
    result = run(merged, "--json")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["result"]) == (1, "tensors")
    assert data["tensors"] > 0 and data["error"] > 0.1 and data["worst_module"]
    assert "largest relative difference of an update" in " ".join(run(merged).stdout.split())


def refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    assert_inert(result.stderr)
    for word in words:
        assert word in result.stderr, result.stderr


def test_refused(merged: Path, tmp_path: Path) -> None:
    refused(run(tmp_path / "a.safetensors"), 1, "holds no recipe", "a.safetensors")
    refused(run(tmp_path / "none.safetensors"), 1, "no such file")
    refused(run(merged, "--from", tmp_path / "none"), 2, "no such folder")
    refused(run(merged, "--device", "tpu"), 2, "no device")
    refused(run(merged, "-o", tmp_path / "a.safetensors", "--overwrite"), 1, "an input is never changed")
    make(tmp_path / "a.safetensors", seed=9)
    refused(run(merged), 1, "a.safetensors is another file now", "--from")
    forged(merged, first={"name": f"../{HOSTILE}"})
    refused(run(merged), 1, "no file name")


@pytest.mark.parametrize("kind", ["truncated", "web page", "empty", "missing half", "no tensor"])
def test_bad_files(tmp_path: Path, kind: str) -> None:
    BAD[kind][0](tmp_path / "bad.safetensors")
    refused(run(tmp_path / "bad.safetensors"), 1, "bad.safetensors")
