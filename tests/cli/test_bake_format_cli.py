"""`loratool bake --format` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.files.safetensors import read_header
from tests.bakes import DIFFUSERS, KEYS, TEXT, Q, kohya, noise, save
from tests.cli.test_bake_cli import data, flat, refused, run
from tests.cli.test_info import assert_fits

SHAPES = {Q: (48, 32), TEXT: (16, 16)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for stem, shape in SHAPES.items():
        folder, key = DIFFUSERS[stem]
        rest = {"conv_in.bias": noise(32)} if folder == "unet" else {}
        save(tmp_path / "model" / folder / "model.safetensors", {key: noise(*shape), **rest})
    save(tmp_path / "model" / "safety_checker" / "model.safetensors", {"weight": noise(3)})
    (tmp_path / "model" / "model_index.json").write_text("{}", encoding="utf-8")
    return tmp_path / "model"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save(tmp_path / "style.safetensors", kohya(SHAPES))


def test_the_report_says_the_spelling(tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.safetensors"
    result = run(lora.name, "--base", base.name, "-o", out.name, "--format", "ldm")
    text = flat(result)
    assert_fits(result.stdout)
    assert "format spelled as ldm" in text
    assert "note left out: safety_checker, which is no part of such a file" in text
    assert "7.1 KiB compared, all the same" in text
    conv = "model.diffusion_model.input_blocks.0.0.bias"
    assert set(read_header(out).tensors) == {KEYS[stem] for stem in SHAPES} | {conv}


def test_json_and_a_dry_run(tmp_path: Path, base: Path, lora: Path) -> None:
    arguments = [lora, "--base", base, "--format", "ldm", "--json"]
    planned = data(run(*arguments, "--dry-run"))
    assert (planned["format"], planned["output"]) == ("ldm", None)
    assert not list(tmp_path.glob("*out*"))
    done = data(run(*arguments, "-o", tmp_path / "out.safetensors"))
    assert done["format"] == "ldm"
    assert data(run(lora, "--base", base, "--json", "-o", tmp_path / "folder"))["format"] is None


def test_what_cannot_be_is_refused(tmp_path: Path, base: Path, lora: Path) -> None:
    out = tmp_path / "out.safetensors"
    given = [lora, "--base", base, "-o", out, "--format"]
    line = refused(tmp_path, 2, "no checkpoint of Stable Diffusion 1.x is spelled 'nonsense'", *given, "nonsense")
    assert "known: ldm, ldm-unet, diffusers, diffusers-short" in line
    refused(tmp_path, 2, "no checkpoint of Stable Diffusion 1.x is spelled '\\x1b[31m'", *given, "\x1b[31m")
    refused(tmp_path, 2, "--undo cannot undo --format", *given, "ldm", "--undo", tmp_path / "undo")
    refused(tmp_path, 1, "has no place for text_encoder", *given, "ldm-unet")
    run(*given, "ldm")
    given[2] = out
    refused(tmp_path, 1, "cannot be made from weights", *given[:4], tmp_path / "folder", "--format", "diffusers")
