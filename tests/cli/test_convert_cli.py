"""`loratool convert`: reports, exit codes, and outputs that are there whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from loratool.core.adapter import Bundle
from loratool.core.tensor import LazyTensor
from loratool.files import bundle as bundles
from loratool.files.bundle import read_bundle
from loratool.ops.spell import HEADER_ROOM
from tests.builders import LAYOUTS, Part, Style, build, pair, spelled, typical_parts, weight, write_file, zero_file
from tests.cli.test_info import BAD, HOSTILE, assert_fits, assert_inert, assert_one_line, conforms
from tests.contracts import assert_same_tensors

REPORT_SCHEMA: dict[str, type | tuple[type, ...]] = {
    "source": str,
    "output": str,
    "program": (str, type(None)),
    "layout_before": str,
    "layout_after": str,
    "architecture": str,
    "architecture_title": str,
    "modules_before": int,
    "modules_after": int,
    "ranks_before": dict,
    "ranks_after": dict,
    "size_before": int,
    "size_after": int,
    "returned": bool,
    "carried": list,
    "kept": list,
    "dropped": list,
    "vanished": list,
    "unread_families": dict,
    "approximated": list,
    "notes": list,
    "proof": (dict, type(None)),
    "seconds": (int, float),
}
PROOF_SCHEMA = {"compared": int, "bitwise": int, "worst": (int, float), "tolerance": (int, float)}


def run(*arguments: str | Path, columns: int = 80) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": str(columns)})


def shell(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "COLUMNS": "80", **(env or {})}
    command = [sys.executable, "-c", "from loratool.cli.main import app; app()", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    parts = typical_parts("sd15", "kohya", rank=4, alpha=2.0)
    return write_file(tmp_path / "style.safetensors", build(parts, "kohya", Style(metadata={"title": "x"})))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


# -- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", LAYOUTS)
def test_a_report_on_stdout(lora: Path, tmp_path: Path, to: str) -> None:
    before = lora.read_bytes()
    result = run(lora, "--to", to, "-o", tmp_path / "out.x")
    assert (result.exit_code, result.stderr) == (0, "")
    assert_fits(result.stdout)
    flat = " ".join(result.stdout.split())
    for fact in ("kohya", to, "Stable Diffusion 1.x", "44 modules", "44 updates read back, all the same bit for bit"):
        assert fact in flat, fact
    assert lora.read_bytes() == before
    assert names(tmp_path) == ["out.x", "style.safetensors"]
    assert (tmp_path / "out.x").is_dir() == (to == "peft")


def test_json_has_the_schema(lora: Path, tmp_path: Path) -> None:
    result = run(lora, "--to", "diffusers", "-o", tmp_path / "out.safetensors", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.isascii()
    data = json.loads(result.stdout)
    conforms(data, REPORT_SCHEMA)
    conforms(data["proof"], PROOF_SCHEMA)
    assert data["proof"]["bitwise"] == data["proof"]["compared"] == data["modules_before"] == data["modules_after"]
    assert data["size_after"] == (tmp_path / "out.safetensors").stat().st_size


def test_there_and_back(lora: Path, tmp_path: Path) -> None:
    assert run(lora, "--to", "peft", "-o", tmp_path / "folder").exit_code == 0
    result = run(tmp_path / "folder", "--to", "kohya", "-o", tmp_path / "back.safetensors")
    assert result.exit_code == 0 and "the original's" in " ".join(result.stdout.split())
    before, after = read_bundle(lora), read_bundle(tmp_path / "back.safetensors")
    assert_same_tensors(before, after)
    assert before.metadata == after.metadata


def test_no_verify_says_so(lora: Path, tmp_path: Path) -> None:
    result = run(lora, "--to", "diffusers", "-o", tmp_path / "out.safetensors", "--no-verify")
    assert result.exit_code == 0 and "no (--no-verify)" in result.stdout
    data = json.loads(run(lora, "--to", "diffusers", "-o", tmp_path / "b.x", "--no-verify", "--json").stdout)
    assert data["proof"] is None


def test_dtype(lora: Path, tmp_path: Path) -> None:
    assert run(lora, "--to", "diffusers", "-o", tmp_path / "out.safetensors", "--dtype", "bf16").exit_code == 0
    assert {tensor.dtype for tensor in read_bundle(tmp_path / "out.safetensors").tensors.values()} == {"BF16"}


def test_a_process_of_its_own(lora: Path, tmp_path: Path) -> None:
    done = shell(lora, "--to", "comfyui", "-o", tmp_path / "out.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    again = shell(lora, "--to", "comfyui", "-o", tmp_path / "out.safetensors")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.count("\n") == 1 and "--overwrite" in again.stderr


def test_a_model_of_a_checkpoint(tmp_path: Path) -> None:
    base = zero_file(
        tmp_path / "base.safetensors", {"blocks.0.attn.to_q.weight": (8, 8), "blocks.0.mlp_in.weight": (16, 8)}
    )
    stem = "lora_unet_blocks_0_attn_to_q"
    shapes = {f"{stem}.lora_down.weight": (2, 8), f"{stem}.lora_up.weight": (8, 2)}
    lora = zero_file(tmp_path / "lora.safetensors", shapes)
    assert_refused(run(lora, "--to", "comfyui", "-o", tmp_path / "out.safetensors"), 1, "--base")
    assert run(lora, "--to", "comfyui", "-o", tmp_path / "out.safetensors", "--base", base).exit_code == 0
    keys = read_bundle(tmp_path / "out.safetensors").tensors
    assert "diffusion_model.blocks.0.attn.to_q.lora_A.weight" in keys


# -- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_an_output_that_exists_is_kept(lora: Path, tmp_path: Path, to: str) -> None:
    output = tmp_path / "out.x"
    assert run(lora, "--to", to, "-o", output).exit_code == 0
    before = read_bundle(output)
    old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert_refused(run(lora, "--to", to, "-o", output, "--dtype", "fp32"), 1, str(output), "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == old
    del before
    assert run(lora, "--to", to, "-o", output, "--overwrite", "--dtype", "fp32").exit_code == 0
    assert {tensor.dtype for tensor in read_bundle(output).tensors.values()} == {"F32"}
    assert names(tmp_path) == ["out.x", "style.safetensors"]


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_the_output_is_never_the_input(lora: Path, tmp_path: Path, options: list[str]) -> None:
    before = lora.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(lora)
    (tmp_path / "there").symlink_to(tmp_path)
    for source, output in (
        (lora, lora),
        (lora, tmp_path / "link.safetensors"),
        (tmp_path / "link.safetensors", lora),
        (lora, tmp_path / "there" / "style.safetensors"),
        (lora, tmp_path / ".." / tmp_path.name / "style.safetensors"),
    ):
        result = run(source, "--to", "diffusers", "-o", output, *options)
        assert_refused(result, 1, "the output is an input")
        assert lora.read_bytes() == before
    assert (tmp_path / "link.safetensors").is_symlink()


def test_a_folder_is_never_its_own_output(tmp_path: Path) -> None:
    folder = write_file(tmp_path / "adapter", build(typical_parts("sd15", "peft"), "peft"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = run(folder, "--to", "peft", "-o", folder, "--overwrite")
    assert_refused(result, 1, "an input")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_output_is_no_part_of_the_input_and_holds_none(tmp_path: Path) -> None:
    folder = write_file(tmp_path / "adapter", build(typical_parts("sd15", "peft"), "peft"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model = folder / "unet" / "adapter_model.safetensors"
    assert_refused(run(folder, "--to", "kohya", "-o", model, "--overwrite"), 1, "is part of an input")
    for source in (model, folder / "unet"):
        assert_refused(run(source, "--to", "peft", "-o", folder, "--overwrite"), 1, "holds an input")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_name_of_the_input_is_replaced_without_harm(lora: Path, tmp_path: Path) -> None:
    before, other = lora.read_bytes(), tmp_path / "hard.safetensors"
    os.link(lora, other)
    assert run(lora, "--to", "diffusers", "-o", other, "--overwrite").exit_code == 0
    assert lora.read_bytes() == before != other.read_bytes()


def test_missing_folders(lora: Path, tmp_path: Path) -> None:
    result = run(lora, "--to", "diffusers", "-o", tmp_path / "no" / "out.safetensors")
    assert_refused(result, 1, "folder does not exist", "mkdir")
    assert names(tmp_path) == ["style.safetensors"]


def test_a_file_is_no_folder(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert_refused(run(lora, "--to", "diffusers", "-o", tmp_path / "folder", "--overwrite"), 1, "is a folder")
    (tmp_path / "file").write_bytes(b"mine")
    assert_refused(run(lora, "--to", "peft", "-o", tmp_path / "file", "--overwrite"), 1, "is a file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_corrupted_write_leaves_nothing(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bundles.write_safetensors

    def corrupting(path: Path, *arguments: object, **options: object) -> None:
        real(path, *arguments, **options)  # type: ignore[arg-type]
        data = bytearray(Path(path).read_bytes())
        data[-2] ^= 0x40
        Path(path).write_bytes(data)

    monkeypatch.setattr(bundles, "write_safetensors", corrupting)
    result = run(lora, "--to", "diffusers", "-o", tmp_path / "out.safetensors")
    assert_refused(result, 1, "differs", "nothing was written")
    assert names(tmp_path) == ["style.safetensors"]


def test_a_full_disk_leaves_nothing(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "write_safetensors", full)
    for to in ("diffusers", "peft"):
        assert_refused(run(lora, "--to", to, "-o", tmp_path / "out.x"), 1, "No space left")
    assert names(tmp_path) == ["style.safetensors"]


# -- what makes no sense --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "near"), [("diffuser", "diffusers"), ("Kohya", "kohya"), ("comfy", "comfyui")])
def test_unknown_layouts_get_the_nearest_name(lora: Path, tmp_path: Path, name: str, near: str) -> None:
    result = run(lora, "--to", name, "-o", tmp_path / "out.x")
    assert_refused(result, 2, repr(name), f"did you mean {near}?")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "zzz"], ["zzz", "kohya"]),
        (["--to", "cloneofsimo"], ["only read"]),
        (["--to", "peft", "--dtype", "int3"], ["int3", "bf16"]),
        (["--to", "peft", "--architecture", "sdx"], ["did you mean sdxl?"]),
        (["--to", "peft", "--rank", "4"], ["--approximate lora"]),
        (["--to", "peft", "--approximate", "lora"], ["--rank", "--energy"]),
        (["--to", "peft", "--approximate", "loha", "--rank", "2"], ["loha"]),
        (["--to", "peft", "--approximate", "lora", "--rank", "0"], ["--rank"]),
        (["--to", "peft", "--approximate", "lora", "--energy", "1.5"], ["--energy"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_senseless_options_are_exit_2(lora: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    result = run(lora, *options, "-o", tmp_path / "out.x")
    assert_refused(result, 2, *words)
    assert names(tmp_path) == ["style.safetensors"]


def test_missing_options_are_exit_2(lora: Path, tmp_path: Path) -> None:
    for arguments in ([lora], [lora, "--to", "peft"], [lora, "-o", tmp_path / "out"], []):
        assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_get_one_line_and_no_output(tmp_path: Path, kind: str) -> None:
    make, what = BAD[kind]
    path = tmp_path / "bad.safetensors"
    make(path)
    result = run(path, "--to", "diffusers", "-o", tmp_path / "out.safetensors")
    assert_one_line(result, path, what)
    assert names(tmp_path) == ["bad.safetensors"]


def test_extras_ride_or_are_dropped(tmp_path: Path) -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    small = LazyTensor.from_torch(torch.zeros(8))
    large = LazyTensor.from_torch(torch.zeros(HEADER_ROOM // 4 + 1))
    one = write_file(tmp_path / "one.safetensors", Bundle({**bundle.tensors, "emb.small": small}))
    two = write_file(tmp_path / "two.safetensors", Bundle({**bundle.tensors, "emb.large": large}))
    carried = run(one, "--to", "diffusers", "-o", tmp_path / "a.safetensors")
    assert carried.exit_code == 0 and "carried in the header" in " ".join(carried.stdout.split())
    assert "emb.small" in carried.stdout
    refused = run(two, "--to", "diffusers", "-o", tmp_path / "b.safetensors")
    assert_refused(refused, 1, "emb.large", "--drop-extras")
    dropped = run(two, "--to", "diffusers", "-o", tmp_path / "b.safetensors", "--drop-extras")
    assert dropped.exit_code == 0 and "emb.large" in dropped.stdout and "left out" in dropped.stdout


def test_what_cannot_be_said_names_the_way_out(tmp_path: Path) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{stem}.lokr_w1": LazyTensor.from_torch(torch.rand(4, 4, generator=generator)),
        f"{stem}.lokr_w2": LazyTensor.from_torch(torch.rand(6, 6, generator=generator)),
    }
    one = weight("flux", "kohya", "double_blocks.0.txt_attn.proj")
    tensors |= spelled(Part(one, 2, 2.0), pair((24, 24), 2, "F32", 1), "kohya")
    file = write_file(tmp_path / "lokr.safetensors", Bundle(tensors))
    refused = run(file, "--to", "diffusers", "-o", tmp_path / "out.safetensors")
    assert_refused(refused, 1, "transformer_blocks.0.attn.to_out.0", "--approximate lora")
    done = run(
        file, "--to", "diffusers", "-o", tmp_path / "out.safetensors", "--approximate", "lora", "--rank", "4", "--json"
    )
    assert done.exit_code == 0, done.stderr
    (item,) = json.loads(done.stdout)["approximated"]
    assert item["family"] == "lokr" and item["rank"] == 4 and 0 < item["error"] < 1
    exact = run(file, "--to", "peft", "-o", tmp_path / "out", "--approximate", "lora", "--energy", "1", "--json")
    assert json.loads(exact.stdout)["approximated"][0]["error"] < 1e-5


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya", Style(metadata={HOSTILE: HOSTILE}))
    file_name = HOSTILE.replace("/", "").replace("\n", "")[:60]
    extras = {HOSTILE: LazyTensor.scalar(0.0, "F32")}
    file = write_file(tmp_path / f"{file_name}.safetensors", Bundle({**bundle.tensors, **extras}, bundle.metadata))
    result = run(file, "--to", "diffusers", "-o", tmp_path / f"{file_name}.out")
    assert result.exit_code == 0, result.output
    assert_inert(result.stdout)
    again = run(file, "--to", "diffusers", "-o", tmp_path / f"{file_name}.out")
    assert again.exit_code == 1
    assert_inert(again.stderr)
    assert again.stderr.count("\n") == 1
    assert_inert(run(file, "--to", HOSTILE, "-o", tmp_path / "x").stderr)


def test_a_reader_that_leaves_is_no_error(lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", "from loratool.cli.main import app; app()", "convert", str(lora)]
    process = subprocess.Popen(
        [*command, "--to", "diffusers", "-o", str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    complaints = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert complaints == ""
    assert output.exists()
