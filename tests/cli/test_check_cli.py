"""`loratool check` and `convert --for`: verdicts, exit codes, the fix that helps, JSON."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.adapter import Bundle
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import read_bundle
from loratool.ops.open import open_adapter
from tests.builders import Part, Style, build, weights, write_file
from tests.cli.test_info import HOSTILE, assert_fits, assert_inert, conforms

CHECK_SCHEMA: dict[str, type | tuple[type, ...]] = {
    "path": str,
    "layout": str,
    "architecture": str,
    "program": str,
    "program_version": str,
    "verdict": str,
    "fully": bool,
    "modules": dict,
    "reasons": list,
    "ignored_keys": list,
    "refused_keys": list,
    "unread_families": dict,
    "remedy": (dict, type(None)),
    "notes": list,
}


def run(*arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)})


def flat(text: str) -> str:
    return " ".join(text.split())


SOME = re.compile(r"down_blocks\.0\.attentions\.0\.transformer_blocks|encoder\.layers\.[0-3]\.(self_attn|mlp)")
MODULES = 34
"""Modules that every program has a place for: 10 of the UNet, 24 of the text encoder."""


def written(place: Path, layout: str, change: Callable[[dict[str, LazyTensor]], dict[str, LazyTensor]]) -> Path:
    """A file of SD 1.5 in some layout, with its tensors changed."""
    parts = [Part(one, 4, 2.0) for one in weights("sd15", layout) if SOME.search(one.name)]
    assert len(parts) == MODULES
    bundle = build(parts, layout, Style(metadata={"title": "x"}))
    return write_file(place, Bundle(change(dict(bundle.tensors)), bundle.metadata, bundle.side_files))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return written(tmp_path / "style.safetensors", "kohya", lambda tensors: tensors)


@pytest.fixture
def dora(tmp_path: Path) -> Path:
    def magnitudes(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        ups = {key: t for key, t in tensors.items() if key.endswith(".lora_up.weight")}
        made = {key: torch.ones(t.shape[0], *(1,) * len(t.shape[1:])) for key, t in ups.items()}
        scales = {key.replace("lora_up.weight", "dora_scale"): LazyTensor.from_torch(t) for key, t in made.items()}
        return {**tensors, **scales}

    return written(tmp_path / "dora.safetensors", "kohya", magnitudes)


def test_a_file_that_loads(lora: Path) -> None:
    result = run("check", lora, "--for", "comfyui")
    assert (result.exit_code, result.stderr) == (0, "")
    assert_fits(result.stdout)
    for words in ("ComfyUI loads fully", f"read {MODULES} modules", "Stable Diffusion 1.x", "kohya layout"):
        assert words in flat(result.stdout)
    assert "help" not in result.stdout


def test_a_file_that_loads_differently_and_the_fix(dora: Path, tmp_path: Path) -> None:
    result = run("check", dora, "--for", "diffusers", columns=200)
    assert result.exit_code == 1
    text = flat(result.stdout)
    assert "diffusers loads but differently" in text
    assert f"drops DoRA magnitudes called dora_scale, with a warning: {MODULES} modules changed" in text
    (command,) = re.findall(r"(loratool convert .* --for diffusers) -o OUT", text)
    output = tmp_path / "fixed.safetensors"
    assert run(*shlex.split(command)[1:], "-o", output).exit_code == 0
    assert run("check", output, "--for", "diffusers").exit_code == 0


def test_a_file_that_does_not_load(lora: Path, tmp_path: Path) -> None:
    result = run("check", lora, "--for", "peft", columns=200)
    assert result.exit_code == 1
    assert "PEFT does not load" in flat(result.stdout)
    assert "does not read the kohya layout" in flat(result.stdout)
    assert run("convert", lora, "--for", "peft", "-o", tmp_path / "folder").exit_code == 0
    assert run("check", tmp_path / "folder", "--for", "peft").exit_code == 0


def test_several_programs(lora: Path) -> None:
    result = run("check", lora, "--for", "comfyui", "--for", "a1111", "--for", "comfyui")
    assert result.exit_code == 0
    assert result.stdout.count("loads fully") == 2
    assert run("check", lora, "--for", "comfyui", "--for", "vllm").exit_code == 1


def test_module_by_module(lora: Path) -> None:
    result = run("check", lora, "--for", "comfyui", "--keys", columns=160)
    assert result.exit_code == 0
    assert len(re.findall(r"^ *unet\..* read$", result.stdout, re.MULTILINE)) == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--for", "comfyu"], ["comfyu", "did you mean comfyui?"]),
        ([], ["--for"]),
        (["--for", "comfyui", "--architecture", "sd16"], ["sd16"]),
    ],
)
def test_usage_errors(arguments: list[str], words: list[str], lora: Path) -> None:
    result = run("check", lora, *arguments, columns=300)
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr


def test_what_is_no_lora(tmp_path: Path) -> None:
    result = run("check", tmp_path / "none.safetensors", "--for", "comfyui")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_json_has_the_schema(dora: Path) -> None:
    result = run("check", dora, "--for", "diffusers", "--json", "--keys")
    assert result.exit_code == 1 and result.stdout.isascii()
    data = json.loads(result.stdout)
    modules = data.pop("module_list")
    conforms(data, CHECK_SCHEMA)
    assert data["verdict"] == "loads but differently" and not data["fully"]
    assert data["modules"] == {"read": 0, "changed": MODULES, "ignored": 0, "refused": 0}
    assert len(modules) == MODULES
    assert {tuple(module["drops"]) for module in modules} == {("magnitude",)}
    assert all(module["key"] in read_bundle(dora).tensors for module in modules)
    assert data["remedy"]["exact"] and "--for diffusers" in data["remedy"]["command"]
    several = json.loads(run("check", dora, "--for", "diffusers", "--for", "comfyui", "--json").stdout)
    assert [one["program"] for one in several] == ["diffusers", "comfyui"]
    assert several[1]["reasons"][0]["modules"] == MODULES
    assert "norm of the base weight" in several[1]["reasons"][0]["text"]


def test_hostile_names_are_inert(tmp_path: Path) -> None:
    def hostile(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        return {**tensors, HOSTILE: LazyTensor.from_torch(torch.ones(2))}

    file = written(tmp_path / "x.safetensors", "kohya", hostile)
    for name in ("comfyui", "diffusers"):
        result = run("check", file, "--for", name)
        assert result.exit_code == 1
        assert_inert(result.stdout)


# -- convert --for --------------------------------------------------------------------------------------------------


def test_it_chooses_a_layout_and_says_so(lora: Path, tmp_path: Path) -> None:
    result = run("convert", lora, "--for", "diffusers", "-o", tmp_path / "out.safetensors")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "fully in diffusers, by its rules" in flat(result.stdout)
    assert f"{MODULES} updates read back" in flat(result.stdout)


def test_it_writes_nothing_that_would_not_load_fully(dora: Path, tmp_path: Path) -> None:
    result = run("convert", dora, "--for", "comfyui", "-o", tmp_path / "out.safetensors", columns=300)
    assert result.exit_code == 1
    assert "ComfyUI loads it fully in no layout" in result.stderr and f"({MODULES} modules)" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_tensors_of_no_module_are_left_out_only_when_asked(tmp_path: Path) -> None:
    extra = {"bundle_emb.x.string_to_param.*": LazyTensor.from_torch(torch.ones(2, 4))}
    file = written(tmp_path / "x.safetensors", "kohya", lambda tensors: {**tensors, **extra})
    output = tmp_path / "out.safetensors"
    result = run("convert", file, "--for", "comfyui", "-o", output)
    assert result.exit_code == 1 and "--drop-extras" in result.stderr and not output.exists()
    assert run("check", file, "--for", "a1111").exit_code == 0  # it reads them
    assert run("convert", file, "--for", "a1111", "-o", output).exit_code == 0
    assert set(extra) <= read_bundle(output).tensors.keys()
    for name in ("comfyui", "kohya"):
        result = run("convert", file, "--for", name, "-o", output, "--overwrite", "--drop-extras")
        assert result.exit_code == 0 and "left out" in result.stdout
        assert run("check", output, "--for", name).exit_code == 0


def test_other_kinds_are_rewritten_only_when_asked(tmp_path: Path) -> None:
    def lokr(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        key = next(key for key in tensors if key.endswith("attn1_to_q.lora_down.weight"))
        stem = key.partition(".")[0]
        rest = {k: t for k, t in tensors.items() if not k.startswith(stem)}
        shapes = {"w1": (8, 8), "w2": (tensors[f"{stem}.lora_up.weight"].shape[0] // 8, tensors[key].shape[1] // 8)}
        made = {f"{stem}.lokr_{role}": LazyTensor.from_torch(torch.randn(shape)) for role, shape in shapes.items()}
        return {**rest, **made}

    file, output = written(tmp_path / "x.safetensors", "kohya", lokr), tmp_path / "out.safetensors"
    checked = run("check", file, "--for", "diffusers", columns=300)
    assert checked.exit_code == 1 and "--approximate lora" in checked.stdout and "not exact" in checked.stdout
    result = run("convert", file, "--for", "diffusers", "-o", output, columns=300)
    assert result.exit_code == 1 and "--approximate lora" in result.stderr and not output.exists()
    more = ["--approximate", "lora", "--energy", "0.9"]
    assert run("convert", file, "--for", "diffusers", "-o", output, *more).exit_code == 0
    assert run("check", output, "--for", "diffusers").exit_code == 0


def test_a_command_names_the_model_where_the_user_had_to(tmp_path: Path) -> None:
    """The second encoder of SDXL alone could be that of several models."""
    stem = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{stem}.lora_down.weight": torch.randn(4, 1280), f"{stem}.lora_up.weight": torch.randn(5120, 4)}
    stored = {key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()}
    file, output = write_file(tmp_path / "x.safetensors", Bundle(stored)), tmp_path / "out"
    result = run("check", file, "--for", "peft", "--architecture", "sdxl", columns=300)
    (command,) = re.findall(r"(loratool convert .*) -o OUT", flat(result.stdout))
    assert "--architecture sdxl" in command
    assert run(*shlex.split(command)[1:], "-o", output).exit_code == 0
    assert run("check", output, "--for", "peft", "--architecture", "sdxl").exit_code == 0


def test_a_command_asks_for_the_base_where_a_rewrite_needs_it(tmp_path: Path) -> None:
    def oft(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        stem = next(key for key in tensors if key.endswith("attn1_to_q.lora_down.weight")).partition(".")[0]
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(stem)}
        blocks = {".oft_blocks": torch.randn(80, 4, 4), ".alpha": torch.tensor(0.0)}
        return {**rest, **{stem + suffix: LazyTensor.from_torch(tensor) for suffix, tensor in blocks.items()}}

    file = written(tmp_path / "x.safetensors", "kohya", oft)
    for name in ("diffusers", "kohya"):
        remedy = json.loads(run("check", file, "--for", name, "--json").stdout)["remedy"]
        assert "--approximate lora --energy 0.999 --base BASE" in remedy["command"]
        assert not remedy["exact"]


def test_the_original_comes_back_where_the_program_loads_it(lora: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert run("convert", lora, "--for", "diffusers", "-o", there).exit_code == 0
    result = run("convert", there, "--for", "kohya", "-o", back)
    assert result.exit_code == 0 and "the original's" in flat(result.stdout)


def test_the_original_stays_away_where_the_program_does_not_load_it(tmp_path: Path) -> None:
    """Its spelling is one of kohya's, but not one that InvokeAI knows."""

    def letters(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        return {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): t for key, t in tensors.items()}

    file = written(tmp_path / "x.safetensors", "kohya", letters)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert run("check", file, "--for", "invokeai").exit_code == 1
    assert run("convert", file, "--to", "diffusers", "-o", there).exit_code == 0
    assert run("convert", there, "--for", "invokeai", "-o", back).exit_code == 0
    assert run("check", back, "--for", "invokeai").exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["--to", "kohya", "--for", "comfyui"]])
def test_one_of_to_and_for(arguments: list[str], lora: Path, tmp_path: Path) -> None:
    result = run("convert", lora, *arguments, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2
    assert "--to" in result.stderr and ("--for" in result.stderr or not arguments)


# -- language models -------------------------------------------------------------------------------------------------


def language_model(place: Path, **config: object) -> Path:
    names = [f"base_model.model.model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qv"]
    ranks = config.pop("ranks", [8] * 4)
    assert isinstance(ranks, list)
    tensors = {}
    for name, rank in zip(names, ranks, strict=True):
        tensors[f"{name}.lora_A.weight"] = LazyTensor.from_torch(torch.randn(rank, 32))
        tensors[f"{name}.lora_B.weight"] = LazyTensor.from_torch(torch.randn(32, rank))
    told = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **config}
    return write_file(place, Bundle(tensors, {}, {"adapter_config.json": json.dumps(told)}))


def test_vllm(tmp_path: Path) -> None:
    assert run("check", language_model(tmp_path / "a"), "--for", "vllm").exit_code == 0
    high = run("check", language_model(tmp_path / "b", ranks=[48] * 4), "--for", "vllm", columns=200)
    assert high.exit_code == 1 and "start vLLM with --max-lora-rank 64" in flat(high.stdout)
    too_high = run("check", language_model(tmp_path / "c", ranks=[1024] * 4), "--for", "vllm", columns=200)
    assert too_high.exit_code == 1 and "the highest that vLLM can be set to" in flat(too_high.stdout)
    pattern = {"rank_pattern": {"layers.0.self_attn.q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 2}}
    mixed = language_model(tmp_path / "d", ranks=[4, 8, 8, 8], **{"r": 8, **pattern})
    data = json.loads(run("check", mixed, "--for", "vllm", "--json", "--keys").stdout)
    assert data["verdict"] == "loads but differently"
    assert [module["strength"] for module in data["module_list"]] == [4.0, 1.0, 1.0, 1.0]
    assert "--for vllm" in data["remedy"]["command"] and data["remedy"]["exact"]
    result = run("convert", mixed, "--for", "vllm", "-o", tmp_path / "fixed")
    assert result.exit_code == 0 and "multiplied into the factors" in flat(result.stdout)
    assert "4 updates read back" in flat(result.stdout)
    assert run("check", tmp_path / "fixed", "--for", "vllm").exit_code == 0
    for before, after in zip(open_adapter(mixed).modules, open_adapter(tmp_path / "fixed").modules, strict=True):
        torch.testing.assert_close(after.delta(), before.delta(), rtol=1e-6, atol=1e-6)
    rs = language_model(tmp_path / "e", use_rslora=True)
    assert run("check", rs, "--for", "vllm").exit_code == 0
    assert run("check", rs, "--for", "peft").exit_code == 0
