"""recipe: the header entry, there and back, and the hashes of its inputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from loratool.core.errors import FormatError
from loratool.ops.recipe import ENTRY, decode, encode, hashing, recipe, sha256
from tests.builders import build, typical_parts, write_file

INPUTS = [{"name": "a ☃.safetensors", "sha256": "0" * 64}]


def test_there_and_back() -> None:
    made = recipe("resize", INPUTS, {"rule": "rank 4", "min_rank": 0, "off": False, "base": None, "per_block": {}})
    assert decode({ENTRY: encode(made), "other": "x"}) == made
    assert made["min_rank"] == 0 and made["off"] is False
    assert "base" not in made and "per_block" not in made


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"inputs": []}', '{"inputs": [1]}', '{"inputs": [{"name": "a"}]}', "[" * 100_000],
)
def test_what_is_no_recipe_is_an_error(text: str) -> None:
    with pytest.raises(FormatError, match=ENTRY):
        decode({ENTRY: text})
    with pytest.raises(FormatError, match="no recipe"):
        decode({})


def test_hashes_of_files_and_folders(tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.safetensors", build(typical_parts("sd15", "kohya"), "kohya"))
    folder = write_file(tmp_path / "b", build(typical_parts("sd15", "peft"), "peft"))
    assert sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    before = sha256(folder)
    assert hashing([file, folder])() == [sha256(file), before]
    (folder / "README.md").write_text("beside it")
    assert sha256(folder) == before
    config = next(folder.rglob("adapter_config.json"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 99}))
    assert sha256(folder) != before
