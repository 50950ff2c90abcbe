"""Rules of programs that cannot be installed here, case by case: what their sources say of one key."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratool.core.adapter import Bundle
from loratool.core.registry import architectures, programs
from loratool.core.tensor import LazyTensor
from loratool.ops.check import check
from loratool.ops.conformance import CHANGED, IGNORED, READ, REFUSED, conform
from loratool.ops.open import open_adapter
from tests.builders import write_file

Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED_Q = Q.replace("_", ".").replace("down.blocks", "down_blocks").replace("transformer.blocks", "transformer_blocks")
DOTTED_Q = DOTTED_Q.replace("to.q", "to_q")
FF = DOTTED_Q.replace("attn1.to_q", "ff.net.0.proj")
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"

# (program, architecture, stem of the key, suffixes of down and up, width, outcome)
CASES = [
    # ComfyUI: every spelling of a pair that its LoRA adapter looks for.
    ("comfyui", "sd15", f"lora_unet_{Q}", ".lora_down.weight", ".lora_up.weight", READ),
    ("comfyui", "sd15", f"lora_unet_{Q}", "_lora.down.weight", "_lora.up.weight", READ),
    ("comfyui", "sd15", f"lora_unet_{Q}", ".lora.down.weight", ".lora.up.weight", READ),
    ("comfyui", "sd15", f"lora_unet_{Q}", ".lora_A.weight", ".lora_B.weight", READ),
    ("comfyui", "sd15", f"unet.{DOTTED_Q}", ".lora_A.weight", ".lora_B.weight", IGNORED),
    ("comfyui", "sd15", f"unet.{DOTTED_Q}", ".lora.down.weight", ".lora.up.weight", IGNORED),
    (
        "comfyui",
        "sd15",
        f"unet.{DOTTED_Q}".replace("attn1.to_q", "attn1.processor.to_q"),
        "_lora.down.weight",
        "_lora.up.weight",
        READ,
    ),
    ("comfyui", "sd15", f"unet.{FF}", ".lora_A.weight", ".lora_B.weight", READ),
    ("comfyui", "sd15", f"text_encoder.{CLIP}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", READ),
    ("comfyui", "sd15", f"base_model.model.{DOTTED_Q}", ".lora_A.weight", ".lora_B.weight", IGNORED),
    ("comfyui", "flux", "diffusion_model.double_blocks.0.img_attn.proj", ".lora_A.weight", ".lora_B.weight", READ),
    ("comfyui", "flux", "transformer.transformer_blocks.0.attn.to_q", ".lora_A.weight", ".lora_B.weight", READ),
    ("comfyui", "flux", "transformer_blocks.0.attn.to_q", ".lora_A.weight", ".lora_B.weight", READ),
    ("comfyui", "flux", "base_model.model.transformer_blocks.0.attn.to_q", ".lora_A.weight", ".lora_B.weight", IGNORED),
    ("comfyui", "flux", "lora_unet_double_blocks_0_img_attn_proj", ".lora_down.weight", ".lora_up.weight", READ),
    ("comfyui", "flux", "lora_unet_transformer_blocks_0_attn_to_q", ".lora_down.weight", ".lora_up.weight", IGNORED),
    (
        "comfyui",
        "flux",
        "lora_transformer_transformer_blocks_0_attn_to_q",
        ".lora_down.weight",
        ".lora_up.weight",
        READ,
    ),
    ("comfyui", "flux", "lycoris_transformer_blocks_0_attn_to_q", ".lora_down.weight", ".lora_up.weight", READ),
    # sd-scripts
    ("kohya", "sd15", f"lora_unet_{Q}", ".lora_down.weight", ".lora_up.weight", READ),
    ("kohya", "sd15", "lora_unet_time_embedding_linear_1", ".lora_down.weight", ".lora_up.weight", IGNORED),
    ("kohya", "sd15", f"unet.{DOTTED_Q}", ".lora_A.weight", ".lora_B.weight", IGNORED),
    ("kohya", "sdxl", "lora_unet_input_blocks_4_1_proj_in", ".lora_down.weight", ".lora_up.weight", READ),
    ("kohya", "sdxl", "lora_unet_down_blocks_1_attentions_0_proj_in", ".lora_down.weight", ".lora_up.weight", READ),
    ("kohya", "sdxl", "lora_te2_text_projection", ".lora_down.weight", ".lora_up.weight", IGNORED),
    ("kohya", "flux", "lora_unet_final_layer_linear", ".lora_down.weight", ".lora_up.weight", REFUSED),
    # WebUI
    ("a1111", "sd15", f"lora_unet_{Q}", ".lora_down.weight", ".lora_up.weight", READ),
    ("a1111", "sd15", f"lora_unet_{Q}", ".lora_A.weight", ".lora_B.weight", READ),
    ("a1111", "sd15", f"lora_unet_{Q}", ".lora.down.weight", ".lora.up.weight", REFUSED),
    ("a1111", "sd15", f"unet.{DOTTED_Q}", ".lora_A.weight", ".lora_B.weight", IGNORED),
    ("a1111", "sdxl", f"lora_te2_{CLIP.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight", IGNORED),
    ("a1111", "sdxl", f"lora_te1_{CLIP.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight", READ),
    ("a1111", "flux", "lora_unet_double_blocks_0_img_attn_proj", ".lora_down.weight", ".lora_up.weight", IGNORED),
    # InvokeAI
    ("invokeai", "sd15", f"lora_unet_{Q}", ".lora_down.weight", ".lora_up.weight", READ),
    ("invokeai", "sd15", f"unet.{DOTTED_Q}", ".lora_A.weight", ".lora_B.weight", REFUSED),
    ("invokeai", "flux", "lora_unet_double_blocks_0_img_attn_proj", ".lora_down.weight", ".lora_up.weight", READ),
    ("invokeai", "flux", "lora_unet_img_in", ".lora_down.weight", ".lora_up.weight", REFUSED),
    ("invokeai", "flux", "lora_unet_final_layer_linear", ".lora_down.weight", ".lora_up.weight", IGNORED),
    ("invokeai", "flux", "diffusion_model.double_blocks.0.img_attn.proj", ".lora_A.weight", ".lora_B.weight", READ),
    ("invokeai", "flux", "transformer.transformer_blocks.0.attn.to_q", ".lora_A.weight", ".lora_B.weight", REFUSED),
    # OneTrainer
    ("onetrainer", "sd15", f"lora_unet_{Q}", ".lora_down.weight", ".lora_up.weight", READ),
    ("onetrainer", "sd15", f"unet.{DOTTED_Q}", ".lora_A.weight", ".lora_B.weight", READ),
    (
        "onetrainer",
        "flux",
        "lora_transformer_transformer_blocks_0_attn_to_q",
        ".lora_down.weight",
        ".lora_up.weight",
        READ,
    ),
    (
        "onetrainer",
        "sd15",
        f"text_encoder.{CLIP}",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        REFUSED,
    ),
    ("onetrainer", "flux", "lycoris_transformer_blocks_0_attn_to_q", ".lora_down.weight", ".lora_up.weight", READ),
    ("onetrainer", "flux", "double_blocks.0.img_attn.proj", ".lora_down.weight", ".lora_up.weight", READ),
    # The newer layouts, whatever a file is taken for
    ("comfyui", "wan", "lora_unet_blocks_0_self_attn_q", ".lora_down.weight", ".lora_up.weight", READ),
    ("comfyui", "wan", "lora_unet_blocks_0_attn1_to_q", ".lora_down.weight", ".lora_up.weight", IGNORED),
    ("comfyui", "wan", "lora_unet__blocks_0_self_attn_q", ".lora_down.weight", ".lora_up.weight", IGNORED),
    ("comfyui", "wan", "lora_unet__blocks_0_cross_attn_k", ".lora_down.weight", ".lora_up.weight", READ),
    ("comfyui", "z-image", "diffusion_model.layers.0.attention.to_q", ".lora_A.weight", ".lora_B.weight", READ),
    ("comfyui", "flux", "diffusion_model.transformer_blocks.0.attn.to_q", ".lora_A.weight", ".lora_B.weight", IGNORED),
    ("comfyui", "sd15", f"lycoris_{Q}", ".lora_down.weight", ".lora_up.weight", READ),
    ("comfyui", "flux", "double_blocks.0.img_attn.proj", ".lora_A.weight", ".lora_B.weight", IGNORED),
    ("invokeai", "flux", "transformer.double_blocks.0.img_attn.qkv.0", ".lora_down.weight", ".lora_up.weight", READ),
    ("invokeai", "flux", "transformer.double_blocks.0.img_attn.proj", ".lora_down.weight", ".lora_up.weight", IGNORED),
    (
        "diffusers",
        "flux",
        "transformer.double_blocks.0.img_attn.qkv.0",
        ".lora_down.weight",
        ".lora_up.weight",
        REFUSED,
    ),
    ("a1111", "sd15", f"lycoris_{Q}", ".lora_down.weight", ".lora_up.weight", IGNORED),
    ("kohya", "sd15", f"lycoris_{Q}", ".lora_down.weight", ".lora_up.weight", IGNORED),
    # vLLM
    ("vllm", "sd15", f"lora_unet_{Q}", ".lora_down.weight", ".lora_up.weight", IGNORED),
]


def fate(name: str, architecture: str, tensors: dict[str, torch.Tensor], place: Path) -> tuple[str, float]:
    stored = {key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()}
    adapter = open_adapter(write_file(place, Bundle(stored)), architecture=architecture)
    (one,) = conform(adapter, programs()[name]).fates
    return one.outcome, one.strength


@pytest.mark.parametrize(("name", "architecture", "stem", "down", "up", "expected"), CASES)
def test_one_module(name: str, architecture: str, stem: str, down: str, up: str, expected: str, tmp_path: Path) -> None:
    tensors = {stem + down: torch.randn(2, 8), stem + up: torch.randn(8, 2)}
    assert fate(name, architecture, tensors, tmp_path / "x.safetensors")[0] == expected


FAMILIES = [
    # (program, suffixes and shapes of one module's tensors, outcome)
    ("a1111", {".diff": (8, 8)}, READ),
    ("a1111", {".diff_b": (8,)}, REFUSED),
    ("a1111", {".w_norm": (8,)}, REFUSED),
    ("a1111", {".w_norm": (8,), ".b_norm": (8,)}, READ),
    ("a1111", {".set_weight": (8, 8)}, IGNORED),
    ("a1111", {".weight": (8,), ".on_input": ()}, READ),
    ("comfyui", {".set_weight": (8, 8)}, READ),
    ("comfyui", {".w_norm": (8,)}, READ),
    ("comfyui", {".weight": (8,), ".on_input": ()}, IGNORED),
    ("kohya", {".oft_blocks": (2, 4, 4), ".alpha": ()}, IGNORED),
    ("onetrainer", {".weight": (8,), ".on_input": ()}, REFUSED),
    ("invokeai", {".weight": (8,), ".on_input": ()}, READ),
    ("invokeai", {".oft_blocks": (2, 4, 4), ".alpha": ()}, REFUSED),
]


@pytest.mark.parametrize(("name", "suffixes", "expected"), FAMILIES)
def test_one_module_of_another_kind(
    name: str, suffixes: dict[str, tuple[int, ...]], expected: str, tmp_path: Path
) -> None:
    tensors = {f"lora_unet_{Q}{suffix}": torch.zeros(shape) for suffix, shape in suffixes.items()}
    assert fate(name, "sd15", tensors, tmp_path / "x.safetensors")[0] == expected


def test_sd_scripts_own_oft(tmp_path: Path) -> None:
    """Has a prefix of its own."""
    tensors = {f"oft_unet_{Q}.oft_blocks": torch.zeros(2, 4, 4), f"oft_unet_{Q}.alpha": torch.tensor(0.0)}
    assert fate("kohya", "sd15", tensors, tmp_path / "x.safetensors")[0] == READ


MORE = [
    # (program, architecture, stem, more tensors beside lora_down and lora_up of rank 2, outcome, strength)
    ("comfyui", "sd15", f"lora_unet_{Q}", {".dora_scale": (1, 8)}, READ, 1.0),
    ("comfyui", "sd15", f"lora_unet_{Q}", {".dora_scale": (8, 1)}, CHANGED, 1.0),
    ("comfyui", "sd15", f"lora_unet_{Q}", {".lora_magnitude_vector": (8,)}, CHANGED, 1.0),
    ("comfyui", "sd15", f"lora_unet_{Q}", {".alpha": ()}, READ, 1.0),
    ("comfyui", "flux", "diffusion_model.single_blocks.0.linear2", {".diff_b": (8,)}, READ, 1.0),
    ("comfyui", "flux", "diffusion_model.single_blocks.0.linear2", {".lora_B.bias": (8,)}, CHANGED, 1.0),
    ("a1111", "sd15", f"lora_unet_{Q}", {".dora_scale": (1, 8)}, READ, 1.0),
    ("a1111", "sd15", f"lora_unet_{Q}", {".dora_scale": (8, 1)}, CHANGED, 1.0),
    ("invokeai", "sd15", f"lora_unet_{Q}", {".dora_scale": (1, 8)}, READ, 1.0),
    ("invokeai", "sd15", f"lora_unet_{Q}", {".dora_scale": (8, 1)}, CHANGED, 1.0),
    ("kohya", "sd15", f"lora_unet_{Q}", {".dora_scale": (8, 1)}, CHANGED, 1.0),
    ("kohya", "flux", "lora_unet_double_blocks_0_img_attn_proj", {".dora_scale": (8, 1), ".alpha": ()}, REFUSED, 0.0),
    ("kohya", "flux", "lora_unet_double_blocks_0_img_attn_proj", {}, REFUSED, 0.0),
    ("kohya", "flux", "lora_unet_double_blocks_0_img_attn_proj", {".alpha": ()}, READ, 1.0),
    ("onetrainer", "sd15", f"lora_unet_{Q}", {".dora_scale": (1, 8)}, READ, 1.0),
    ("onetrainer", "sd15", f"lora_unet_{Q}", {".lora_magnitude_vector": (8,)}, REFUSED, 0.0),
]


@pytest.mark.parametrize(("name", "architecture", "stem", "more", "expected", "strength"), MORE)
def test_one_module_with_more(
    name: str,
    architecture: str,
    stem: str,
    more: dict[str, tuple[int, ...]],
    expected: str,
    strength: float,
    tmp_path: Path,
) -> None:
    tensors = {f"{stem}.lora_down.weight": torch.randn(2, 8), f"{stem}.lora_up.weight": torch.randn(8, 2)}
    tensors |= {stem + suffix: torch.ones(shape) for suffix, shape in more.items()}
    assert fate(name, architecture, tensors, tmp_path / "x.safetensors") == (expected, strength)


@pytest.mark.parametrize("name", ["comfyui", "diffusers", "invokeai", "kohya", "onetrainer"])
def test_control_loras_of_flux(name: str, tmp_path: Path) -> None:
    """No prefix, biases, and the attention's norms beside the modules."""
    stems = ("img_in", "single_blocks.0.linear2", "final_layer.linear")
    tensors = {f"{stem}.lora_A.weight": torch.randn(2, 8) for stem in stems}
    tensors |= {f"{stem}.lora_B.weight": torch.randn(8, 2) for stem in stems}
    tensors |= {f"{stem}.lora_B.bias": torch.randn(8) for stem in stems}
    norm = {"single_blocks.0.norm.key_norm.scale": torch.ones(128)}
    for number, (some, reads) in enumerate((({**tensors, **norm}, ("comfyui", "invokeai")), (tensors, ()))):
        stored = {key: LazyTensor.from_torch(tensor) for key, tensor in some.items()}
        place = write_file(tmp_path / f"{number}.safetensors", Bundle(stored))
        adapter = open_adapter(place, architecture="flux")
        assert len(adapter.modules) == 3 + (len(some) > len(tensors))
        assert conform(adapter, programs()[name]).fully is (name in reads)


def test_alpha_in_the_header_is_lost_on_comfyui(tmp_path: Path) -> None:
    """And the strength says by how much."""
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.randn(4, 3072), f"{stem}.lora_B.weight": torch.randn(3072, 4)}
    stored = {key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()}
    header = {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 16}'}
    adapter = open_adapter(write_file(tmp_path / "x.safetensors", Bundle(stored, header)), architecture="flux")
    for name in ("comfyui", "onetrainer"):
        found = check(adapter, programs()[name])
        (one,) = found.conformance.fates
        assert (one.outcome, one.strength) == (CHANGED, 0.25)
        assert found.remedy is not None and f"--for {name}" in found.remedy.command
    assert check(adapter, programs()["diffusers"]).conformance.fully


@pytest.mark.parametrize("name", ["invokeai", "comfyui"])
def test_flux_in_diffusers_names_needs_its_first_blocks(name: str, tmp_path: Path) -> None:
    """InvokeAI recognises FLUX.1 by two modules; ComfyUI does not care."""
    paths = [t.path for t in architectures()["flux"].naming("transformer", "diffusers").targets]
    wanted = [path for path in sorted(paths) if re.search(r"blocks\.0\.attn\.(to_q|add_q_proj)$", path)]
    stored = {}
    for path in wanted:
        stored[f"transformer.{path}.lora_A.weight"] = LazyTensor.from_torch(torch.randn(2, 3072))
        stored[f"transformer.{path}.lora_B.weight"] = LazyTensor.from_torch(torch.randn(3072, 2))
    adapter = open_adapter(write_file(tmp_path / "x.safetensors", Bundle(stored)))
    assert conform(adapter, programs()[name]).fully
    fewer = replace(adapter, modules=adapter.modules[:1])
    assert conform(fewer, programs()[name]).fully is (name == "comfyui")
