"""Validate: bases, depth, strictness, exit codes, limits, and files that change while they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.errors import FormatError
from loratool.core.registry import architectures, families
from loratool.core.tensor import LazyTensor
from loratool.files.look import File
from loratool.files.safetensors import OpenFile, read_header, write_safetensors
from loratool.ops import validate as module
from loratool.ops.validate import MOST_OF_ONE, Validated, validate
from tests.builders import ARCHITECTURES, LAYOUTS, build, typical_parts, write_file
from tests.checkpoints import sparse_checkpoint
from tests.hostile.bytes import UNET, Tensor, file, lora, packed, tensor

REAL_FILES = sorted((Path(__file__).parents[3] / "shared" / "data").glob("*/*.safetensors"))


def one(path: Path, **options: Any) -> Validated:
    (found,) = validate(path, **options)
    return found


def codes(result: Validated) -> set[str]:
    return {finding.code for finding in result.findings}


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.write_bytes(file(tensors))
    return path


# ---------------------------------------------------------------- what is right is left alone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_adapters_have_no_findings(tmp_path: Path, architecture: str, layout: str) -> None:
    parts = typical_parts(architecture, layout)
    place = write_file(tmp_path / "style", build(parts, layout))
    result = one(place)
    assert [finding for finding in result.findings if finding.code != "other-width"] == []
    assert result.deep


@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
def test_real_files_have_no_errors(path: Path) -> None:
    assert not one(path).failed()


# ---------------------------------------------------------------- a base


def test_the_right_base_adds_nothing(tmp_path: Path) -> None:
    base = sparse_checkpoint(tmp_path / "base.safetensors", "sd15", "ldm")
    lora_file = saved(tmp_path / "a.safetensors", lora())
    assert one(lora_file, base=str(base)).findings == ()


def test_a_base_of_another_model(tmp_path: Path) -> None:
    base = sparse_checkpoint(tmp_path / "base.safetensors", "sdxl", architectures()["sdxl"].checkpoints[0].id)
    result = one(saved(tmp_path / "a.safetensors", lora()), base=str(base))
    assert codes(result) == {"base-unusable"}
    assert "Stable Diffusion XL" in result.findings[0].message


def test_a_base_that_is_none(tmp_path: Path) -> None:
    lora_file = saved(tmp_path / "a.safetensors", lora())
    assert codes(one(lora_file, base=str(tmp_path / "nothing"))) == {"base-unusable"}
    (tmp_path / "page.safetensors").write_bytes(b"<html></html>")
    assert codes(one(lora_file, base=str(tmp_path / "page.safetensors"))) == {"base-unusable"}


def test_a_base_without_the_weight_or_with_another_shape(tmp_path: Path) -> None:
    names = ("layers.0.attn.q", "layers.0.attn.k", "layers.1.attn.q")
    base = saved(tmp_path / "base.safetensors", {f"{name}.weight": tensor("F16", (64, 64)) for name in names})
    found: dict[str, Tensor] = {}
    for name, width in (*((name, 64) for name in names[:2]), (names[2], 32), ("layers.9.attn.q", 64)):
        found[f"diffusion_model.{name}.lora_A.weight"] = tensor("F16", (4, width))
        found[f"diffusion_model.{name}.lora_B.weight"] = tensor("F16", (64, 4))
    result = one(saved(tmp_path / "a.safetensors", found), base=str(base))
    told = {finding.code: finding for finding in result.findings if finding.severity == "error"}
    assert "layers.1.attn.q" in (told["base-shape"].key or "")
    assert codes(result) & {"not-in-base", "unknown-module"}


# ---------------------------------------------------------------- depth


def test_depth_is_chosen_by_size_or_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = lora()
    key = f"{UNET}k.lora_up.weight"
    bad[key] = ("F16", (320, 4), b"\0\x7e" * 1280)
    path = saved(tmp_path / "a.safetensors", bad)
    assert codes(one(path)) == {"not-finite"}
    assert codes(one(path, deep=False)) == set()
    monkeypatch.setattr(module, "DEEP_UP_TO", 1000)
    assert codes(one(path)) == {"numbers-skipped"}
    assert codes(one(path, deep=False)) == set()
    assert codes(one(path, deep=True)) == {"not-finite"}


def test_where_a_number_is_no_number(tmp_path: Path) -> None:
    bad = lora("F32")
    key = f"{UNET}k.lora_up.weight"
    raw = bad[key][2]
    bad[key] = ("F32", (320, 4), raw[:400] + b"\0\0\x80\x7f" + raw[404:])
    path = saved(tmp_path / "a.safetensors", bad)
    (finding,) = one(path).findings
    assert finding.key == key
    assert finding.byte is not None
    assert path.read_bytes()[finding.byte : finding.byte + 4] == b"\0\0\x80\x7f"


def test_where_a_header_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)))
    (finding,) = [finding for finding in one(path).findings if finding.code == "bad-shape"]
    assert finding.byte is not None
    assert path.read_bytes()[finding.byte :].startswith(b"[-1]")


# ---------------------------------------------------------------- codes that need more than a file


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.safetensors", lora("F32"))
    original = OpenFile.pread

    def pread(self: OpenFile, size: int, offset: int) -> bytes:
        if offset > 8:
            os.truncate(path, 600)
        return original(self, size, offset)

    monkeypatch.setattr(OpenFile, "pread", pread)
    assert codes(one(path)) == {"file-changed"}


def test_a_file_that_vanishes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.safetensors", lora())
    tensors = File.tensors

    def gone(self: File) -> dict[str, LazyTensor]:
        path.unlink()
        found: dict[str, LazyTensor] = tensors.fget(self)  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(File, "tensors", property(gone))
    assert one(path).findings == ()  # what is open stays
    assert codes(one(path)) == {"not-found"}


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert codes(one(tmp_path / ("x" * 300))) == {"cannot-be-opened"}
    assert codes(one(Path("a\0b"))) <= {"cannot-be-opened", "not-found"}


def test_a_kind_without_a_reader(tmp_path: Path) -> None:
    found = lora()
    for part in ("a1", "a2", "b1", "b2"):
        found[f"lora_unet_mid_block_attentions_0_proj_in.{part}.weight"] = tensor("F16", (4, 4))
    result = one(saved(tmp_path / "a.safetensors", found))
    if "glora" not in families():
        assert codes(result) == {"unread-family"}
        assert "glora" in result.findings[0].message


def test_a_model_that_two_could_be(tmp_path: Path) -> None:
    found: dict[str, Tensor] = {}
    for layer in range(3):
        stem = f"text_encoder.text_model.encoder.layers.{layer}.mlp.fc1"
        found[f"{stem}.lora_A.weight"] = tensor("F16", (4, 768))
        found[f"{stem}.lora_B.weight"] = tensor("F16", (3072, 4))
    assert codes(one(saved(tmp_path / "a.safetensors", found))) == {"ambiguous-model"}


def test_a_config_of_another_kind_cannot_be_read(tmp_path: Path) -> None:
    from tests.hostile.places import peft

    peft(peft_type="IA3")(tmp_path / "style")
    assert {"config-kind", "cannot-be-read"} <= codes(one(tmp_path / "style"))


# ---------------------------------------------------------------- many


def test_a_folder_of_files_is_one_result_for_each(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", lora())
    saved(tmp_path / "b.safetensors", lora(up=None))
    results = validate(tmp_path)
    assert [(Path(result.path).name, result.failed()) for result in results] == [
        ("a.safetensors", False),
        ("b.safetensors", True),
    ]


def test_findings_are_bounded_and_counted(tmp_path: Path) -> None:
    found: dict[str, Tensor] = {}
    for number in range(MOST_OF_ONE + 20):
        found[f"lora_unet_down_blocks_{number}_x.lora_down.weight"] = tensor("U8", (1, 1), 1)
    result = one(saved(tmp_path / "a.safetensors", found))
    assert result.more["missing-half"] == 20
    assert len([f for f in result.findings if f.code == "missing-half"]) == MOST_OF_ONE
    text = CliRunner().invoke(app, ["validate", str(tmp_path / "a.safetensors")])
    assert f"and {MOST_OF_ONE + 20 - 5} more" in text.output


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("changed", "options", "code"),
    [
        ({}, [], 0),
        ({}, ["--strict"], 0),
        ({"alpha": None}, [], 0),
        ({"alpha": None}, ["--strict"], 1),
        ({"up": None}, [], 1),
        ({}, ["--json", "--sarif"], 2),
        ({}, ["--nope"], 2),
    ],
)
def test_exit_codes(tmp_path: Path, changed: dict[str, Any], options: list[str], code: int) -> None:
    path = saved(tmp_path / "a.safetensors", lora(**changed))
    assert CliRunner().invoke(app, ["validate", str(path), *options]).exit_code == code


def test_what_is_clean_is_read_as_it_is(tmp_path: Path) -> None:
    """The tolerant reader and the strict one give the same tensors."""
    path = saved(tmp_path / "a.safetensors", lora())
    from loratool.files.look import look

    ours, theirs = look(str(path)).tensors, read_header(path).tensors
    assert ours.keys() == theirs.keys()
    assert all(bytes(ours[key].read()) == bytes(theirs[key].read()) for key in ours)
    write_safetensors(tmp_path / "b.safetensors", ours, {})
    assert read_header(tmp_path / "b.safetensors").tensors.keys() == ours.keys()
    with pytest.raises(FormatError):
        look(str(tmp_path))
