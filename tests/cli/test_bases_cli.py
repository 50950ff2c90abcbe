"""`loratool bases`: the listing, adding, and what it does with hostile names and a broken config."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.ops.known_models import models
from loratool.ops.places import BASES_VARIABLE, ROOT_VARIABLES
from tests.checkpoints import sparse_checkpoint

CACHES = ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "LORATOOL_CONFIG")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*CACHES, *ROOT_VARIABLES, BASES_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    (home / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "here")
    return home


def run(*arguments: str | Path, columns: int = 80) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, ["bases", *map(str, arguments)], env={"COLUMNS": str(columns)})


def checkpoint(home: Path, name: str, architecture: str = "sd15", kind: str = "ldm") -> Path:
    return sparse_checkpoint(home / "ComfyUI/models/checkpoints" / f"{name}.safetensors", architecture, kind)


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_listing(home: Path) -> None:
    usual = checkpoint(home, "v1-5-pruned-emaonly")
    checkpoint(home, "dream")
    for name in ("a", "b"):
        checkpoint(home, f"a_rather_long_name_of_a_checkpoint_that_somebody_trained_{name}", "sdxl", "sgm")
    (usual.parent / "old.ckpt").write_bytes(b"x")
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    text = words(result.stdout)
    assert "sd15 Stable Diffusion 1.x, 1.8 GiB (ComfyUI)" in text
    assert "sdxl 2 files, none of them the published one: pick one" in text
    assert re.search(r"none found [\w, -]*\bflux, ", text)
    assert "dream sd15 1.8 GiB ComfyUI" in text
    assert "old.ckpt" in text.replace(" ", "") and "1 file of no known model" in text
    assert lines[-1] == "loratool bases add NAME PATH"
    wide = words(run(columns=200).stdout)
    assert f"4 {usual.parent} (ComfyUI)" in wide and f"{home}/stable-diffusion-webui," in wide


def test_nothing_at_all() -> None:
    result = run()
    text = words(result.stdout)
    assert result.exit_code == 0 and text.count("none found") == 1
    assert all(name in text for name in models())
    assert "other files" not in result.stdout and "(does not exist)" in words(result.stdout)


def test_json(home: Path) -> None:
    file = checkpoint(home, "v1-5-pruned")
    data = json.loads(run("--json").stdout)
    assert [one["name"] for one in data["names"]] == list(models())
    assert next(one for one in data["names"] if one["name"] == "sd15") == {
        "name": "sd15",
        "architecture": "sd15",
        "path": str(file),
        "size": file.stat().st_size,
        "source": "ComfyUI",
        "problem": None,
    }
    assert data["files"][0]["name"] == "v1-5-pruned"
    assert data["config"] == str(home / ".config/loratool/config.yaml")


def test_add(home: Path) -> None:
    file = checkpoint(home, "dream")
    result = run("add", "anime", file, columns=200)
    assert (result.exit_code, result.stderr) == (0, "")
    assert words(result.stdout).startswith(f"anime {file} Stable Diffusion 1.x, 1.8 GiB config {home}")
    other = checkpoint(home, "other")
    assert f"before {file}" in words(run("add", "anime", other, columns=200).stdout)
    assert json.loads(run("add", "anime", file, "--json").stdout)["replaced"] == str(other)
    assert "anime Stable Diffusion 1.x, 1.8 GiB (config file)" in words(run().stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["remove"], 2, "bases has no action 'remove'"),
        (["add"], 2, "add takes a name and a path"),
        (["add", "sd15"], 2, "add takes a name and a path"),
        (["add", "sd15", "none.safetensors"], 1, "does not exist"),
        (["add", "a/b", "none.safetensors"], 2, "cannot be a name"),
    ],
)
def test_what_makes_no_sense(arguments: list[str], code: int, what: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.count("\n") == 1 and what in result.stderr


def test_a_broken_config(home: Path) -> None:
    path = home / ".config/loratool/config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("bases:\n  sd15: [\n", encoding="utf-8")
    result = run()
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {path}: line 3: is no YAML")


HOSTILE = "\x1b[31mred\x1b[0m [bold]x[/bold] \u202egnp"


def test_hostile_names_are_inert(home: Path) -> None:
    checkpoint(home, HOSTILE)
    (home / f"ComfyUI/models/checkpoints/{HOSTILE}.ckpt").write_bytes(b"x")
    path = home / ".config/loratool/config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text('bases:\n  "\\x1b[31m": "/\\x1b[31m"\n"\\x1b": 1\n', encoding="utf-8")
    for options in ([], ["--json"]):
        result = run(*options)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout and "\u202e" not in result.stdout
    assert "[bold]" in run().stdout


def test_it_needs_no_torch(home: Path) -> None:
    checkpoint(home, "v1-5-pruned")
    code = "from loratool.cli.main import app\napp(['bases'], standalone_mode=False)\n"
    code += "import sys\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
