"""`loratool info`: what it says, how it looks, and what it says about files that are no LoRA."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Mapping
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
from tests.builders import Style, build, typical_parts, write_file, zero_file

SCHEMA: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "layout": str,
    "architecture": str,
    "architecture_score": (int, float),
    "runner_up": dict,
    "standard_width": bool,
    "written_by": (str, type(None)),
    "families": dict,
    "modules": int,
    "components": dict,
    "ranks": dict,
    "alphas": dict,
    "dtypes": dict,
    "dora_modules": int,
    "parameters": int,
    "size_bytes": int,
    "training": dict,
    "tags": list,
    "trigger": (str, type(None)),
    "webui_tag": str,
    "metadata": dict,
    "unread_keys": list,
    "unread_families": dict,
    "notes": list,
}
"""Fields that programs rely on: more may come, none may go or change its type."""

COMPONENT_SCHEMA = {"modules": int, "parameters": int, "families": dict, "ranks": dict, "alphas": dict, "blocks": dict}
MODULE_SCHEMA = {
    "component": str,
    "targets": list,
    "family": str,
    "rank": int,
    "alpha": (int, float, type(None)),
    "scale": (int, float),
    "shape": list,
    "dtype": str,
    "dora": bool,
    "keys": dict,
}

TRAINING = {
    "ss_output_name": "my_style",
    "ss_base_model_version": "sd_v1",
    "ss_sd_model_name": "v1-5-pruned.safetensors",
    "ss_resolution": "(512, 512)",
    "ss_steps": "1200",
    "ss_epoch": "10",
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0001",
    "ss_text_encoder_lr": "5e-05",
    "ss_optimizer": "torch.optim.AdamW",
    "ss_training_started_at": "1700000000.0",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "modelspec.trigger_phrase": "ohwx person",
    "ss_tag_frequency": json.dumps({"10_ohwx": {"1girl": 20, "solo": 18, "smile": 3}, "5_more": {"1girl": 2}}),
}


def run(*arguments: str | Path, columns: int = 80, env: Mapping[str, str] | None = None) -> Result:
    """The command in this process; 80 columns wide."""
    settings = {"COLUMNS": str(columns), **(env or {})}
    return CliRunner().invoke(app, ["info", *map(str, arguments)], env=settings)


def shell(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    settings = {**os.environ, "COLUMNS": "80", **(env or {})}
    command = [sys.executable, "-c", "from loratool.cli.main import app; app()", "info", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=60)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    parts = typical_parts("sd15", "kohya", rank=4, alpha=2.0)
    return write_file(tmp_path / "my_style.safetensors", build(parts, "kohya", Style(metadata=TRAINING)))


def conforms(data: Mapping[str, object], schema: Mapping[str, type | tuple[type, ...]]) -> None:
    assert schema.keys() <= data.keys()
    for field, kind in schema.items():
        assert isinstance(data[field], kind), field


# -- JSON -----------------------------------------------------------------------------------------------------------


def test_json_has_the_schema(lora: Path) -> None:
    result = run("--json", lora)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.isascii()
    data = json.loads(result.stdout)
    conforms(data, SCHEMA)
    for component in data["components"].values():
        conforms(component, COMPONENT_SCHEMA)
    assert "module_list" not in data


def test_json_says_what_is_there(lora: Path) -> None:
    data = json.loads(run("--json", lora).stdout)
    count = len(typical_parts("sd15", "kohya"))
    assert data["path"] == str(lora)
    assert (data["layout"], data["architecture"], data["architecture_score"]) == ("kohya", "sd15", 1.0)
    assert data["standard_width"] is True
    assert data["modules"] == count == sum(c["modules"] for c in data["components"].values())
    assert list(data["components"]) == ["unet", "text_encoder"]
    assert (data["families"], data["ranks"], data["alphas"]) == ({"lora": count}, {"4": count}, {"2": count})
    assert data["dtypes"] == {"F16": 2 * count}
    assert data["size_bytes"] == lora.stat().st_size
    assert data["metadata"] == TRAINING
    assert data["training"]["base model"] == "v1-5-pruned.safetensors"
    assert data["training"]["trained"] == "2023-11-14 22:13 UTC"
    assert data["tags"][0] == {"tag": "1girl", "count": 22}
    assert data["trigger"] == "ohwx person"
    assert data["webui_tag"] == "<lora:my_style:1>"
    assert data["written_by"] == "sd-scripts (networks.lora)"
    assert data["unread_keys"] == data["notes"] == []


def test_json_with_keys_lists_every_module(lora: Path) -> None:
    data = json.loads(run("--json", "--keys", lora).stdout)
    assert len(data["module_list"]) == data["modules"]
    for module in data["module_list"]:
        conforms(module, MODULE_SCHEMA)
        assert (module["rank"], module["alpha"], module["scale"], module["dtype"]) == (4, 2.0, 0.5, "F16")
        assert set(module["keys"]) == {"up", "down", "alpha"}


def test_json_of_several_files_is_a_list(lora: Path, tmp_path: Path) -> None:
    other = write_file(tmp_path / "b.safetensors", build(typical_parts("flux", "diffusers"), "diffusers"))
    broken = tmp_path / "c.safetensors"
    broken.write_bytes(b"<!DOCTYPE html>")
    result = run("--json", lora, other, broken)
    data = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [entry["path"] for entry in data] == [str(lora), str(other), str(broken)]
    assert [entry.get("architecture") for entry in data] == ["sd15", "flux", None]
    assert "web page" in data[2]["error"]


def test_json_does_not_depend_on_the_terminal(lora: Path) -> None:
    assert run("--json", lora, columns=40).stdout == run("--json", lora, columns=200).stdout


# -- text -----------------------------------------------------------------------------------------------------------


def width(line: str) -> int:
    """Columns of a line on a terminal."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def assert_fits(text: str, columns: int = 80) -> None:
    wide = [line for line in text.splitlines() if width(line) > columns]
    assert not wide, wide


def test_one_screen_of_80_columns(lora: Path) -> None:
    result = run(lora)
    assert (result.exit_code, result.stderr) == (0, "")
    assert_fits(result.stdout)
    assert len(result.stdout.splitlines()) <= 40
    flat = " ".join(result.stdout.split())
    for fact in ("my_style.safetensors", "Stable Diffusion 1.x", "kohya", "unet", "text_encoder", "F16", "ohwx person",
                 "<lora:my_style:1>", "1girl (22)", "v1-5-pruned.safetensors", "1200", "2023-11-14"):  # fmt: skip
        assert fact in flat, fact


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_nothing_is_wider_than_the_terminal(tmp_path: Path, architecture: str, columns: int) -> None:
    long = {**TRAINING, "ss_output_name": "very_long_" * 30, "modelspec.trigger_phrase": "word " * 200}
    parts = typical_parts(architecture, "kohya", alpha=1.0)
    name = "a_very_long_file_name_of_a_lora_that_somebody_once_made_for_a_friend_" * 2 + ".safetensors"
    file = write_file(tmp_path / name, build(parts, "kohya", Style(metadata=long)))
    assert_fits(run(file, columns=columns).stdout, columns)
    assert_fits(run(file, file, columns=columns).stdout, columns)


def test_what_is_cut_is_said(tmp_path: Path) -> None:
    long = {**TRAINING, "modelspec.trigger_phrase": "x" * 1000}
    extras = {f"strange.{i}": LazyTensor.scalar(0.0, "F32") for i in range(20)}
    bundle = build(typical_parts("sd15", "kohya"), "kohya", Style(metadata=long))
    bundle = Bundle({**bundle.tensors, **extras}, bundle.metadata)
    flat = " ".join(run(write_file(tmp_path / "a.safetensors", bundle)).stdout.split())
    assert "(+800 characters)" in flat
    assert "20 keys" in flat and "+12 more" in flat
    assert not any(char in flat for char in "…")


def test_keys_lists_every_module_whole(lora: Path) -> None:
    result = run("--keys", lora)
    for part in typical_parts("sd15", "kohya"):
        line = f"{part.weight.component}.{part.weight.targets[0].path}  lora rank 4, alpha 2"
        assert line in result.stdout


def test_metadata_shows_every_entry_whole(lora: Path) -> None:
    result = run("--metadata", lora)
    for key, value in TRAINING.items():
        assert f"{key}: {value}" in result.stdout


def test_several_files_are_rows_and_totals(lora: Path, tmp_path: Path) -> None:
    other = write_file(tmp_path / "flux.safetensors", build(typical_parts("flux", "comfyui"), "comfyui"))
    result = run(lora, other)
    assert result.exit_code == 0
    assert_fits(result.stdout)
    rows = result.stdout.splitlines()
    assert any("sd15" in row and "kohya" in row for row in rows)
    assert any("flux" in row and "comfyui" in row for row in rows)
    assert "2 files" in rows[-1] and "1 sd15" in rows[-1] and "1 flux" in rows[-1]


def test_broken_files_among_others_are_counted(lora: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"x")
    result = run(lora, lora, broken)
    assert result.exit_code == 1
    assert "2 files" in result.stdout and "1 could not be read" in " ".join(result.stdout.split())
    assert result.stderr.count("\n") == 1 and str(broken) in result.stderr


def test_peft_folders_are_shown(tmp_path: Path) -> None:
    folder = write_file(tmp_path / "adapter", build(typical_parts("sdxl", "peft", alpha=8.0), "peft"))
    data = json.loads(run("--json", folder).stdout)
    assert (data["layout"], data["architecture"]) == ("peft", "sdxl")
    assert set(data["components"]) == {"unet", "text_encoder", "text_encoder_2"}
    assert data["alphas"] == {"8": data["modules"]}
    assert data["size_bytes"] == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_results_on_stdout_without_colours_in_a_pipe(lora: Path) -> None:
    for env in ({}, {"NO_COLOR": "1"}, {"NO_COLOR": "1", "TERM": "xterm-256color"}):
        done = shell(lora, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert_fits(done.stdout)


def test_no_color_is_obeyed_when_colours_are_forced(lora: Path) -> None:
    done = shell(lora, env={"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"})
    codes = {part.partition("m")[0] for part in done.stdout.split("\x1b[")[1:]}
    assert codes <= {"0", "1", "2", "1;2", "2;1"}, codes  # bold and dim are no colours


def test_a_reader_that_leaves_is_no_error(lora: Path) -> None:
    for options in (["--keys"], ["--json", "--keys", "--metadata"], []):
        command = [
            sys.executable,
            "-c",
            "from loratool.cli.main import app; app()",
            "info",
            *options,
            *[str(lora)] * 40,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        complaints = process.stderr.read()
        process.stderr.close()
        process.wait(timeout=60)
        assert complaints == ""


def test_the_input_is_not_touched(lora: Path) -> None:
    before, at = lora.read_bytes(), lora.stat().st_mtime_ns
    lora.chmod(0o444)
    for options in ([], ["--json"], ["--keys", "--metadata"]):
        assert run(*options, lora).exit_code == 0
    assert (lora.read_bytes(), lora.stat().st_mtime_ns) == (before, at)
    assert [path.name for path in lora.parent.iterdir()] == [lora.name]


# -- hostile text ---------------------------------------------------------------------------------------------------

HOSTILE = "\x1b[31mred\x1b[0m \x1b]0;title\x07 [bold]markup[/bold] :smile: \u202egnp.exe \u2066x\u200b\r\nsecond\x9b2J"


@pytest.mark.parametrize(
    "options", [[], ["--keys"], ["--metadata"], ["--keys", "--metadata"], ["--json"]], ids=" ".join
)
@pytest.mark.parametrize("files", [1, 2])
def test_hostile_text_is_inert(tmp_path: Path, options: list[str], files: int) -> None:
    metadata = {key: HOSTILE for key in TRAINING if key != "ss_tag_frequency"}
    metadata |= {HOSTILE: HOSTILE, "ss_tag_frequency": json.dumps({"x": {HOSTILE: 3}})}
    bundle = build(typical_parts("sd15", "kohya"), "kohya", Style(metadata=metadata))
    scalar = LazyTensor.scalar(0.0, "F32")
    name = "lora_" + HOSTILE.replace("\n", "").replace(".", "")
    matrix = LazyTensor.from_torch(torch.zeros(2, 2))
    extras = {
        HOSTILE: scalar,
        f"{name}.diff": scalar,
        f"{name}2.lora_up.weight": matrix,
        f"{name}2.lora_down.weight": matrix,
    }
    file_name = HOSTILE.replace("/", "").replace("\n", "")[:80]
    file = write_file(tmp_path / f"{file_name}.safetensors", Bundle({**bundle.tensors, **extras}, bundle.metadata))
    result = run(*options, *[file] * files)
    assert result.exit_code == 0, result.output
    assert_inert(result.stdout)
    assert result.stderr == ""
    if options == ["--metadata"]:
        assert "[bold]markup[/bold] :smile:" in result.stdout  # shown, not acted on


def assert_inert(text: str) -> None:
    bad = {char for char in text if unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp"} and char != "\n"}
    assert not bad, [hex(ord(char)) for char in bad]


def test_hostile_text_in_errors_is_inert(tmp_path: Path) -> None:
    half = {f"lora_{HOSTILE}.lora_up.weight".replace(".exe", ""): LazyTensor.from_torch(torch.zeros(2, 2))}
    file = tmp_path / f"{HOSTILE.replace('/', '')[:60]}.safetensors"
    write_safetensors(file, half, {})
    result = run(file)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert_inert(result.stderr)
    assert result.stdout == ""


@pytest.mark.parametrize("architecture", ["[bold]x", "\x1b[31m", "nope"])
def test_hostile_arguments_are_inert(lora: Path, architecture: str) -> None:
    result = run("--architecture", architecture, lora)
    assert result.exit_code == 2
    assert_inert(result.stderr)


# -- files that are no LoRA -----------------------------------------------------------------------------------------


def weights_of(architecture: str, component: str, checkpoint: str) -> dict[str, tuple[int, ...]]:
    """key -> shape of a component's checkpoint."""
    table = architectures()[architecture]
    voice = next(kind for kind in table.checkpoints if kind.id == checkpoint).voices[component]
    naming = table.naming(component, voice.naming)
    return {
        voice.prefix + naming.home(targets[0]).tensor_key: (sum(t.rows for t in targets), *targets[0].shape[1:])
        for targets in naming.values()
    }


def zip_with(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")


def matrices(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    zero_file(path, shapes, "F16")


def truncated(path: Path) -> None:
    write_file(path, build(typical_parts("sd15", "kohya"), "kohya"))
    path.write_bytes(path.read_bytes()[:-1000])


STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "truncated"),
    "web page": (lambda path: path.write_bytes(b"<!DOCTYPE html>\n<html><body>Log in</body></html>"), "web page"),
    "git-lfs": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "git-lfs pointer",
    ),
    "zip": (lambda path: zip_with(path, ["readme.txt"]), "zip archive"),
    "torch zip": (lambda path: torch.save({"a": torch.zeros(1)}, path), "PyTorch file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)), "pickle"),
    "json": (lambda path: path.write_bytes(b'{"r": 4}' + b" " * 40), "JSON"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "zeros": (lambda path: path.write_bytes(bytes(100)), "zero bytes"),
    "no tensor": (lambda path: matrices(path, {}), "no tensor"),
    "missing half": (
        lambda path: matrices(path, {f"{STEM}.lora_down.weight": (4, 320)}),
        "half of the module is missing",
    ),
    "mismatched ranks": (
        lambda path: matrices(path, {f"{STEM}.lora_down.weight": (4, 320), f"{STEM}.lora_up.weight": (320, 5)}),
        "ranks differ",
    ),
    "checkpoint": (
        lambda path: matrices(path, weights_of("sd15", "unet", "ldm")),
        "checkpoint of Stable Diffusion 1.x",
    ),
    "diffusers unet": (
        lambda path: matrices(path, weights_of("sd15", "unet", "diffusers")),
        "checkpoint of Stable Diffusion 1.x",
    ),
    "sdxl checkpoint": (
        lambda path: matrices(path, weights_of("sdxl", "unet", "sgm")),
        "checkpoint of Stable Diffusion XL",
    ),
    "flux checkpoint": (lambda path: matrices(path, weights_of("flux", "transformer", "bfl")), "checkpoint of FLUX.1"),
    "vae": (
        lambda path: matrices(
            path,
            {
                "encoder.conv_in.weight": (128, 3, 3, 3),
                "encoder.conv_in.bias": (128,),
                "decoder.conv_in.weight": (512, 4, 3, 3),
                "decoder.conv_in.bias": (512,),
                "quant_conv.weight": (8, 8, 1, 1),
            },
        ),
        "a VAE",
    ),
    "textual inversion": (lambda path: matrices(path, {"emb_params": (8, 768)}), "textual inversion"),
    "sdxl textual inversion": (
        lambda path: matrices(path, {"clip_l": (4, 768), "clip_g": (4, 1280)}),
        "textual inversion",
    ),
    "nothing known": (lambda path: matrices(path, {"a": (3,), "b": (3,), "c": (3,), "d": (3,), "e": (3,)}), "no key"),
}


def assert_one_line(result: Result, path: Path, what: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ") and str(path) in result.stderr
    assert what in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_get_one_line(tmp_path: Path, kind: str) -> None:
    make, what = BAD[kind]
    path = tmp_path / "bad.safetensors"
    make(path)
    assert_one_line(run(path), path, what)
    hint = run(path).stderr
    assert ";" in hint or kind in ("missing half",), f"what to do? {hint}"


def test_missing_files_and_folders_without_adapters(tmp_path: Path) -> None:
    assert_one_line(run(tmp_path / "no.safetensors"), tmp_path / "no.safetensors", "no such file")
    (tmp_path / "folder").mkdir()
    assert_one_line(run(tmp_path / "folder"), tmp_path / "folder", "folder without")
    (tmp_path / "folder" / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert_one_line(run(tmp_path / "folder"), tmp_path / "folder", "adapter_model.safetensors")


def test_a_folder_that_is_broken_names_its_file(tmp_path: Path) -> None:
    folder = write_file(tmp_path / "adapter", build(typical_parts("sd15", "peft"), "peft"))
    config = folder / "unet" / "adapter_config.json"
    config.write_text("{", encoding="utf-8")
    assert_one_line(run(folder), folder, "adapter_config.json")


def test_unknown_models_are_shown_as_such(tmp_path: Path) -> None:
    shapes = {f"lora_unet_blocks_{i}_mixer_proj.lora_{end}.weight": (4, 4) for i in range(3) for end in ("up", "down")}
    data = json.loads(run("--json", zero_file(tmp_path / "a.safetensors", shapes, "F16")).stdout)
    assert (data["architecture"], data["architecture_score"], data["modules"]) == ("unknown", 0.0, 3)


def test_a_bug_free_exit_code_for_a_senseless_command(lora: Path) -> None:
    assert run().exit_code == 2
    assert run("--nonsense", lora).exit_code == 2
    assert run("--architecture", "sd155", lora).exit_code == 2
    assert "did you mean sd15?" in " ".join(run("--architecture", "sd155", lora).stderr.split())
