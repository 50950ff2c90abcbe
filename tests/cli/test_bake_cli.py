"""`loratool bake` and `loratool unbake` as a user runs them: reports, what is refused and how, prompts and names."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from tests.bakes import CONV, KEYS, TEXT, K, Q, kohya, load, noise, peft, save, updates
from tests.builders import build, typical_parts, write_file
from tests.checkpoints import sparse_checkpoint
from tests.cli.test_info import HOSTILE, assert_fits, assert_inert

SHAPES: Mapping[str, tuple[int, ...]] = {Q: (48, 32), K: (48, 32), CONV: (24, 8, 3, 3), TEXT: (16, 16)}
BIAS = "model.diffusion_model.out.0.bias"
BF16, F16 = torch.bfloat16, torch.float16


def run(*arguments: object, command: str = "bake", **env: str) -> Result:
    words = [command, *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(app, words, env={"COLUMNS": "80", **env})


def base_file(path: Path, dtype: torch.dtype = F16, metadata: Mapping[str, str] | None = None) -> Path:
    weights = {KEYS[stem]: noise(*shape, seed=at).to(dtype) for at, (stem, shape) in enumerate(SHAPES.items())}
    return save(path, {**weights, BIAS: noise(32, seed=50)}, metadata)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_file(tmp_path / "base.safetensors")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save(tmp_path / "style.safetensors", kohya(SHAPES))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def flat(result: Result) -> str:
    """The text of a run that went well, without its line ends."""
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return " ".join(result.stdout.split())


def data(result: Result) -> dict[str, Any]:
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    return found


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with what changes when it is written."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def refused(folder: Path, code: int, words: str, *arguments: object, command: str = "bake", **env: str) -> str:
    """The one line on stderr of a run that has to fail with nothing written in `folder`."""
    before = state(folder)
    result = run(*arguments, command=command, **env)
    assert result.exit_code == code, result.output
    assert result.stdout == "" and isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr
    assert_inert(result.stderr)
    assert state(folder) == before
    return result.stderr


def added(before: Path, after: Path, stem: str) -> torch.Tensor:
    return load(after)[KEYS[stem]].double() - load(before)[KEYS[stem]].double()


def strength_of(before: Path, after: Path, lora: Path, stem: str) -> float:
    """How many times the update of a module was added."""
    update = updates(load(lora))[stem]
    return float((added(before, after, stem) * update).sum() / update.square().sum())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_tells_it_all_in_80_columns(
    tmp_path: Path, base: Path, lora: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # short paths, which stay on a line
    result = run(f"{lora.name}:0.7", "--base", base.name, "-o", out.name)
    text = flat(result)
    assert_fits(result.stdout)
    facts = ["base base.safetensors Stable Diffusion 1.x", "adds style.safetensors strength 0.7, kohya, 4 modules"]
    facts += [
        f"wrote out.safetensors {out.stat().st_size / 1024:.1f} KiB in ",
        "changed 4 tensors, 9.9 KiB; 128 B keep",
    ]
    facts += ["verified 128 B compared, all the same; 8 random rows of 4 tensors"]
    facts += ["component tensors size update that survived rounding", "text_encoder 1 512 B", "unet 3 9.4 KiB"]
    assert [fact for fact in facts if fact not in text] == []
    off = re.search(r"off by (0\.\d\d) ulp at most", text)  # of random rows: mostly 0.50, sometimes a little less
    assert off is not None and 0.4 <= float(off[1]) <= 0.5
    assert text.count("%") == 2 and "warning" not in text
    assert strength_of(base, out, lora, Q) == pytest.approx(0.7, abs=0.01)


def test_several_loras_and_their_weights(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    other = save(tmp_path / "other.safetensors", kohya({Q: SHAPES[Q]}, seed=9))
    result = run(lora, other, "--weights", "0.5,-1", "--base", base, "-o", out)
    text = flat(result)
    assert_fits(result.stdout)
    assert "strength 0.5, kohya, 4 modules" in text and "strength -1, kohya, 1 module" in text
    exact = 0.5 * updates(load(lora))[Q] - updates(load(other))[Q]
    assert float((added(base, out, Q) - exact).norm() / exact.norm()) < 0.03


def test_tensors_lists_every_changed_one(base: Path, lora: Path, out: Path) -> None:
    result = run(lora, "--base", base, "-o", out, "--tensors")
    text = flat(result)
    assert_fits(result.stdout)
    assert "tensor dtype shape survived" in text
    assert all("x".join(map(str, shape)) in text for shape in SHAPES.values())


def test_json_is_the_report(base: Path, lora: Path, out: Path) -> None:
    found = data(run(f"{lora}:0.7", "--base", base, "-o", out, "--json"))
    (one,) = found["adapters"]
    assert (one["path"], one["strength"], one["sha256"]) == (str(lora), 0.7, sha256(lora))
    assert (found["output"], found["size"], found["untouched"]) == (str(out), out.stat().st_size, 128)
    assert (found["tensors"], "tensor_list" in found, found["unmatched"]) == (4, False, [])
    assert found["checked"]["bytes"] == 128 and found["checked"]["rows"] == 8
    assert [(one["component"], one["tensors"]) for one in found["components"]] == [("text_encoder", 1), ("unet", 3)]
    listed = data(run(lora, "--base", base, "-o", out, "--overwrite", "--json", "--tensors"))["tensor_list"]
    assert {one["key"] for one in listed} == {KEYS[stem] for stem in SHAPES}


@pytest.mark.parametrize("output", [True, False])
def test_a_dry_run_writes_nothing(tmp_path: Path, base: Path, lora: Path, out: Path, output: bool) -> None:
    before = state(tmp_path)
    arguments = [lora, "--base", base, "--dry-run", *(["-o", out, "--undo", tmp_path / "undo"] if output else [])]
    result = run(*arguments)
    text = flat(result)
    assert_fits(result.stdout)
    assert "output not written (--dry-run)" in text and "memory about " in text and "changed 4 tensors" in text
    assert "verified" not in text
    found = data(run(*arguments, "--json"))
    assert (found["output"], found["checked"], found["components"][0]["survived"]) == (None, None, None)
    assert state(tmp_path) == before


def test_without_verification_it_says_so(base: Path, lora: Path, out: Path) -> None:
    assert "verified no (--no-verify)" in flat(run(lora, "--base", base, "-o", out, "--no-verify"))


def test_a_cast_is_told(base: Path, lora: Path, out: Path) -> None:
    assert "dtype all weights are BF16 now" in flat(run(lora, "--base", base, "-o", out, "--dtype", "bf16"))
    assert {tensor.dtype for tensor in load(out).values()} == {BF16}
    text = flat(run("--base", base, "-o", out, "--dtype", "fp32", "--overwrite"))  # nothing but cast
    nbytes = sum(tensor.nbytes for tensor in load(out).values()) - 128
    assert f"changed 4 tensors, {nbytes / 1024:.1f} KiB; 128 B keep their bytes" in text
    assert "component" not in text


def test_a_lost_update_is_warned_of_and_stochastic_rounding_keeps_it(tmp_path: Path, out: Path) -> None:
    shapes = {Q: (512, 512), TEXT: (512, 512)}  # enough values for chance to even out
    weights = {KEYS[stem]: noise(*shape, dtype=BF16) for stem, shape in shapes.items()}
    base = save(tmp_path / "base.safetensors", {**weights, BIAS: noise(32)})
    tiny = save(tmp_path / "tiny.safetensors", kohya(shapes, size=0.01))
    result = run(tiny, "--base", base, "-o", out)
    text = flat(result)
    assert_fits(result.stdout)
    assert "warning text_encoder, unet: less than 90% of the update survived" in text
    assert "use --rounding stochastic" in text
    result = run(tiny, "--base", base, "-o", out, "--rounding", "stochastic", "--seed", "7", "--overwrite")
    assert "rounding stochastic, seed 7" in flat(result) and "warning" not in result.stdout


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        ("-o", "-o is missing"),
        ("--base", "--base is missing"),
        ("LORA", "nothing to bake"),
    ],
)
def test_something_is_missing(tmp_path: Path, base: Path, lora: Path, out: Path, lack: str, words: str) -> None:
    given: dict[str, list[object]] = {"LORA": [lora], "--base": ["--base", base], "-o": ["-o", out]}
    refused(tmp_path, 2, words, *(word for name, words in given.items() if name != lack for word in words))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounding", "up"], "known: nearest, stochastic"),
        (["--dora-norm", "x"], "known: paper, comfyui"),
        (["--dtype", "int8"], "int8"),
        (["--weights", "1,2"], "2 weights for 1 input"),
        (["--weights", "a"], "expected numbers"),
        (["--weights", "nan"], "expected a finite number"),
        (["--blocks", "1,0", "--blocks", "1,0"], "2 times --blocks"),
        (["--blocks", "NOPE"], "NOPE"),
        (["--prompt", "no tag"], "names no LoRA"),
        (["--architecture", "nope"], "nope"),
        (["--undo", "u", "--dtype", "bf16"], "a cast loses bits"),
        (["-o", ""], "'' is no name for an output"),
        (["--undo", ""], "'' is no name for an output"),
        (["-o", "none/"], "ends as a folder's name does"),
    ],
)
def test_a_wrong_option(tmp_path: Path, base: Path, lora: Path, out: Path, options: list[str], words: str) -> None:
    refused(tmp_path, 2, words, lora, "--base", base, "-o", out, *options)


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "no device is called 'gpu'"), ("cuda:0,cuda:0", ""), ("cuda:999", "no device cuda:999"), ("cpu,cpu", "")],
)
@pytest.mark.parametrize("command", ["bake", "unbake"])
def test_a_wrong_device(
    tmp_path: Path, base: Path, lora: Path, out: Path, command: str, device: str, words: str
) -> None:
    files = [lora, "--base", base] if command == "bake" else [base, lora]
    result = CliRunner().invoke(app, [command, *map(str, files), "-o", str(out), "--device", device])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and words in result.stderr
    assert result.stderr.count("\n") == 1 and not out.exists()


def test_two_equal_gpus(monkeypatch: pytest.MonkeyPatch, base: Path, lora: Path, out: Path) -> None:
    monkeypatch.setattr("loratool.ops.devices.device_named", str)  # as if every GPU were there
    arguments = ["bake", str(lora), "--base", str(base), "-o", str(out), "--device", "cuda,cuda:0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "expected different GPUs" in result.stderr and not out.exists()


@pytest.mark.parametrize("strength", ["strong", "nan", "inf", ""])
def test_a_strength_that_is_no_number(tmp_path: Path, base: Path, lora: Path, out: Path, strength: str) -> None:
    refused(tmp_path, 2, strength, f"{lora}:{strength}", "--base", base, "-o", out)


@pytest.fixture
def stray(tmp_path: Path) -> Path:
    """A LoRA with a module that the checkpoint lacks."""
    return save(tmp_path / "stray.safetensors", kohya({**SHAPES, Q.replace("to_q", "to_out_0"): (32, 48)}))


def test_a_module_without_a_place(tmp_path: Path, base: Path, stray: Path, out: Path) -> None:
    line = refused(tmp_path, 1, "1 part of ", stray, "--base", base, "-o", out)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0" in line
    assert "nearest: model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_" in line
    assert "--allow-unmatched" in line and str(base) in line


def test_a_module_without_a_place_can_be_left_out(base: Path, stray: Path, out: Path) -> None:
    result = run(stray, "--base", base, "-o", out, "--allow-unmatched")
    text = flat(result)
    assert_fits(result.stdout)
    assert "; nearest: model.diffusion_model.input_blocks.1.1.trans" in text
    assert "4 of 5 modules" in text and "left out 1 part without a place: " in text and "attn1.to_out.0" in text
    found = data(run(stray, "--base", base, "--dry-run", "--allow-unmatched", "--json"))
    assert [one["nearest"].rpartition(".")[0] for one in found["unmatched"]] == [
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"
    ]
    assert (found["adapters"][0]["modules"], found["adapters"][0]["matched"]) == (5, 4)


def test_an_output_that_exists_is_kept_unless_told(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    out.write_bytes(b"precious")
    refused(tmp_path, 1, "--overwrite", lora, "--base", base, "-o", out)
    flat(run(lora, "--base", base, "-o", out, "--overwrite"))
    assert len(load(out)) == 5


@pytest.mark.parametrize("what", ["base", "lora"])
def test_the_output_is_no_input(tmp_path: Path, base: Path, lora: Path, what: str) -> None:
    same = {"base": base, "lora": lora}[what]
    refused(tmp_path, 1, "is an input", lora, "--base", base, "-o", same, "--overwrite")
    refused(tmp_path, 1, "is an input", lora, "--base", base, "-o", tmp_path / "o", "--undo", same, "--overwrite")


def test_the_output_is_no_file_of_block_weights(tmp_path: Path, base: Path, lora: Path) -> None:
    spec = tmp_path / "blocks.yaml"
    spec.write_text("text_encoder: 0\n", encoding="utf-8")
    refused(tmp_path, 1, "is an input", lora, "--base", base, "--blocks", spec, "-o", spec, "--overwrite")
    refused(
        tmp_path, 1, "is an input", lora, "--base", base, "--blocks", spec, "-o", tmp_path / "o", "--undo", spec,
        "--overwrite",
    )  # fmt: skip


@pytest.mark.parametrize("option", ["-o", "--undo"])
def test_a_folder_that_is_missing(tmp_path: Path, base: Path, lora: Path, out: Path, option: str) -> None:
    given = {"-o": out, "--undo": tmp_path / "undo"} | {option: tmp_path / "none" / "x.safetensors"}
    words = [word for name, path in given.items() for word in (name, path)]
    refused(tmp_path, 1, "none", lora, "--base", base, *words)


def test_files_that_are_broken(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    tensors = kohya(SHAPES)
    tensors[f"{Q}.lora_up.weight"][0, 0] = torch.nan
    sick = save(tmp_path / "sick.safetensors", tensors)
    assert "sick.safetensors" in refused(tmp_path, 1, "", sick, "--base", base, "-o", out)
    refused(tmp_path, 1, "none.safetensors", tmp_path / "none.safetensors", "--base", base, "-o", out)
    os.truncate(base, base.stat().st_size - 1)
    refused(tmp_path, 1, "truncated", lora, "--base", base, "-o", out)


def test_another_model_is_refused_by_name(tmp_path: Path, out: Path) -> None:
    base = sparse_checkpoint(tmp_path / "base.safetensors", "sdxl", "sgm")
    lora = write_file(tmp_path / "sd15.safetensors", build(typical_parts("sd15", "kohya"), "kohya"))
    for options in ([], ["--allow-unmatched"]):
        line = refused(tmp_path, 1, "Stable Diffusion XL", lora, "--base", base, "-o", out, *options)
        assert "the adapter is for Stable Diffusion 1.x" in line
    half = build(typical_parts("sd15", "kohya"), "kohya")
    for at, key in enumerate(list(half.tensors)):
        if "lora_unet" in key:  # as names of no model
            half.tensors[key.replace("lora_unet", f"lora_unet_x{at % 3}")] = half.tensors.pop(key)
    base15 = sparse_checkpoint(tmp_path / "base15.safetensors", "sd15", "ldm")
    lora = write_file(tmp_path / "half.safetensors", half)
    assert "parts of" in refused(tmp_path, 1, "is no name in", lora, "--base", base15, "-o", out)
    stem = "transformer.h.0.attn.c_attn"
    gpt = peft(tmp_path / "gpt", {f"{stem}.lora_A.weight": noise(4, 768), f"{stem}.lora_B.weight": noise(2304, 4)})
    line = refused(tmp_path, 1, "is for another model than the checkpoint's", gpt, "--base", base, "-o", out)
    assert "no key is a name of Stable Diffusion XL; name a checkpoint of the adapter's model" in line


# -- prompts and names ------------------------------------------------------------------------------------------------


@pytest.fixture
def env(tmp_path: Path, base: Path) -> dict[str, str]:
    """A config with a folder of LoRAs and a name for the base."""
    config = tmp_path / "config.yaml"
    config.write_text(f"loras:\n- mine\nbases:\n  toy: {base}\n", encoding="utf-8")
    return {"LORATOOL_CONFIG": str(config), "HOME": str(tmp_path), "LORATOOL_BASES": ""}


@pytest.mark.parametrize(
    ("tag", "unet", "text_encoder", "told"),
    [
        ("<lora:ink:0.8>", 0.8, 0.8, "strength 0.8, kohya"),
        ("<lora:ink:te=0.5:unet=-1>", -1, 0.5, "strength 1, blocks text_encoder* 0.5, others -1, kohya"),
        ("<lora:ink:0.5:unet=0>", 0, 0.5, "strength 1, blocks text_encoder* 0.5, others 0, kohya"),
    ],
)
def test_a_prompt_names_loras_and_strengths(
    tmp_path: Path, base: Path, out: Path, env: dict[str, str], tag: str, unet: float, text_encoder: float, told: str
) -> None:
    lora = save(tmp_path / "mine/ink.safetensors", kohya(SHAPES))
    text = flat(run("--prompt", f"a cat {tag}, red", "--base", base, "-o", out, **env))
    assert "ink.safetensors" in text.replace(" ", "") and told in text
    for stem in (Q, K, CONV):
        assert strength_of(base, out, lora, stem) == pytest.approx(unet, abs=0.01)
    assert strength_of(base, out, lora, TEXT) == pytest.approx(text_encoder, abs=0.01)


def test_a_prompt_with_an_unknown_name(tmp_path: Path, base: Path, out: Path, env: dict[str, str]) -> None:
    save(tmp_path / "mine/ink.safetensors", kohya(SHAPES))
    result = run("--prompt", "<lora:inc:1>", "--base", base, "-o", out, **env)
    assert result.exit_code in (1, 2) and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "inc" in result.stderr and not out.exists()


def test_weights_are_for_files(tmp_path: Path, base: Path, out: Path, env: dict[str, str]) -> None:
    save(tmp_path / "mine/ink.safetensors", kohya(SHAPES))
    result = run("--prompt", "<lora:ink:1>", "--weights", "0.1", "--base", base, "-o", out, **env)
    assert result.exit_code == 2 and "--weights without a LoRA file that it is for" in result.stderr


def test_a_prompt_beside_files(tmp_path: Path, base: Path, lora: Path, out: Path, env: dict[str, str]) -> None:
    save(tmp_path / "mine/ink.safetensors", kohya({Q: SHAPES[Q]}, seed=5))
    found = data(run(f"{lora}:0.5", "--prompt", "<lora:ink:0.8>", "--base", base, "-o", out, "--json", **env))
    assert [(Path(one["path"]).name, one["strength"]) for one in found["adapters"]] == [
        ("style.safetensors", 0.5),
        ("ink.safetensors", 0.8),
    ]


def test_a_base_by_name(base: Path, lora: Path, out: Path, env: dict[str, str]) -> None:
    assert data(run(lora, "--base", "toy", "-o", out, "--json", **env))["base"] == str(base)


def test_a_base_that_nobody_knows(tmp_path: Path, lora: Path, out: Path, env: dict[str, str]) -> None:
    refused(tmp_path, 2, "toi", lora, "--base", "toi", "-o", out, **env)


def test_the_base_of_a_name_is_no_output(tmp_path: Path, base: Path, lora: Path, env: dict[str, str]) -> None:
    refused(tmp_path, 1, "is an input", lora, "--base", "toy", "-o", base, "--overwrite", **env)


# -- unbake -----------------------------------------------------------------------------------------------------------


def test_unbake_with_the_undo_file_gives_the_base_back(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    undo, again = tmp_path / "undo", tmp_path / "again.safetensors"
    text = flat(run(f"{lora}:0.7", "--base", base, "-o", out, "--undo", undo))
    assert f"{undo.name}, " in text.replace("undo undo", "undo") and undo.stat().st_size > 0
    result = run(out, "--undo", undo, "-o", again, command="unbake")
    text = flat(result)
    assert "the base again, bit for bit" in text and sha256(base) in text
    assert sha256(again) == sha256(base)
    found = data(run(out, "--undo", undo, "-o", again, "--overwrite", "--json", command="unbake"))
    assert (found["exact"], found["files"], found["adapters"]) == (True, {"": sha256(base)}, ["style.safetensors"])


def test_unbake_without_it_is_approximate(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    flat(run(f"{lora}:0.7", "--base", base, "-o", out))
    again = tmp_path / "again.safetensors"
    result = run(out, f"{lora}:0.7", "-o", again, command="unbake")
    text = flat(result)
    assert_fits("\n".join(line for line in result.stdout.splitlines() if str(tmp_path) not in line))
    assert "result approximate" in text and "Only bake --undo gives the base back bit for bit" in text
    assert "the header does not say" not in text
    assert float(added(base, again, Q).abs().max()) < 0.01
    text = flat(run(out, f"{lora}:0.6", "-o", again, "--overwrite", command="unbake"))
    assert "the header does not say that style.safetensors was baked into it at this strength" in text


def test_unbake_is_used_wrongly(tmp_path: Path, base: Path, lora: Path, out: Path) -> None:
    undo, again = tmp_path / "undo", tmp_path / "again.safetensors"
    flat(run(lora, "--base", base, "-o", out, "--undo", undo))
    refused(tmp_path, 2, "-o is missing", out, "--undo", undo, command="unbake")
    refused(tmp_path, 2, "nothing says what to take out", out, "-o", again, command="unbake")
    refused(tmp_path, 2, "not both", out, lora, "--undo", undo, "-o", again, command="unbake")
    refused(tmp_path, 2, "", out, "--undo", undo, "--weights", "1", "-o", again, command="unbake")
    refused(tmp_path, 2, "nan", out, f"{lora}:nan", "-o", again, command="unbake")
    refused(tmp_path, 1, "is an input", out, "--undo", undo, "-o", out, "--overwrite", command="unbake")
    refused(tmp_path, 1, "", out, "--undo", lora, "-o", again, command="unbake")
    refused(tmp_path, 1, "its last bake is not", base, "--undo", undo, "-o", again, command="unbake")
    again.write_bytes(b"precious")
    refused(tmp_path, 1, "--overwrite", out, "--undo", undo, "-o", again, command="unbake")


# -- hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--tensors"], ["--json", "--tensors"], ["--dry-run"]], ids=" ".join)
def test_hostile_text_is_inert(tmp_path: Path, options: list[str]) -> None:
    name = HOSTILE.replace("/", "").replace("\n", "")[:60]
    base = base_file(tmp_path / f"b{name}.safetensors", metadata={HOSTILE: HOSTILE, "modelspec.hash_sha256": HOSTILE})
    stray = {**kohya(SHAPES), HOSTILE: noise(2), f"lora_unet_{HOSTILE}.diff": noise(2)}
    lora = save(tmp_path / f"l{name}.safetensors", stray, {"ss_output_name": HOSTILE, HOSTILE: HOSTILE})
    out = tmp_path / f"o{name}.safetensors"
    refused(tmp_path, 1, "", lora, "--base", base, "-o", out)
    undo = ["--undo", tmp_path / f"u{name}"] if "--dry-run" not in options else []
    result = run(lora, "--base", base, "-o", out, "--allow-unmatched", *undo, *options)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert_inert(result.stdout)
    if undo:
        for source in (undo, [lora]):
            result = run(out, *source, "-o", tmp_path / f"a{name}{len(source)}", command="unbake")
            assert_inert(result.stdout + result.stderr)


@pytest.mark.parametrize("option", ["--base", "--prompt", "--rounding", "--dtype", "--blocks", "--weights", "-o"])
def test_hostile_arguments_are_inert(tmp_path: Path, base: Path, lora: Path, out: Path, option: str) -> None:
    value = f"<lora:{HOSTILE}:x>" if option == "--prompt" else f"{tmp_path}/none/{HOSTILE}"
    result = run(lora, "--base", base, "-o", out, option, value)
    assert result.exit_code in (1, 2) and result.stderr.count("\n") == 1
    assert_inert(result.stderr)
