"""`loratool blocks`: the table, what can be copied from it, and what it does with hostile text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.adapter import Bundle
from loratool.core.registry import architectures
from loratool.core.tensor import LazyTensor
from loratool.files.safetensors import write_safetensors
from loratool.ops.blocks import block_weights
from tests.builders import build, typical_parts, write_file


def run(*arguments: str | Path, columns: int = 80) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, ["blocks", *map(str, arguments)], env={"COLUMNS": str(columns)})


def lora(path: Path, architecture: str, layout: str = "kohya") -> Path:
    return write_file(path / "my_style.safetensors", build(typical_parts(architecture, layout), layout))


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux"])
def test_80_columns_and_every_block(tmp_path: Path, architecture: str) -> None:
    result = run(lora(tmp_path, architecture))
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    ready = lines.pop()
    assert lines[-1] == "to weigh them, copy and change:"
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= 80
    blocks = architectures()[architecture].blocks
    assert blocks is not None
    assert [line.split()[0] for line in lines if re.match(r"[A-Z]+\d* ", line)] == list(blocks.labels)
    assert ready.startswith("--blocks 1,1,")
    assert block_weights(ready.removeprefix("--blocks "), architectures()[architecture]).rest == 0.0
    for labels in blocks.lists:
        assert f"{len(labels)} values  {labels[0]}" in result.stdout


def test_json(tmp_path: Path) -> None:
    file = lora(tmp_path, "sdxl", "diffusers")
    data = json.loads(run("--json", file).stdout)
    assert (data["path"], data["layout"], data["architecture"]) == (str(file), "diffusers", "sdxl")
    assert data["modules"] == sum(block["modules"] for block in data["blocks"])
    assert sum(block["share"] for block in data["blocks"]) == pytest.approx(1)
    assert data["norm"] ** 2 == pytest.approx(sum(block["norm"] ** 2 for block in data["blocks"]))
    assert sorted(map(len, data["lists"])) == [12, 17, 20, 26]
    assert data["fitting"] in data["lists"]
    base = data["blocks"][0]
    assert (base["label"], base["names"]) == ("BASE", ["text_encoder", "text_encoder_2"])


def test_json_has_no_nan(tmp_path: Path) -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    key = next(key for key in bundle.tensors if key.endswith("lora_up.weight"))
    odd = LazyTensor.from_torch(torch.full(bundle.tensors[key].shape, torch.nan))
    file = write_file(tmp_path / "a.safetensors", Bundle({**bundle.tensors, key: odd}, bundle.metadata))
    data = json.loads(run("--json", file).stdout, parse_constant=pytest.fail)
    assert data["norm"] is None
    assert None in [block["norm"] for block in data["blocks"]]
    assert "nan" in run(file).stdout


def test_dora_is_said(tmp_path: Path) -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    up = next(key for key in bundle.tensors if key.endswith("q_proj.lora_up.weight"))
    magnitude = LazyTensor.from_torch(torch.ones(bundle.tensors[up].shape[0], 1))
    tensors = {**bundle.tensors, up.replace("lora_up.weight", "dora_scale"): magnitude}
    file = write_file(tmp_path / "a.safetensors", Bundle(tensors, bundle.metadata))
    assert "1 module with DoRA: the norm is that of the low-rank part alone" in " ".join(run(file).stdout.split())
    assert json.loads(run("--json", file).stdout)["dora_modules"] == 1


def test_a_model_without_a_table(tmp_path: Path) -> None:
    tensors = {
        f"transformer.layers.{i}.attn.q.lora_{half}.weight": LazyTensor.from_torch(torch.ones(shape))
        for i in (0, 1, 10, 2)
        for half, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    file = tmp_path / "a.safetensors"
    write_safetensors(file, tensors, {})
    result = run(file)
    assert result.exit_code == 0, result.output
    assert re.findall(r"layers\.(\d+) ", result.stdout) == ["0", "1", "2", "10"]
    assert "--blocks" not in result.stdout and "NONE ALL ALL0.5" in result.stdout
    assert json.loads(run("--json", file).stdout)["fitting"] is None


HOSTILE = "\x1b[31mred\x1b[0m [bold]x[/bold] \u202egnp"


def test_hostile_names_are_inert(tmp_path: Path) -> None:
    tensors = {
        f"transformer.{HOSTILE}.{i}.q.lora_{half}.weight": LazyTensor.from_torch(torch.ones(shape))
        for i in range(2)
        for half, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    file = tmp_path / f"{HOSTILE.replace('/', '')}.safetensors"
    write_safetensors(file, tensors, {})
    for options in ([], ["--json"]):
        result = run(*options, file)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout and "\u202e" not in result.stdout
    assert "[bold]" in run(file).stdout


def test_what_is_no_lora(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"<!DOCTYPE html>")
    for path, code in ((broken, 1), (tmp_path / "none.safetensors", 1)):
        result = run(path)
        assert (result.exit_code, result.stdout) == (code, "")
        assert result.stderr.count("\n") == 1 and str(path) in result.stderr
    result = run("--architecture", "sd16", lora(tmp_path, "sd15"))
    assert result.exit_code == 2 and "sd15" in result.stderr


def test_the_command_costs_nothing_until_it_runs() -> None:
    code = "import sys, loratool.cli.main; print(*{'torch', 'yaml', 'loratool.ops.blocks'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
