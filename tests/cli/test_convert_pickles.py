"""`loratool info` and `loratool convert` of PyTorch files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from tests.builders import build, typical_parts
from tests.pickles import Called, tensor, torch_zip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    made = {key: one.load() for key, one in bundle.tensors.items()}
    torch.save({"state_dict": made, "epoch": 3, "seeds": [1]}, tmp_path / "style.pt")
    return tmp_path / "style.pt"


def test_info(lora: Path) -> None:
    done = run("info", lora)
    assert done.exit_code == 0, done.stderr
    assert "kohya layout" in done.stdout and "Stable Diffusion 1.x" in done.stdout
    assert "left out" in done.stdout and "seeds" in done.stdout
    told = json.loads(run("info", lora, "--json").stdout)
    assert told["metadata"] == {"epoch": "3"} and told["size_bytes"] == lora.stat().st_size


def test_convert_with_and_without_a_layout(lora: Path, tmp_path: Path) -> None:
    done = run("convert", lora, "-o", tmp_path / "same.safetensors")
    assert done.exit_code == 0, done.stderr
    assert "all the same bit for bit" in done.stdout and "seeds" in done.stdout
    assert run("convert", lora, "--to", "diffusers", "-o", tmp_path / "d.safetensors").exit_code == 0
    told = json.loads(run("convert", lora, "-o", tmp_path / "j.safetensors", "--json").stdout)
    assert told["compared"] == told["tensors"] > 0
    done = run("convert", lora, "-o", tmp_path / "n.safetensors", "--no-verify")
    assert "no (--no-verify)" in done.stdout


@pytest.mark.parametrize("option", [("--dtype", "fp16"), ("--rank", "2"), ("--drop-extras",), ("--base", "x")])
def test_options_that_need_a_layout(lora: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    done = run("convert", lora, "-o", tmp_path / "x.safetensors", *option)
    assert done.exit_code == 2
    assert done.stderr == f"error: {option[0]} needs --to; name a layout with --to, or leave it out\n"


def test_a_file_that_asks_for_more(tmp_path: Path) -> None:
    file = tmp_path / "evil.pt"
    file.write_bytes(torch_zip({"a": tensor(), "b": Called("os.\x1b[31msystem", ("touch sentinel",))}))
    for arguments in (
        ("info", file),
        ("convert", file, "-o", tmp_path / "o"),
        ("resize", file, "--rank", 1, "-o", "o"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1 and done.stdout == ""
        assert (
            done.stderr.count("\n") == 1
            and "asks for os.\\x1b[31msystem, which no file of weights needs" in done.stderr
        )


def test_info_needs_no_torch(lora: Path) -> None:
    code = (
        "import sys\nfrom loratool.cli.main import app\n"
        f"app(['info', {str(lora)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)), file=sys.stderr)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, timeout=60
    )
    assert done.stderr == "[]\n"
