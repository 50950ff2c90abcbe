"""`loratool merge`: reports, strengths, methods and their options, and what is refused with one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app, command
from loratool.core.adapter import Bundle
from loratool.core.registry import methods
from loratool.core.tensor import LazyTensor
from loratool.files.bundle import read_bundle
from loratool.ops import recipe
from loratool.report.merge import relation
from tests.builders import Part, Style, build, typical_parts, weight, write_file
from tests.cli.test_info import BAD, HOSTILE, assert_fits, assert_inert
from tests.ops.test_merge_files import assert_sum, make, small_parts


def run(*arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)], env={"COLUMNS": str(columns)})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make(tmp_path / "a.safetensors", rank=4), make(tmp_path / "b.safetensors", "diffusers", 1, count=5)


def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def strengths(path: Path) -> list[float]:
    return [one["weight"] for one in recipe.decode(read_bundle(path).metadata)["inputs"]]


def flat(text: str) -> str:
    return " ".join(text.split())


def assert_refused(result: Result, tmp_path: Path, code: int, *words: str) -> None:
    """One line on stderr with these words, nothing else anywhere."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert not out(tmp_path).exists() and not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


# -- what it does ------------------------------------------------------------------------------------------------------


def test_a_report_on_stdout(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(f"{pair[0]}:0.7", pair[1], "-o", out(tmp_path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert_fits(result.stdout)
    text = flat(result.stdout)
    for fact in ("read A", "strength 0.7, kohya, 6 modules, rank 4", "read B", "diffusers, 5 modules"):
        assert fact in text, fact
    for fact in ("1 module that no other", "Stable Diffusion 1.x, 6 modules, rank 6 x5, 4", "method concat", "5 of 6"):
        assert fact in text, fact
    for fact in ("error 0: the exact sum", "6 updates read back: relative error", ", rounding included"):
        assert fact in text, fact
    for fact in ("unet: A and B 0.0", "they are independent", "text_encoder", "least/median/most"):
        assert fact in text, fact
    assert all(line == line.rstrip() for line in result.stdout.splitlines())
    assert "strength 1" not in text
    assert_sum(out(tmp_path), {pair[0]: 0.7, pair[1]: 1.0})


def test_inputs_that_have_nothing_in_common(tmp_path: Path) -> None:
    parts = small_parts("kohya", count=4)
    a, b = (write_file(tmp_path / f"{n}.safetensors", build(parts[n::2], "kohya")) for n in range(2))
    result = run(a, b, "-o", out(tmp_path), "--rank", "1", "--blocks", "ALL")
    assert result.exit_code == 0, result.output
    text = flat(result.stdout)
    assert "update no weight in common" in text and "independent" not in text and "blocks" not in text
    assert "off the exact sum, by the ranks kept, before rounding" in text
    assert "4 updates read back, as far off as computed" in text
    result = run(a, b, a, b, "-o", out(tmp_path), "--overwrite")
    assert "A and C 1.00, they pull together" in flat(result.stdout)


def test_json_and_modules(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(*pair, "-o", out(tmp_path), "--json", "--modules", "--method", "ties", "--density", "0.5")
    assert (result.exit_code, result.stderr) == (0, "") and result.stdout.isascii()
    data = json.loads(result.stdout)
    assert (data["method"], data["options"], data["modules"], data["merged"]) == ("ties", {"density": 0.5}, 6, 5)
    assert 0 < data["conflicts"] < data["shared"]
    assert len(data["module_list"]) == 6 and sum(None in row["ranks"] for row in data["module_list"]) == 1
    assert data["size_after"] == out(tmp_path).stat().st_size
    listed = run(*pair, "-o", out(tmp_path), "--modules", "--overwrite").stdout
    assert_fits(listed)
    assert "4 2" in listed and "4 -" in listed


def test_conflicts_fights_and_silence_are_told(tmp_path: Path) -> None:
    a = make(tmp_path / "a.safetensors")
    result = run(a, f"{a}:-0.5", "-o", out(tmp_path), "--method", "ties")
    assert "A and B 1.00, they fight (one strength is negative)" in flat(result.stdout)
    assert "disagree on 100.0%" in flat(result.stdout)
    (tmp_path / "off.yaml").write_text('"*": 0\n"unet.*attn1*": 1\n', encoding="utf-8")
    result = run(a, a, "-o", out(tmp_path), "--blocks", tmp_path / "off.yaml", "--overwrite")
    assert "with no weight left, not in the output" in flat(result.stdout)
    assert "they pull together" in flat(result.stdout)


def test_many_inputs_show_the_extremes(tmp_path: Path) -> None:
    inputs = [make(tmp_path / f"{n}.safetensors", seed=n, count=4) for n in range(4)]
    result = run(*inputs, inputs[0], "-o", out(tmp_path))
    assert result.exit_code == 0, result.output
    text = flat(result.stdout)
    assert text.count(" and ") == text.count("unet: ") + text.count("text_encoder: ") == 4
    assert "A and E 1.00, they pull together" in text


@pytest.mark.parametrize(("cosine", "word"), [(0.1, "together"), (0.09, "independent"), (-0.1, "fight")])
def test_words(cosine: float, word: str) -> None:
    assert word in relation(cosine)


def test_a_lokr_is_approximated_when_asked(tmp_path: Path) -> None:
    plain = small_parts("kohya", count=4)
    bundle = build(plain, "kohya")
    stem = "lora_unet_" + plain[2].weight.name.replace(".", "_")
    rows, columns = plain[2].weight.shape
    lokr = {
        f"{stem}.lokr_w1": LazyTensor.from_torch(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))),
        f"{stem}.lokr_w2": LazyTensor.from_torch(torch.randn(rows // 4, columns // 4) * 0.01),
        f"{stem}.alpha": LazyTensor.scalar(1.0, "F32"),
    }
    rest = {key: tensor for key, tensor in bundle.tensors.items() if not key.startswith(f"{stem}.")}
    a, b = (
        write_file(tmp_path / "a.safetensors", bundle),
        write_file(tmp_path / "b.safetensors", Bundle(lokr | rest, {})),
    )
    assert_refused(run(a, b, "-o", out(tmp_path)), tmp_path, 1, "have no exact sum", "--approximate")
    assert_refused(run(a, b, "-o", out(tmp_path), "--approximate"), tmp_path, 2, "--rank N")
    result = run(a, b, "-o", out(tmp_path), "--approximate", "--energy", "0.9")
    assert result.exit_code == 0, result.output
    assert "approximated" in result.stdout and "LoKr as LoRA of rank" in flat(result.stdout)
    data = json.loads(run(a, b, "-o", out(tmp_path), "--approximate", "--rank", "3", "--json", "--overwrite").stdout)
    assert [row["families"] for row in data["approximated"]] == [["LoKr"]]


# -- strengths and blocks ----------------------------------------------------------------------------------------------


def test_strengths(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    for arguments, expected in (
        ([a, b], [1, 1]),
        ([f"{a}:0.5", f"{b}:-2e-1"], [0.5, -0.2]),
        ([a, b, "--weights", "0.5, 2"], [0.5, 2]),
        ([f"{a}:0.5", b, "--weights", ",2"], [0.5, 2]),
        ([a, b, "--weights", "-0.5,"], [-0.5, 1]),
    ):
        assert run(*arguments, "-o", out(tmp_path), "--overwrite", "--no-verify").exit_code == 0
        assert strengths(out(tmp_path)) == expected


def test_a_file_with_a_colon_is_a_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd:0.5"
    odd.write_bytes(pair[0].read_bytes())
    assert run(odd, f"{odd}:0.25", "-o", out(tmp_path)).exit_code == 0
    assert strengths(out(tmp_path)) == [1, 0.25]


def test_blocks_for_all_or_for_each(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for specs, expected in ((["ALL0.5"], [0.5, 0.5]), (["ALL", "ALL0.5"], [1, 0.5])):
        options = [option for spec in specs for option in ("--blocks", spec)]
        assert run(*pair, "-o", out(tmp_path), "--overwrite", *options).exit_code == 0
        made = recipe.decode(read_bundle(out(tmp_path)).metadata)
        assert [one["blocks"]["rest"] for one in made["inputs"]] == expected
    out(tmp_path).unlink()
    result = run(*pair, "-o", out(tmp_path), "--blocks", "ALL", "--blocks", "ALL", "--blocks", "ALL")
    assert_refused(result, tmp_path, 2, "3 times --blocks for 2 inputs")


# -- methods -----------------------------------------------------------------------------------------------------------


def test_the_methods_options_are_the_commands() -> None:
    panel = "Options of methods (see --list-methods)"
    parameters = [one for one in command("merge").params if getattr(one, "rich_help_panel", None) == panel]
    union = {option.flag: type(option.default) for method in methods().values() for option in method.options.values()}
    kinds = {"float": float, "integer": int, "int": int, "boolean": bool, "bool": bool, "text": str, "str": str}
    assert {one.opts[0]: kinds[one.type.name.strip("<>")] for one in parameters} == union
    assert all(one.default is None for one in parameters)


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_option_reaches_its_method(pair: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    values: dict[str, Any] = {
        "density": 0.5,
        "epsilon": 0.1,
        "gamma": 0.2,
        "lambda": 0.9,
        "sign": "frequency",
        "seed": 3,
    }
    values |= {"t": 0.25, "select_topk": 0.5, "max_iter": 2, "tol": 1e-3}
    values |= {"normalize": False, "flatten": False, "row_wise": True}
    arguments: list[str] = []
    for option in methods()[method].options.values():
        value = values[option.name]
        if isinstance(value, bool):
            arguments.append(option.flag if value else f"--no-{option.flag[2:]}")
        else:
            arguments += [option.flag, str(value)]
    b = make(tmp_path / "c.safetensors", rank=4, seed=4)
    result = run(pair[0], b, "-o", out(tmp_path), "--method", method, *arguments)
    assert result.exit_code == 0, result.output
    recorded = recipe.decode(read_bundle(out(tmp_path)).metadata).get("options", {})
    assert recorded == {name: values[name] for name in methods()[method].options}


def test_list_methods() -> None:
    result = run("--list-methods")
    assert (result.exit_code, result.stderr) == (0, "")
    assert_fits(result.stdout)
    assert all(name in result.stdout for name in methods())
    assert "--density 1.0" in result.stdout and "--normalize on" in result.stdout
    data = json.loads(run("--list-methods", "--json").stdout)
    assert [one["id"] for one in data] == sorted(methods())
    assert next(one for one in data if one["id"] == "slerp")["options"] == {"--t": 0.5}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["nothing to merge"]),
        (["A:abc", "B"], 2, ["'abc'", "no number"]),
        (["A:", "B"], 2, ["no number"]),
        (["A:nan", "B"], 2, ["expected a finite number", "a.safetensors"]),
        (["A", "B", "--weights", "1,inf"], 2, ["expected a finite number"]),
        (["A", "B", "--weights", "1"], 2, ["1 weight for 2 inputs"]),
        (["A", "B", "--weights", "1,2,3"], 2, ["3 weights for 2 inputs"]),
        (["A", "B", "--weights", "1,x"], 2, ["'1,x'"]),
        (["A:1", "B", "--weights", "1,2"], 2, ["of its own", "--weights"]),
        (["A:0", "B:0"], 2, ["nothing is left"]),
        (["A", "B", "--method", "tie"], 2, ["did you mean ties?"]),
        (["A", "B", "--density", "0.5"], 2, ["concat has no option --density"]),
        (["A", "B", "--method", "ties", "--density", "2"], 2, ["density is 2.0"]),
        (["A", "B", "--method", "ties", "--density", "nan"], 2, ["expected a finite number"]),
        (["A", "B", "--method", "ties", "--sign", "x"], 2, ["total or frequency"]),
        (["A", "B", "A", "--method", "slerp"], 2, ["takes 1 to 2 inputs, found 3"]),
        (["A", "B", "--method", "linear"], 2, ["one rank"]),
        (["A", "B", "--rank", "0"], 2, ["--rank is '0'"]),
        (["A", "B", "--rank", "2", "--knee"], 2, ["--rank and --knee"]),
        (["A", "B", "--min-rank", "0"], 2, ["--min-rank is 0"]),
        (["A", "B", "--min-rank", "3", "--max-rank", "2"], 2, ["more than --max-rank"]),
        (["A", "B", "--size", "1KiB"], 1, ["the smallest possible is"]),
        (["A", "B", "--to", "khya"], 2, ["did you mean kohya?"]),
        (["A", "B", "--dtype", "x"], 2, ["no dtype"]),
        (["A", "B", "--metadata", "all"], 2, ["first, union, none"]),
        (["A", "B", "--device", "tpu"], 2, ["no device"]),
        (["A", "B", "--blocks", "ALLL"], 2, ["no preset", "did you mean ALL"]),
        (["A", "B", "--blocks", "nope.yaml"], 2, ["cannot be read"]),
        (["A", "B", "--base", "nope.safetensors"], 1, ["nope.safetensors"]),
        (["A", "B", "--architecture", "flux"], 1, ["no key is a name of FLUX.1"]),
        (["A", "FLUX"], 1, ["for FLUX.1", "for Stable Diffusion 1.x"]),
        (["A", "missing.safetensors:0.5"], 1, ["missing.safetensors", "no such file"]),
        (["A", "NAN"], 1, ["nan.safetensors", "NaN"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_refused(pair: tuple[Path, Path], tmp_path: Path, arguments: list[str], code: int, words: list[str]) -> None:
    paths = {"A": str(pair[0]), "B": str(pair[1])}
    if "FLUX" in arguments:
        part = Part(weight("flux", "kohya", "double_blocks.0.img_attn.proj"), 2, 1.0)
        paths["FLUX"] = str(write_file(tmp_path / "flux.safetensors", build([part], "kohya")))
    if "NAN" in arguments:
        bundle = build(small_parts("kohya"), "kohya")
        key = next(iter(bundle.tensors))
        bad = LazyTensor.from_torch(bundle.tensors[key].load() * torch.nan)
        paths["NAN"] = str(write_file(tmp_path / "nan.safetensors", Bundle({**bundle.tensors, key: bad}, {})))
    named = [
        paths.get(word.partition(":")[0], word.partition(":")[0]) + "".join(word.partition(":")[1:])
        for word in arguments
    ]
    assert_refused(run(*named, "-o", out(tmp_path)), tmp_path, code, *words)


def test_outputs_are_new_or_asked_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(run(*pair), tmp_path, 2, "-o is missing")
    before = pair[1].read_bytes()
    result = run(*pair, "-o", pair[1], "--overwrite")
    assert result.exit_code == 1 and "an input is never changed" in result.stderr and pair[1].read_bytes() == before
    assert run(*pair, "-o", out(tmp_path)).exit_code == 0
    result = run(*pair, "-o", out(tmp_path))
    assert result.exit_code == 1 and "exists already" in result.stderr
    assert run(*pair, "-o", tmp_path / "no" / "out.safetensors").exit_code == 1


@pytest.mark.parametrize("kind", [kind for kind in BAD if "checkpoint" not in kind and "unet" not in kind])
def test_bad_files(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    make_bad, what = BAD[kind]
    make_bad(tmp_path / "bad.safetensors")
    assert_refused(
        run(pair[0], tmp_path / "bad.safetensors", "-o", out(tmp_path)), tmp_path, 1, what, "bad.safetensors"
    )


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "").replace("\n", "")[:60]
    style = Style(metadata={"ss_base_model_version": HOSTILE, "modelspec.title": HOSTILE})
    a = make(tmp_path / f"{name}.safetensors", style=style)
    b = make(tmp_path / "b.safetensors", seed=1, style=Style(metadata={"ss_base_model_version": "x"}))
    for options in ([], ["--json"], ["--modules"]):
        result = run(a, b, "-o", tmp_path / f"{name}2.safetensors", "--overwrite", *options)
        assert result.exit_code == 0, result.output
        assert_inert(result.stdout)
        assert result.stderr == ""
    result = CliRunner().invoke(app, ["replay", str(tmp_path / f"{name}2.safetensors")], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert_inert(result.stdout)


def test_in_a_process_of_its_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    parts = typical_parts("sd15", "peft")[:3]
    write_file(tmp_path / "folder", build(parts, "peft"))
    command = [sys.executable, "-c", "from loratool.cli.main import app; app()", "merge", str(tmp_path / "folder")]
    done = subprocess.run(
        [*command, str(pair[1]), "-o", str(tmp_path / "new")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and (tmp_path / "new").is_dir()
