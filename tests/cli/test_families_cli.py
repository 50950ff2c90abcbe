"""Families on the command line: what is refused names the family and the option that helps, and the option helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from loratool.cli.main import app
from tests.bakes import Tensors, load, noise, save
from tests.cli.test_convert_cli import assert_refused

STEMS = [f"lora_unet_blocks_{n}_attn_{part}" for n in range(2) for part in "qk"]
BASE = {f"blocks.{n}.attn.{part}.weight": noise(48, 32, seed=10 * n + ord(part)) for n in range(2) for part in "qk"}
KEYS = dict(zip(STEMS, BASE, strict=True))


def of_every_module(*factors: tuple[str, torch.Tensor]) -> Tensors:
    """The same factors for each of the four modules."""
    return {f"{stem}.{suffix}": tensor for stem in STEMS for suffix, tensor in factors}


FILES = {
    "LoHa": of_every_module(
        ("hada_w1_a", noise(48, 2, seed=1)),
        ("hada_w1_b", noise(2, 32, seed=2)),
        ("hada_w2_a", noise(48, 2, seed=3)),
        ("hada_w2_b", noise(2, 32, seed=4)),
    ),
    "OFT": of_every_module(("oft_blocks", noise(4, 12, 12, size=0.1)), ("alpha", torch.tensor(0.0))),
    "BOFT": of_every_module(("oft_blocks", noise(2, 4, 12, 12, size=0.1)), ("alpha", torch.tensor(0.0))),
    "(IA)^3": of_every_module(("weight", noise(48, size=0.2)), ("on_input", torch.tensor(0))),
    "GLoRA": of_every_module(
        ("a1.weight", noise(32, 2, seed=1, size=0.2)),
        ("a2.weight", noise(2, 32, seed=2, size=0.2)),
        ("b1.weight", noise(48, 2, seed=3)),
        ("b2.weight", noise(2, 32, seed=4)),
        ("alpha", torch.tensor(1.0)),
    ),
}
each_title = pytest.mark.parametrize("title", FILES)


def run(*arguments: str | Path) -> Result:
    """One command."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def files(tmp_path: Path, title: str) -> tuple[Path, Path, Path]:
    """The adapter, the base, and a LoRA for the same weights."""
    pair = of_every_module(("lora_up.weight", noise(48, 2, seed=8)), ("lora_down.weight", noise(2, 32, seed=9)))
    return (
        save(tmp_path / "a.safetensors", FILES[title]),
        save(tmp_path / "base.safetensors", BASE),
        save(tmp_path / "lora.safetensors", pair),
    )


@each_title
def test_info_names_the_family(title: str, tmp_path: Path) -> None:
    adapter, _, _ = files(tmp_path, title)
    result = run("info", adapter, "--keys")
    assert result.exit_code == 0 and title in result.stdout, result.output
    assert "not read" not in result.stdout and "no modules" not in result.stdout
    assert ("rank" in result.stdout.partition("lora_unet")[2]) == (
        title in ("LoHa", "GLoRA")
    ) or "rank" in result.stdout


@each_title
def test_resize_is_refused_and_convert_helps(title: str, tmp_path: Path) -> None:
    adapter, base, _ = files(tmp_path, title)
    refused = run("resize", adapter, "--rank", "2", "-o", tmp_path / "o.safetensors")
    assert_refused(refused, 1, "a.safetensors", title, "convert --approximate lora", "--rank N or --energy E")
    assert ("--base CHECKPOINT" in refused.stderr) == (title != "LoHa")
    words = ["convert", adapter, "--to", "kohya", "-o", tmp_path / "o.safetensors", "--approximate", "lora"]
    if title != "LoHa":
        assert_refused(run(*words, "--energy", "1"), 1, title, "--base CHECKPOINT")
    done = run(*words, "--energy", "0.999999", "--base", base, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["approximated"]
    assert len(told) == len(STEMS) and all(0 <= item["error"] < 2e-3 for item in told)
    resized = run("resize", tmp_path / "o.safetensors", "--rank", "2", "-o", tmp_path / "r.safetensors")
    assert resized.exit_code == 0, resized.output


@each_title
def test_merge_is_refused_and_approximate_helps(title: str, tmp_path: Path) -> None:
    adapter, _, lora = files(tmp_path, title)
    words = ["merge", f"{adapter}:0.5", lora, "-o", tmp_path / "m.safetensors"]
    refused = run(*words)
    assert_refused(refused, 1, title, "no exact sum", "--approximate --energy 0.999")
    if title != "LoHa":
        assert_refused(run(*words, "--approximate", "--rank", "4"), 1, title, "add --base CHECKPOINT")
        return
    done = run(*words, "--approximate", "--energy", "0.999")
    assert done.exit_code == 0 and "approximated" in done.stdout, done.output


@each_title
def test_bake_works_and_subtracting_is_refused_by_name(title: str, tmp_path: Path) -> None:
    adapter, base, _ = files(tmp_path, title)
    output, undo = tmp_path / "baked.safetensors", tmp_path / "undo.loratool"
    done = run("bake", "--base", base, f"{adapter}:0.5", "-o", output, "--undo", undo)
    assert done.exit_code == 0, done.output
    assert all(not torch.equal(load(output)[key], BASE[key]) for key in BASE)
    back = run("unbake", output, f"{adapter}:0.5", "-o", tmp_path / "near.safetensors")
    if title != "LoHa":
        assert_refused(back, 1, title, "cannot be subtracted", "undo file")
    again = run("unbake", output, "--undo", undo, "-o", tmp_path / "again.safetensors")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


def test_unpack_is_an_option_of_convert(tmp_path: Path) -> None:
    tensors = of_every_module(("lora_up.weight", noise(48, 4)), ("lora_down.weight", noise(4, 32)))
    plain = save(tmp_path / "plain.safetensors", tensors)
    packed = save(tmp_path / "packed.safetensors", tensors, {"ss_network_module": "networks.dylora"})
    words = ["--to", "kohya", "-o", tmp_path / "o.safetensors", "--unpack", "2"]
    assert_refused(run("convert", plain, *words), 1, "DyLoRA", "resize --rank N")
    done = run("convert", packed, *words)
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "o.safetensors")[f"{STEMS[0]}.lora_down.weight"].shape == (2, 32)
