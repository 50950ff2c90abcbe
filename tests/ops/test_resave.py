"""PyTorch files as safetensors: the same keys and bytes, and nothing lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loratool.core.adapter import CONFIG
from loratool.core.errors import FormatError, LoratoolError, UsageError
from loratool.core.registry import methods
from loratool.files import bundle as bundles
from loratool.files.bundle import adapters_in, read_bundle
from loratool.files.checkpoint import read_checkpoint
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.convert_file import convert_file
from loratool.ops.inputs import Asked
from loratool.ops.merge_files import merge_files
from loratool.ops.open import open_adapter
from loratool.ops.ranks import parse_rule
from loratool.ops.recipe import sha256
from loratool.ops.resave import resave_file
from loratool.ops.resize_file import resize_file
from tests.bakes import KEYS, K, Q, kohya, noise, save
from tests.builders import LAYOUTS, Style, build, contents, typical_parts, write_file
from tests.pickles import Called, tensor, torch_zip

OLD = {"_use_new_zipfile_serialization": False}
CONTAINERS = pytest.mark.parametrize("container", [{}, OLD], ids=["zip", "legacy"])


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for key, one in expected.items():
        assert found[key].dtype == one.dtype and torch.equal(
            found[key].reshape(-1).view(torch.uint8), one.contiguous().reshape(-1).view(torch.uint8)
        )


@CONTAINERS
def test_tied_turned_and_sliced_weights(tmp_path: Path, container: dict[str, Any]) -> None:
    base = torch.randn(64, 48, dtype=torch.bfloat16)
    made = {"embed.weight": base, "head.weight": base, "turned": base.t(), "q": base[:, :16], "rows": base[3:5]}
    torch.save({"state_dict": made, "epoch": 7, "betas": [0.9, 0.99]}, tmp_path / "x.ckpt", **container)
    done = resave_file(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    same(tmp_path / "x.safetensors", made)
    assert (done.tensors, done.compared, done.dtypes) == (5, 5, {"BF16": 5})
    assert done.size_after == (tmp_path / "x.safetensors").stat().st_size
    assert "betas" in done.notes[0]
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["epoch"] == "7"
    assert json.loads(metadata["loratool.history"])[0]["op"] == "resave"


def test_what_is_there_already_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    with pytest.raises(LoratoolError, match="the output is an input"):
        resave_file(tmp_path / "x.pt", tmp_path / "x.pt", overwrite=True)
    assert (tmp_path / "x.pt").read_bytes() == before
    (tmp_path / "y.safetensors").write_bytes(b"")
    with pytest.raises(LoratoolError, match="exists already"):
        resave_file(tmp_path / "x.pt", tmp_path / "y.safetensors")
    resave_file(tmp_path / "x.pt", tmp_path / "y.safetensors", overwrite=True)
    same(tmp_path / "y.safetensors", {"a": torch.ones(2)})
    with pytest.raises(UsageError, match="is safetensors already"):
        resave_file(tmp_path / "y.safetensors", tmp_path / "z.safetensors")


def test_a_refused_file_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(torch_zip({"a": tensor(), "b": Called("os.system", ("true",))}))
    with pytest.raises(FormatError, match=r"asks for os\.system"):
        resave_file(tmp_path / "x.pt", tmp_path / "y.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def test_a_reserved_name_is_refused_with_its_file(tmp_path: Path) -> None:
    torch.save({"__metadata__": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(LoratoolError, match=r"x\.pt: a tensor cannot be called __metadata__"):
        resave_file(tmp_path / "x.pt", tmp_path / "y.safetensors")


def test_without_verification_nothing_is_compared(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    assert resave_file(tmp_path / "x.pt", tmp_path / "y.safetensors", verify=False).compared is None


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.pt")
    write = bundles.write_safetensors

    def damaged(path: Path, *arguments: Any, **options: Any) -> None:
        write(path, *arguments, **options)
        data = bytearray(Path(path).read_bytes())
        data[-1] ^= 1
        Path(path).write_bytes(data)

    monkeypatch.setattr(bundles, "write_safetensors", damaged)
    with pytest.raises(LoratoolError, match="a: the written file does not hold the same bytes; nothing was written"):
        resave_file(tmp_path / "x.pt", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


# ---------------------------------------------------------------- adapters


@CONTAINERS
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "comfyui"])
def test_loras_are_recognised(tmp_path: Path, layout: str, container: dict[str, Any]) -> None:
    bundle = build(typical_parts("sdxl", layout), layout)
    safe = open_adapter(write_file(tmp_path / "a.safetensors", bundle))
    torch.save({key: one.load() for key, one in bundle.tensors.items()}, tmp_path / "a.bin", **container)
    adapter = open_adapter(tmp_path / "a.bin")
    assert (adapter.layout, adapter.architecture.id) == (layout, "sdxl")
    assert {m.title: m.rank for m in adapter.modules} == {m.title: m.rank for m in safe.modules}
    if layout != "diffusers":  # a .bin has no header to keep the alphas of diffusers in
        assert {m.title: m.alpha for m in adapter.modules} == {m.title: m.alpha for m in safe.modules}
    for to in LAYOUTS:
        done = convert_file(tmp_path / "a.bin", to, tmp_path / f"to-{to}")
        assert done.proof is not None and done.proof.compared


def test_the_old_processors_of_diffusers(tmp_path: Path) -> None:
    """`pytorch_lora_weights.bin` of early 2023."""
    names = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
    ]
    made = {}
    for name, width in zip(names, (320, 1280)):
        for part in ("to_q", "to_out"):
            made[f"{name}.processor.{part}_lora.down.weight"] = torch.rand(4, width)
            made[f"{name}.processor.{part}_lora.up.weight"] = torch.rand(width, 4)
    torch.save(made, tmp_path / "pytorch_lora_weights.bin")
    adapter = open_adapter(tmp_path)
    assert (adapter.layout, len(adapter.modules)) == ("diffusers", 4)


@CONTAINERS
@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_a_peft_folder_of_pickles(tmp_path: Path, architecture: str, container: dict[str, Any]) -> None:
    folder = write_file(tmp_path / "peft", build(typical_parts(architecture, "peft", alpha=2.0), "peft", Style()))
    safe = open_adapter(folder)
    expected = contents(read_bundle(folder))
    for file in sorted(folder.rglob("adapter_model.safetensors")):
        torch.save(load_file(file), file.with_suffix(".bin"), **container)
        file.unlink()
    adapter = open_adapter(folder)
    assert {m.title: m.alpha for m in adapter.modules} == {m.title: m.alpha for m in safe.modules}
    assert len(sha256(folder)) == 64
    with pytest.raises(UsageError, match="is a PEFT folder"):
        resave_file(folder, tmp_path / "one.safetensors")
    resave_file(folder, tmp_path / "again")
    assert contents(read_bundle(tmp_path / "again")) == expected
    assert {file.suffix for file in (tmp_path / "again").rglob("*") if file.is_file()} == {".safetensors", ".json"}
    lone = next(folder.rglob("adapter_model.bin"))
    assert read_bundle(lone).side_files.keys() == {CONFIG}
    assert open_adapter(lone).modules


def test_merge_resize_and_bake_take_them_like_safetensors(tmp_path: Path) -> None:
    """From turned and shared storages, too: the results have the same tensors."""
    made = kohya({Q: (16, 8), K: (16, 8)})
    save(tmp_path / "s" / "lora.safetensors", made)
    (tmp_path / "p").mkdir()
    turned = {key: one.t().contiguous().t() if one.dim() == 2 else one for key, one in made.items()}
    torch.save(turned, tmp_path / "p" / "lora.pt")
    base = save(tmp_path / "base.safetensors", {KEYS[Q]: noise(16, 8), KEYS[K]: noise(16, 8)})
    results: list[list[dict[str, torch.Tensor]]] = []
    for lora in (tmp_path / "s" / "lora.safetensors", tmp_path / "p" / "lora.pt"):
        folder = lora.parent
        asked = [Asked(str(lora), 0.5)]
        merge_files(asked, folder / "merged.safetensors", methods()["concat"])
        resize_file(lora, [parse_rule("rank", "2")], folder / "small.safetensors")
        bake_file(base, asked, folder / "baked.safetensors", Options())
        results.append([load_file(folder / f"{name}.safetensors") for name in ("merged", "small", "baked")])
    for ours, theirs in zip(*results):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_safetensors_come_first_in_a_folder(tmp_path: Path) -> None:
    folder = write_file(tmp_path / "peft", build(typical_parts("sd15", "peft")[-4:], "peft"))
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    assert open_adapter(folder).modules
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"adapter_model\.bin: asks for os\.system"):
        open_adapter(folder)


def test_folders_of_pickles(tmp_path: Path) -> None:
    bundle = build(typical_parts("sd15", "kohya"), "kohya")
    torch.save({key: one.load() for key, one in bundle.tensors.items()}, tmp_path / "a.pt")
    assert open_adapter(tmp_path).layout == "kohya"
    assert adapters_in(tmp_path) == [str(tmp_path / "a.pt")]
    torch.save({}, tmp_path / "b.pt")
    with pytest.raises(FormatError, match=r"is a folder with 2 PyTorch files \(a\.pt, b\.pt\); name one"):
        open_adapter(tmp_path)
    write_file(tmp_path / "c.safetensors", bundle)
    assert open_adapter(tmp_path).path == str(tmp_path / "c.safetensors")


def test_checkpoints_are_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a.weight": torch.ones(4, 4)}}, tmp_path / "my model.ckpt")
    with pytest.raises(FormatError, match=r"loratool convert '.*/my model\.ckpt' -o '.*/my model\.safetensors'"):
        read_checkpoint(tmp_path / "my model.ckpt")
    resave_file(tmp_path / "my model.ckpt", tmp_path / "my model.safetensors")
    assert list(read_checkpoint(tmp_path / "my model.safetensors").keys) == ["a.weight"]
