"""`loratool resize` as a user runs it: rules, outputs, reports, plots, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.adapter import Bundle
from loratool.core.tensor import LazyTensor
from loratool.files.safetensors import write_safetensors
from loratool.ops import recipe
from loratool.ops.open import open_adapter
from loratool.ops.per_block import from_mapping
from loratool.report.progress import amount, progress
from loratool.report.spark import BLOCKS, PLAIN, spark
from tests.builders import build, typical_parts, write_file
from tests.cli.test_info import HOSTILE, assert_fits, assert_inert

RULES = {
    "rank": ["--rank", "2"],
    "energy": ["--energy", "0.8"],
    "ratio": ["--ratio", "1.5"],
    "cumulative": ["--cumulative", "0.6"],
    "knee": ["--knee"],
    "error": ["--error", "0.3"],
    "size": ["--size", "800KiB"],
}


def run(*arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner().invoke(app, ["resize", *map(str, arguments)], env={"COLUMNS": str(columns)})


def shell(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "COLUMNS": "80", **(env or {})}
    command = [sys.executable, "-c", "from loratool.cli.main import app; app()", "resize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=60, encoding="utf-8")


def falling(bundle: Bundle) -> Bundle:
    """The bundle with singular values that fall, as in trained files."""
    tensors = dict(bundle.tensors)
    for key, tensor in bundle.tensors.items():
        if "lora_down" in key:
            values = tensor.load().float()
            scale = (0.5 ** torch.arange(len(values))).reshape(-1, *(1,) * (values.dim() - 1))
            tensors[key] = LazyTensor.from_torch((values * scale).to(torch.float16))
    return Bundle(tensors, bundle.metadata, bundle.side_files)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 modules of SD 1.x, rank 4, 5 of them convolutions."""
    bundle = build(typical_parts("sd15", "kohya", rank=4, alpha=2.0), "kohya")
    return write_file(tmp_path_factory.mktemp("lora") / "style.safetensors", falling(bundle))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def data(result: Result) -> dict[str, Any]:
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    return found


def outcome_of(result: Result) -> dict[str, Any]:
    """The only outcome of a run."""
    outcomes: list[dict[str, Any]] = data(result)["outcomes"]
    assert len(outcomes) == 1
    return outcomes[0]


# -- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RULES)
def test_every_rule(lora: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.safetensors"
    one = outcome_of(run(lora, *RULES[kind], "-o", output, "--json"))
    assert one["rule"].split()[0] == kind
    assert one["output"] == str(output) and one["size_after"] == output.stat().st_size
    after = open_adapter(output)
    assert {str(rank): n for rank, n in after.ranks.items()} == one["ranks_after"]
    assert [module.rank for module in after.modules] == [cut["rank_after"] for cut in one["modules"]]
    assert one["held"]["modules"] == 44 and one["held"]["error"] == pytest.approx(one["error"], rel=0.2)
    if kind == "energy":
        assert min(cut["energy"] for cut in one["modules"]) >= 0.8
    if kind == "error":
        assert 0.2 < one["error"] <= 0.3
    if kind == "size":
        assert 0.98 * 800 * 1024 <= one["size_after"] <= 800 * 1024
    else:
        assert one["size_after"] < lora.stat().st_size


def test_several_rules_in_one_run(lora: Path, tmp_path: Path) -> None:
    rules = ["--size", "800KiB", "--rank", "3", "--rank", "1", "--knee"]
    found = data(run(lora, *rules, "-o", tmp_path / "s-{rule}.safetensors", "--json"))
    outcomes: list[dict[str, Any]] = found["outcomes"]
    assert [one["rule"] for one in outcomes] == ["rank 3", "rank 1", "knee", "size 800KiB"]
    expected = ["s-knee.safetensors", "s-rank1.safetensors", "s-rank3.safetensors", "s-size800KiB.safetensors"]
    assert names(tmp_path) == expected
    alone = tmp_path / "alone.safetensors"
    assert run(lora, "--rank", "3", "-o", alone).exit_code == 0
    assert alone.read_bytes() == (tmp_path / "s-rank3.safetensors").read_bytes()


def test_limits(lora: Path, tmp_path: Path) -> None:
    one = outcome_of(run(lora, "--energy", "1", "--conv-rank", "1", "--max-rank", "3", "--dry-run", "--json"))
    kernels = {m.title for m in open_adapter(lora).modules if any(n > 1 for n in m.shape[2:])}
    assert kernels
    assert {c["rank_after"] for c in one["modules"] if c["title"] in kernels} == {1}
    assert {c["rank_after"] for c in one["modules"] if c["title"] not in kernels} == {3}
    one = outcome_of(run(lora, "--ratio", "1", "--min-rank", "2", "--dry-run", "--json"))
    assert one["ranks_after"] == {"2": 44}


def test_per_block_and_its_recipe(lora: Path, tmp_path: Path) -> None:
    rules, output = tmp_path / "rules.yaml", tmp_path / "out.safetensors"
    rules.write_text("text_encoder: keep\nM00: {energy: 0.5}\nIN01: 3\n", encoding="utf-8")
    one = outcome_of(run(lora, "--rank", "1", "--per-block", rules, "-o", output, "--json"))
    source = open_adapter(lora)
    made = recipe.decode(open_adapter(output).metadata)
    own = from_mapping(made["per_block"], source.architecture, source.modules)
    for module, cut in zip(source.modules, one["modules"], strict=True):
        rule = own(module)
        kind = rule.title if rule else None
        wish = {"keep": 4, "rank 3": 3, None: 1}.get(kind, cut["rank_after"])
        assert cut["rank_after"] == wish
    assert Counter(cut["rank_after"] for cut in one["modules"])[4] >= 3


def test_base_measures_importance(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, weights = {}, {}
    for i, size in enumerate((1.0, 50.0)):
        weights[f"layers.{i}.q.weight"] = LazyTensor.from_torch(torch.randn(16, 16, generator=generator) * size)
        for half, shape in (("A", (4, 16)), ("B", (16, 4))):
            values = torch.randn(shape, generator=generator)
            tensors[f"transformer.layers.{i}.q.lora_{half}.weight"] = LazyTensor.from_torch(values)
    file, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    write_safetensors(file, tensors, {})
    write_safetensors(base, weights, {})
    env = {"COLUMNS": "80", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = ["resize", str(file), "--base", str(base), "--error", "0.5", "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, "--json"], env=env)
    one = outcome_of(result)
    assert one["modules"][0]["importance"] > 10 * one["modules"][1]["importance"]
    assert one["modules"][0]["rank_after"] > one["modules"][1]["rank_after"]
    assert one["components"][0]["importance"] > 0
    assert "importance" in CliRunner().invoke(app, arguments, env=env).stdout
    before = base.read_bytes()
    result = CliRunner().invoke(app, [*arguments[:-1], "-o", str(base), "--overwrite"], env=env)
    assert_refused(result, 1, "is an input")
    assert base.read_bytes() == before


@pytest.mark.parametrize("to", ["diffusers", "peft", "comfyui"])
def test_another_layout_and_dtype(lora: Path, tmp_path: Path, to: str) -> None:
    output = tmp_path / "out"
    assert run(lora, "--rank", "2", "--to", to, "--dtype", "bf16", "-o", output).exit_code == 0
    made = open_adapter(output)
    assert (made.layout, set(made.ranks), {m.dtype for m in made.modules}) == (to, {2}, {"BF16"})


# -- reports --------------------------------------------------------------------------------------------------------


def test_a_report_on_stdout(lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "out-{rule}.safetensors"
    result = run(lora, "--rank", "2", "--energy", "0.9", "-o", output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert_fits(result.stdout)
    flat = " ".join(result.stdout.split())
    facts = ["Stable Diffusion 1.x, 44 modules, rank 4", "rank 2", "energy 0.9", "4 -> 2", "relative error", "unet"]
    facts += ["44 updates read back, as far off as computed", "saved: of the tensors alone"]
    facts += ["MiB -> ", "% less)", "text_encoder", "all 44", "worst modules", "cut at 2 of 4"]
    assert [fact for fact in facts if fact not in flat] == []
    assert any(char in result.stdout for char in BLOCKS)
    assert len(result.stdout.splitlines()) <= 60


def test_nothing_to_cut(lora: Path, tmp_path: Path) -> None:
    for rule, words in ((["--rank", "9"], "every module has rank 9 or less already"), (["--energy", "1"], "its rank")):
        result = run(lora, *rule, "-o", tmp_path / "out.safetensors", "--overwrite")
        assert result.exit_code == 0, result.output
        flat = " ".join(result.stdout.split())
        assert "kept nothing was cut: every module" in flat and words in flat and "(about the same)" in flat
        assert "component" not in flat and "worst" not in flat


def test_modules_are_listed(lora: Path) -> None:
    result = run(lora, "--rank", "2", "--dry-run", "--modules")
    assert_fits(result.stdout)
    assert result.stdout.count("4 -> 2") >= 44
    found = data(run(lora, "--rank", "2", "--dry-run", "--modules", "--json"))
    assert len(found["values"]) == 44
    assert "values" not in data(run(lora, "--rank", "2", "--dry-run", "--json"))


def test_json_adds_up(lora: Path) -> None:
    found = data(run(lora, "--rank", "2", "--dry-run", "--json"))
    one = found["outcomes"][0]
    assert (one["output"], one["held"], found["plot"], found["base"]) == (None, None, None, None)
    assert sum(part["modules"] for part in one["components"]) == len(one["modules"]) == 44
    lost = math.fsum((cut["error"] * cut["norm"]) ** 2 for cut in one["modules"])
    total = math.fsum(cut["norm"] ** 2 for cut in one["modules"])
    assert one["error"] == pytest.approx(math.sqrt(lost / total))
    assert one["energy"] == pytest.approx(1 - lost / total)
    places = [place for own in found["blocks"].values() for place in own]
    assert sorted(places) == list(range(44))


def test_dora_is_said(tmp_path: Path) -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    up = next(key for key in bundle.tensors if key.endswith("q_proj.lora_up.weight"))
    magnitude = LazyTensor.from_torch(torch.ones(bundle.tensors[up].shape[0], 1))
    tensors = {**bundle.tensors, up.replace("lora_up.weight", "dora_scale"): magnitude}
    file = write_file(tmp_path / "a.safetensors", Bundle(tensors, bundle.metadata))
    result = run(file, "--rank", "2", "--dry-run")
    assert "magnitudes kept: each row keeps its trained norm" in " ".join(result.stdout.split())


def test_no_verify_says_so(lora: Path, tmp_path: Path) -> None:
    result = run(lora, "--rank", "2", "-o", tmp_path / "out.safetensors", "--no-verify")
    assert result.exit_code == 0 and "no (--no-verify)" in result.stdout


def test_a_process_of_its_own_in_ascii(lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = shell(lora, "--energy", "0.9", "-o", output, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii() and "\x1b" not in done.stdout and "cut at" in done.stdout
    again = shell(lora, "--energy", "0.9", "-o", output)
    assert (again.returncode, again.stdout) == (1, "")
    one_line(again.stderr)


def test_hostile_names_are_inert(tmp_path: Path) -> None:
    tensors = {
        f"transformer.{HOSTILE}.{i}.$\\frac{{q}}.lora_{half}.weight": LazyTensor.from_torch(torch.ones(shape))
        for i in range(2)
        for half, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    file = tmp_path / "<b>&x.safetensors"
    write_safetensors(file, tensors, {})
    page = tmp_path / "x.html"
    for options in ([], ["--json"], ["--modules", "--plot", page]):
        result = run(file, "--rank", "1", "--dry-run", *options)
        assert result.exit_code == 0, result.output
        assert_inert(result.stdout)
    text = page.read_text(encoding="utf-8")
    assert "\x1b" not in text and "<b>" not in text and "&lt;b&gt;" in text


def test_a_zero_lora(tmp_path: Path) -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    zero = {
        key: LazyTensor.from_torch(torch.zeros(t.shape, dtype=torch.float16)) if "lora_up" in key else t
        for key, t in bundle.tensors.items()
    }
    file = write_file(tmp_path / "zero.safetensors", Bundle(zero, bundle.metadata))
    rules = [word for rule in RULES.values() for word in rule]
    for options in ([], ["--json", "--plot", tmp_path / "zero.svg"]):
        result = run(file, *rules, "--dry-run", *options)
        assert (result.exit_code, result.stderr) == (0, ""), result.output


def test_sparklines() -> None:
    values = [0.5**i for i in range(8)]
    assert spark(values, 3, 32) == "█▇▆|▅▄▃▂▁"
    assert spark(values, 3, 32, blocks=False) == "#+=|-:,._"
    assert spark(values, 8, 32).endswith("|")
    assert spark(values, 0, 32).startswith("|")
    assert spark([1.0] * 5, 2, 32) == "██|███"
    long = spark([0.99**i for i in range(1000)], 500, 32)
    assert len(long) == 32 and 14 <= long.index("|") <= 17
    assert len(PLAIN) == len(BLOCKS)


def test_progress_is_for_terminals() -> None:
    from io import StringIO

    from rich.console import Console

    with progress(Console(file=StringIO())) as tell:
        assert tell is None
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=25)
    with progress(console) as tell:
        assert tell is not None
        for stage, total in [("decomposing", 986), ("writing", 5 << 20), ("verifying", 986), ("writing", 1 << 20)]:
            for done in (1, total // 2, total):
                tell(stage, done, total)
    written = stream.getvalue()
    assert all(stage in written for stage in ("decomposing", "writing", "verifying"))
    assert amount("writing", 1 << 20, 2 << 20, 1024.0) == "1.0 MiB of 2.0 MiB, 1.0 KiB/s"
    assert amount("verifying", 12, 1986, None) == "12 of 1,986"


# -- plots ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page has of each tag, and everything it would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        loads = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.outside += [value for value in loads if not value.startswith("#")]


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_plots(lora: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"plot.{suffix}"
    rules = ["--rank", "2", "--energy", "0.9"]
    result = run(lora, *rules, "--plot", file)
    assert (result.exit_code, result.stderr) == (0, "")
    assert names(tmp_path) == [file.name] and str(file) in "".join(result.stdout.split())
    first = file.read_bytes()
    assert_refused(run(lora, *rules, "--plot", file), 1, "--overwrite", str(file))
    assert data(run(lora, *rules, "--plot", file, "--overwrite", "--json"))["plot"] == str(file)
    assert file.read_bytes() == first, "the same picture is the same file"
    if suffix == "png":
        assert first.startswith(b"\x89PNG")
        return
    text = first.decode()
    for word in ("IN01", "M00", "BASE", "rank 2", "energy 0.9"):
        assert word in text, word
    page = Page(text[text.index("<svg") if suffix == "svg" else 0 :])
    assert page.outside == [] and page.tags["svg"] == 1
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    if suffix == "html":
        assert page.tags["tr"] == 45 and page.tags["td"] == 44 * (3 + 2 * 4) and page.tags["button"] == 11


def test_a_plot_that_cannot_be(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(run(lora, "--rank", "2", "--plot", tmp_path / "a.jpg"), 2, ".svg")
    assert_refused(run(lora, "--rank", "2", "--plot", tmp_path / "none" / "a.svg"), 1, "folder")
    same = tmp_path / "a.svg"
    assert_refused(run(lora, "--rank", "2", "--plot", same, "-o", same), 2, "the same file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("loratool.ops.resize_file.decompose", lambda *_: pytest.fail("too late"))
    result = run(lora, "--rank", "2", "--plot", same, "-o", tmp_path / "out.safetensors")
    assert_refused(result, 1, "pip install 'loratool[plot]'")
    assert names(tmp_path) == []


# -- what it refuses ------------------------------------------------------------------------------------------------


def one_line(text: str) -> None:
    assert text.count("\n") == 1 and text.startswith("error: ") and "Traceback" not in text, text


def assert_refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    one_line(result.stderr)
    assert [word for word in words if word not in result.stderr] == [], result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, ["no rule", "--rank 32"]),
        (["--rank", "0"], 2, ["--rank is '0'"]),
        (["--rank", "two"], 2, ["--rank is 'two'"]),
        (["--energy", "1.5"], 2, ["--energy"]),
        (["--error", "nan"], 2, ["--error"]),
        (["--size", "many"], 2, ["50MiB"]),
        (["--size", "1KiB"], 1, ["smallest possible is", "iB"]),
        (["--rank", "2", "--rank", "3"], 2, ["{rule}"]),
        (["--rank", "2", "--to", "nope"], 2, ["no layout", "kohya"]),
        (["--rank", "2", "--dtype", "int3"], 2, ["no dtype"]),
        (["--rank", "2", "--device", "tpu"], 2, ["no device", "cuda"]),
        (["--rank", "2", "--architecture", "sd16"], 2, ["sd15"]),
        (["--rank", "2", "--min-rank", "4", "--max-rank", "2"], 2, ["--min-rank", "--max-rank"]),
        (["--rank", "2", "--per-block", "none.yaml"], 2, ["none.yaml", "cannot be read"]),
        (["--rank", "2", "--base", "none.safetensors"], 1, ["none.safetensors"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_makes_no_sense(lora: Path, tmp_path: Path, options: list[str], code: int, words: list[str]) -> None:
    assert_refused(run(lora, *options, "-o", tmp_path / "out.safetensors"), code, *words)
    assert names(tmp_path) == []


def test_two_rules_of_one_name(lora: Path, tmp_path: Path) -> None:
    result = run(lora, "--rank", "2", "--rank", "2", "-o", tmp_path / "{rule}.safetensors")
    assert_refused(result, 2, "the same file")


def test_where_to_write_is_missing(lora: Path) -> None:
    assert_refused(run(lora, "--rank", "2"), 2, "-o", "--dry-run")


def test_a_dry_run_writes_nothing(lora: Path, tmp_path: Path) -> None:
    result = run(lora, *RULES["size"], *RULES["rank"], "--dry-run", "-o", tmp_path / "out.safetensors")
    assert (result.exit_code, names(tmp_path)) == (0, [])
    assert "not written" in result.stdout
    assert run(lora, *RULES["rank"], "--dry-run").exit_code == 0


def test_outputs_that_exist_are_kept(lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    assert_refused(run(lora, "--rank", "2", "-o", output), 1, "--overwrite")
    assert output.read_bytes() == b"mine"
    assert run(lora, "--rank", "2", "-o", output, "--overwrite").exit_code == 0
    before = lora.read_bytes()
    assert_refused(run(lora, "--rank", "2", "-o", lora, "--overwrite"), 1, "an input is never changed")
    assert lora.read_bytes() == before


def test_nan_names_the_module(tmp_path: Path) -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    key = next(key for key in bundle.tensors if key.endswith("q_proj.lora_up.weight"))
    odd = LazyTensor.from_torch(torch.full(bundle.tensors[key].shape, torch.nan))
    file = write_file(tmp_path / "nan.safetensors", Bundle({**bundle.tensors, key: odd}, bundle.metadata))
    result = run(file, "--rank", "2", "-o", tmp_path / "out.safetensors")
    assert_refused(result, 1, "nan.safetensors", "q_proj", "NaN")
    assert names(tmp_path) == ["nan.safetensors"]


def test_what_is_no_lora(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"<!DOCTYPE html>")
    for path in (broken, tmp_path / "none.safetensors"):
        assert_refused(run(path, "--rank", "2", "--dry-run"), 1, str(path))


def test_the_command_costs_nothing_until_it_runs() -> None:
    heavy = "{'torch', 'yaml', 'matplotlib', 'loratool.ops.resize', 'loratool.ops.ranks', 'loratool.report.plot'}"
    code = f"import sys, loratool.cli.main; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
