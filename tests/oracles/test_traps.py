"""Traps found by running other tools that no other test names (numbers as in the reference that lists them)."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from tests.oracles.models import SHARED_DATA

WIDTH = 3072
STEM = "lora_unet_double_blocks_0_img_attn_qkv"


def block_diagonal(rank: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """sd-scripts' split_qkv: three pairs in one module, and the update of each part as programs apply it."""
    torch.manual_seed(0)
    downs = [torch.randn(rank, WIDTH) for _ in range(3)]
    ups = [torch.randn(WIDTH, rank) for _ in range(3)]
    tensors = {f"{STEM}.lora_up.weight": torch.block_diag(*ups), f"{STEM}.lora_down.weight": torch.cat(downs)}
    tensors[f"{STEM}.alpha"] = torch.tensor(float(rank))
    return tensors, [up @ down / 3 for up, down in zip(ups, downs, strict=True)]


def assert_updates(file: Path, deltas: list[torch.Tensor]) -> None:
    """The file has one module each for q, k and v, with these updates."""
    modules = {module.targets[0].path.rpartition(".")[2]: module for module in open_adapter(file).modules}
    for name, delta in zip(("to_q", "to_k", "to_v"), deltas, strict=True):
        torch.testing.assert_close(modules.pop(name).delta(), delta, rtol=1e-5, atol=1e-5)
    assert not modules


def test_trap_12_split_qkv_is_taken_as_programs_apply_it_and_said(tmp_path: Path) -> None:
    tensors, deltas = block_diagonal(rank=4)
    file, split, back = tmp_path / "kohya.safetensors", tmp_path / "split.safetensors", tmp_path / "back.safetensors"
    save_file(tensors, file, metadata={"ss_network_args": json.dumps({"split_qkv": "True"})})
    assert "split_qkv" in " ".join(open_adapter(file).notes)
    convert_file(file, "diffusers", split)
    assert [module.rank for module in open_adapter(split).modules] == [4, 4, 4]
    assert_updates(split, deltas)
    assert convert_file(split, "kohya", back).returned
    assert file.read_bytes() == back.read_bytes()


def test_trap_12_is_not_said_of_other_files(tmp_path: Path) -> None:
    tensors, _ = block_diagonal(rank=1)
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file, metadata={"ss_network_args": json.dumps({"split_qkv": "False"})})
    assert not any("split_qkv" in note for note in open_adapter(file).notes)


def test_trap_10_locon_dims_by_kernel(tmp_path: Path) -> None:
    """1x1 convolutions and `time_emb_proj` take dim, only 3x3 ones conv_dim; what the header states stays true."""
    source = SHARED_DATA / "kohya" / "sd15_locon.safetensors"
    if not source.exists():
        pytest.skip("no ../shared/data here")
    by_kernel = {(module.shape[2:] in ((), (1, 1)), module.rank) for module in open_adapter(source).modules}
    assert by_kernel == {(True, 8), (False, 4)}
    convert_file(source, "comfyui", tmp_path / "comfyui.safetensors")
    with safe_open(tmp_path / "comfyui.safetensors", "pt") as written:
        assert written.metadata()["ss_network_dim"] == "8"
        assert json.loads(written.metadata()["ss_network_args"])["conv_dim"] == "4"


def test_trap_24_files_have_the_users_mode_and_no_temporary_file_stays(tmp_path: Path) -> None:
    tensors, _ = block_diagonal(rank=1)
    save_file(tensors, tmp_path / "in.safetensors")
    convert_file(tmp_path / "in.safetensors", "comfyui", tmp_path / "out.safetensors")
    convert_file(tmp_path / "in.safetensors", "peft", tmp_path / "folder")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out.safetensors").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", "out.safetensors", "folder"}


def test_trap_25_native_flux_names_under_pefts_prefix(tmp_path: Path) -> None:
    tensors, deltas = block_diagonal(rank=2)
    stem = "base_model.model.double_blocks.0.img_attn.qkv"
    file = tmp_path / "kontext.safetensors"
    spelled = {
        f"{stem}.lora_A.weight": tensors[f"{STEM}.lora_down.weight"],
        f"{stem}.lora_B.weight": tensors[f"{STEM}.lora_up.weight"],
    }
    save_file(spelled, file)
    adapter = open_adapter(file)
    assert (adapter.layout, adapter.architecture.id, len(adapter.extras)) == ("peft", "flux", 0)
    convert_file(file, "diffusers", tmp_path / "diffusers.safetensors")
    assert_updates(tmp_path / "diffusers.safetensors", [3 * delta for delta in deltas])
