"""Files that people really had: every program gives a verdict, and the command that it comes with keeps its word."""

from __future__ import annotations

import json
import math
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.adapter import Bundle
from loratool.core.registry import programs
from loratool.core.tensor import LazyTensor
from loratool.ops.check import check
from loratool.ops.conformance import FULLY
from loratool.ops.open import open_adapter
from tests.builders import write_file

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = sorted(DATA.glob("*/*.safetensors"))
LISTS = sorted(DATA.glob("keys/*.json"))

# What each of these programs loads fully as it is.
FULL = {
    "lora_disney": set(),
    "flux_script": {"comfyui", "diffusers", "onetrainer"},
    "sd15_script": {"diffusers"},
    "sdxl_script_kohya": {"comfyui"},
    "sd15_lora": {"a1111", "comfyui", "diffusers", "invokeai", "kohya", "onetrainer"},
    "sd15_locon": {"a1111", "comfyui", "diffusers", "invokeai", "kohya", "onetrainer"},
    "sdxl_lora": {"a1111", "comfyui", "diffusers", "invokeai", "kohya", "lycoris", "onetrainer"},
    "flux_lora": {"comfyui", "diffusers", "invokeai", "kohya", "lycoris", "onetrainer"},
    "flux-kohya": {"comfyui", "diffusers", "invokeai", "kohya", "lycoris", "onetrainer"},
    "flux-control": {"comfyui", "invokeai"},
    "flux-diffusers": {"comfyui", "diffusers", "invokeai", "onetrainer"},
    "flux-ai-toolkit": {"comfyui", "invokeai", "onetrainer"},
    "flux-xlabs": {"diffusers", "invokeai"},
    "anima-kohya": {"comfyui", "invokeai", "kohya", "lycoris", "onetrainer"},
    "anima-peft": {"comfyui", "diffusers", "invokeai", "onetrainer"},
    "qwen-image-diffusers": {"comfyui", "diffusers", "invokeai", "onetrainer"},
}


@cache
def values(shape: tuple[int, ...]) -> LazyTensor:
    """Small numbers, none of them zero; the same for the same shape."""
    if not shape:
        return LazyTensor.scalar(8.0, "BF16")
    made = torch.arange(1, math.prod(shape) + 1, dtype=torch.int32).remainder_(127).add_(1)
    return LazyTensor.from_torch(made.to(torch.bfloat16).div_(2048).reshape(shape))


def file_of(path: Path, tmp_path: Path) -> Path:
    """The file; for a list of keys one with tensors of its shapes, its ranks cut to 2, since they do not matter."""
    if path.suffix != ".json":
        return path
    shapes = json.loads(path.read_text(encoding="utf-8"))
    return write_file(
        tmp_path / f"{path.stem}.safetensors", Bundle({key: values(_cut(key, shape)) for key, shape in shapes.items()})
    )


def _cut(key: str, shape: list[int]) -> tuple[int, ...]:
    if len(shape) < 2:
        return tuple(shape)
    down = "lora_A" in key or "down" in key.rpartition(".weight")[0].rpartition(".")[2]
    return (min(shape[0], 2), *shape[1:]) if down else (shape[0], min(shape[1], 2), *shape[2:])


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data here")
def test_every_file_is_tried() -> None:
    assert {path.stem for path in (*FILES, *LISTS)} == set(FULL)


@pytest.mark.parametrize("path", [*FILES, *LISTS], ids=lambda path: path.stem)
def test_every_program_has_a_verdict_and_its_command_works(path: Path, tmp_path: Path) -> None:
    file = file_of(path, tmp_path)
    adapter = open_adapter(file)
    found = {name: check(adapter, program) for name, program in programs().items()}
    assert {name for name, one in found.items() if one.conformance.fully} == FULL[path.stem]
    for name, one in found.items():
        assert one.conformance.fully or one.conformance.reasons
        remedy = one.remedy
        if remedy is None or " convert " not in remedy.command:
            continue
        output = tmp_path / f"{name}.safetensors" if name != "peft" else tmp_path / name
        words = shlex.split(remedy.command)
        assert words[:2] == ["loratool", "convert"] and words[-2:] == ["-o", "OUT"]
        result = CliRunner().invoke(app, [*words[1:-1], str(output)])
        assert result.exit_code == 0, (name, result.output)
        assert check(open_adapter(output), programs()[name]).conformance.verdict == FULLY, name
