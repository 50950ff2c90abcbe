"""`loratool extract` as a user runs it: options, reports, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.tensor import LazyTensor
from loratool.files.safetensors import write_safetensors
from loratool.ops.open import open_adapter
from tests.cli.test_info import HOSTILE, assert_fits, assert_inert
from tests.cli.test_resize_cli import assert_refused, data, names
from tests.ops.test_extract import Model, llm, noise, save

RULES = {
    "rank": ["--rank", "2"],
    "energy": ["--energy", "0.8"],
    "ratio": ["--ratio", "2"],
    "cumulative": ["--cumulative", "0.6"],
    "knee": ["--knee"],
    "error": ["--error", "0.3"],
    "size": ["--size", "300KiB"],
}

Sides = tuple[Path, Path]


def run(sides: Sides, *arguments: str | Path) -> Result:
    words = ["extract", "--base", sides[0], "--tuned", sides[1], *arguments]
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A narrow SD 1.x before and after training; a convolution did not change, norms did."""
    folder = tmp_path_factory.mktemp("sides")
    model = Model("sd15", {"unet": [], "text_encoder": []}, narrow=32, rank=3)
    for at, (key, delta) in enumerate(model.deltas.items()):
        model.deltas[key] = delta + noise(delta.shape, at, 5e-5)
    model.deltas["unet", "conv_in"] *= 0
    base = model.write(folder / "base.safetensors", "ldm", tuned=False)
    for key, weight in model.weights.items():
        model.weights[key] = weight + 0.01 if "norm1" in key[1] else weight
    return base, model.write(folder / "tuned", "diffusers", tuned=True)


def test_a_report_on_stdout(sides: Sides, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    result = run(sides, "--rank", "2", "-o", output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert_fits(result.stdout)
    flat = " ".join(result.stdout.split())
    facts = [
        "Stable Diffusion 1.x",
        "rule rank 2",
        "kohya, 353 modules, rank 2",
        "F16",
        "of the energy; relative error",
    ]
    facts += ["exact; every error was measured", "1 weight without any difference", "norms differ (norm"]
    facts += ["no pair holds them, --full does", "353 updates read back: relative error", "text_encoder", "all 353"]
    facts += ["worst modules", "change: norm of the difference over that of the base weight"]
    assert [fact for fact in facts if fact not in flat] == []
    assert len(result.stdout.splitlines()) <= 40
    assert {module.rank for module in open_adapter(output).modules} <= {1, 2}


def test_a_report_without_pairs(tmp_path: Path) -> None:
    before = llm(False)
    norm = "model.layers.0.input_layernorm.weight"
    files = save(tmp_path / "a", before), save(tmp_path / "b", before | {norm: before[norm] + 0.01})
    result = run(files, "--rank", "2", "--full", "-o", tmp_path / "o.safetensors")
    assert result.exit_code == 0
    titles = [line.split("  ")[0] for line in result.stdout.splitlines() if line[:1].strip()]
    assert titles == ["base", "tuned", "rule", "wrote", "skipped", "in full", "verified"]
    assert "verified  every tensor read back, the same bytes" in result.stdout
    assert "comfyui, 0 modules" in result.stdout and "1 norm differs" in result.stdout

    resized = CliRunner().invoke(
        app, ["resize", str(tmp_path / "o.safetensors"), "--rank", "1", "-o", str(tmp_path / "r.safetensors")]
    )
    assert resized.exit_code == 0, resized.output


@pytest.mark.parametrize("kind", RULES)
def test_every_rule(sides: Sides, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "o.safetensors"
    found = data(run(sides, *RULES[kind], "-o", output, "--json"))
    assert found["rule"].split()[0] == kind
    assert found["output"] == str(output) and found["size_after"] == output.stat().st_size
    assert found["held"]["modules"] == len(found["modules"]) == 353
    if kind == "size":
        assert 0.98 * 300 * 1024 <= found["size_after"] <= 300 * 1024


def test_json_adds_up(sides: Sides) -> None:
    found = data(run(sides, "--rank", "2", "--dry-run", "--json"))
    assert (found["output"], found["held"], found["unchanged"], found["below"]) == (None, None, 1, [])
    assert sum(part["modules"] for part in found["components"]) == len(found["modules"])
    lost = math.fsum((cut["error"] * cut["norm"]) ** 2 for cut in found["modules"])
    total = math.fsum(cut["norm"] ** 2 for cut in found["modules"])
    assert found["error"] == pytest.approx(math.sqrt(lost / total))
    assert found["norm"] == pytest.approx(math.sqrt(total))
    assert [one["kind"] for one in found["others"]] == ["norm"]


def test_options(sides: Sides, tmp_path: Path) -> None:
    words = ["--energy", "0.99", "--max-rank", "4", "--conv-rank", "1", "--min-norm", "1e-4", "--dtype", "bf16"]
    output = tmp_path / "o.safetensors"
    result = run(sides, *words, "--to", "comfyui", "--full", "--exact", "--device", "cpu", "-o", output, "--modules")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    made = open_adapter(output)
    assert (made.layout, {module.dtype for module in made.modules}) == ("comfyui", {"BF16"})
    assert {module.rank for module in made.modules if any(n > 1 for n in module.shape[2:])} == {1}
    assert {module.family.id for module in made.modules} == {"lora", "diff"} and not made.unread_families
    assert "kept in full" in " ".join(result.stdout.split())
    assert sum("unet." in line for line in result.stdout.splitlines()) > 250
    assert_refused(run(sides, "--rank", "2", "-o", output), 1, "--overwrite")
    assert run(sides, "--rank", "2", "-o", output, "--overwrite", "--no-verify").exit_code == 0


def test_a_language_model(tmp_path: Path) -> None:
    folder, output = tmp_path / "llama", tmp_path / "out"
    save(folder / "model.safetensors", llm(False))
    tuned = save(tmp_path / "tuned.safetensors", llm(True))
    result = run((folder, tuned), "--rank", "2", "-o", output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert names(output) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2


def test_hostile_names_are_inert(tmp_path: Path) -> None:
    stem = f"{HOSTILE}.0.$\\frac{{q}}"
    made = []
    for name, seed in (("a\x1b[31m", 0), ("b", 1)):
        tensors = {f"{stem}.{at}.weight": LazyTensor.from_torch(noise((8, 8), seed * 9 + at)) for at in range(3)}
        write_safetensors(tmp_path / name, tensors, {})
        made.append(tmp_path / name)
    for options in ([], ["--json"], ["--modules"]):
        result = run((made[0], made[1]), "--rank", "1", "--dry-run", *options)
        assert result.exit_code == 0, result.output
        assert_inert(result.stdout)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, ["no rule", "--rank 32"]),
        (["--rank", "2", "--knee"], 2, ["rank 2 and knee are 2 rules", "name one"]),
        (["--rank", "0"], 2, ["--rank is '0'"]),
        (["--energy", "1.5"], 2, ["--energy"]),
        (["--size", "1KiB"], 1, ["smallest possible is"]),
        (["--rank", "2", "--to", "nope"], 2, ["no layout", "kohya"]),
        (["--rank", "2", "--dtype", "int3"], 2, ["no dtype"]),
        (["--rank", "2", "--device", "tpu"], 2, ["no device"]),
        (["--rank", "2", "--architecture", "sd16"], 2, ["sd15"]),
        (["--rank", "2", "--min-norm", "-1"], 2, ["--min-norm"]),
        (["--rank", "2", "--clamp", "7"], 2, ["--clamp"]),
        (["--rank", "2", "--to", "diffusers", "--full"], 1, ["diffusers has no spelling", "--to kohya"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_makes_no_sense(sides: Sides, tmp_path: Path, options: list[str], code: int, words: list[str]) -> None:
    assert_refused(run(sides, *options, "-o", tmp_path / "o.safetensors"), code, *words)
    assert names(tmp_path) == []


def test_where_to_write_is_missing(sides: Sides) -> None:
    assert_refused(run(sides, "--rank", "2"), 2, "-o", "--dry-run")


def test_what_is_no_checkpoint(sides: Sides, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"<!DOCTYPE html>")
    for pair in ((sides[0], broken), (broken, sides[1])):
        assert_refused(run(pair, "--rank", "2", "--dry-run"), 1, str(broken))
    missing = run((sides[0], tmp_path / "none.safetensors"), "--rank", "2", "--dry-run")
    assert missing.exit_code in (1, 2) and missing.stderr.startswith("error: ") and "none.safetensors" in missing.stderr


def test_nan_names_the_weight(sides: Sides, tmp_path: Path) -> None:
    tensors: dict[str, Any] = llm(True)
    tensors["lm_head.weight"] = torch.full((40, 16), torch.nan)
    broken, base = save(tmp_path / "nan.safetensors", tensors), save(tmp_path / "a.safetensors", llm(False))
    result = run((base, broken), "--rank", "2", "-o", tmp_path / "o.safetensors")
    assert_refused(result, 1, "nan.safetensors", "lm_head", "NaN")
    assert names(tmp_path) == ["a.safetensors", "nan.safetensors"]
