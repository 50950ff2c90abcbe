"""FLUX.1 against diffusers itself: what it writes is read, and what is written for it is applied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from loratool.ops.convert_file import convert_file
from loratool.ops.open import open_adapter
from tests.oracles.models import (
    assert_diffusers_applies,
    assert_same,
    changes,
    dense,
    keys_of,
    kohya_file,
    load,
    metadata_of,
    parameters,
    pipeline,
    same_file,
    saved,
    shared,
    trained,
)

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"]
EVERYTHING = {
    "target_modules": r".*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|linear|linear_[12])"
    r"|.*net\.(0\.proj|2)|x_embedder|context_embedder"
}
PATTERNS = {"rank_pattern": {"attn.to_k": 2, "add_q_proj": 7}, "alpha_pattern": {"to_q": 1, "to_out.0": 9}}
ENCODER = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"], "r": 3, "lora_alpha": 6}
Configs = Mapping[str, Mapping[str, Any]]

TRAININGS: dict[str, tuple[Configs, bool]] = {
    "plain": ({"transformer": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 4}}, False),
    "alpha-forgotten": ({"transformer": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8}}, False),
    "alpha": ({"transformer": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8}, "text_encoder": ENCODER}, True),
    "patterns": ({"transformer": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 3, **PATTERNS}}, True),
    "powers-of-two": ({"transformer": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 4, **PATTERNS}}, True),
    "everything": ({"transformer": {**EVERYTHING, "r": 4, "lora_alpha": 4}}, True),
    "rslora": ({"transformer": {**EVERYTHING, "r": 4, "lora_alpha": 4, "use_rslora": True, **PATTERNS}}, True),
}
# Scales of q, k, v that are no power of two apart: one fused module has one alpha, and the factors take up the rest.
ROUNDED = {"patterns": 3e-7, "rslora": 3e-7}
each_training = pytest.mark.parametrize("name", list(TRAININGS))


def made(name: str, folder: Path) -> Path:
    """A file that diffusers writes."""
    configs, metadata = TRAININGS[name]
    pipe = pipeline("flux")
    trained(pipe, configs)
    return saved(pipe, folder, configs, metadata=metadata)


@each_training
def test_a_file_of_diffusers_is_read(name: str, tmp_path: Path) -> None:
    source = made(name, tmp_path)
    adapter = open_adapter(source)
    assert (adapter.layout, adapter.architecture.id, dict(adapter.extras)) == ("diffusers", "flux", {})
    pipe = pipeline("flux")
    before = parameters(pipe)
    load(pipe, source)
    assert_same(changes(before, parameters(pipe)), dense(adapter))


@each_training
@pytest.mark.parametrize("to", ["kohya", "comfyui", "peft"])
def test_a_file_of_diffusers_goes_there_and_back(name: str, to: str, tmp_path: Path) -> None:
    source = made(name, tmp_path)
    there = tmp_path / ("folder" if to == "peft" else "there.safetensors")
    back = tmp_path / "back.safetensors"
    convert_file(source, to, there)
    assert_same(dense(open_adapter(there)), dense(open_adapter(source)))
    convert_file(there, "diffusers", back)
    same_file(source, back, ROUNDED.get(name, 0.0) if to != "peft" else 0.0)


@each_training
def test_a_file_of_diffusers_by_way_of_fused_weights(name: str, tmp_path: Path) -> None:
    """q, k, v stacked into one module and cut again, without the memory of the original."""
    source = made(name, tmp_path)
    there, bare, out = (tmp_path / f"{i}.safetensors" for i in range(3))
    convert_file(source, "kohya", there)
    save_file(load_file(there), bare)
    convert_file(bare, "diffusers", out)
    assert_diffusers_applies(out, open_adapter(source), "flux")


def only(*parts: str) -> Any:
    return lambda stem: any(part in stem for part in parts)


KOHYA: dict[str, dict[str, Any]] = {
    "everything": {"ranks": (2, 4, 8), "alphas": (1.0, 3.0)},
    "some": {"share": 0.4, "ranks": (1, 5), "alphas": (0.5, 5.0), "seed": 1},
    "one-rank": {"share": 0.6, "alphas": (4.0,), "seed": 2},
    "fused": {"only": only("_qkv", "_linear1")},
    # `proj_out` is the end of every single block's `proj_out`, and PEFT matches listed names by their end
    "top-proj-out": {"only": only("final_layer_linear"), "alphas": (4.0,)},
    "top-proj-out-scaled": {"only": only("final_layer_linear")},
    "two-proj-outs": {"only": only("final_layer_linear", "single_blocks_1_linear2"), "ranks": (2, 4), "seed": 3},
    "final-modulation": {"only": only("final_layer_adaLN")},
    "text-encoder": {"only": only("lora_te1_")},
}


@pytest.mark.parametrize("case", list(KOHYA))
def test_diffusers_applies_what_is_made_of_kohya(case: str, tmp_path: Path) -> None:
    source, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    kohya_file(source, "flux", **KOHYA[case])
    convert_file(source, "diffusers", out, architecture="flux")
    adapter = open_adapter(source, architecture="flux")
    assert not adapter.extras
    assert_diffusers_applies(out, adapter, "flux")


def test_diffusers_applies_what_is_made_of_a_file_of_sd_scripts(tmp_path: Path) -> None:
    source, out = shared("kohya", "flux_lora.safetensors"), tmp_path / "out.safetensors"
    convert_file(source, "diffusers", out)
    assert_diffusers_applies(out, open_adapter(source), "flux")


def test_a_file_of_diffusers_0_36(tmp_path: Path) -> None:
    source = shared("diffusers-0.36", "flux_script.safetensors")
    adapter = open_adapter(source)
    assert (adapter.layout, adapter.architecture.id, dict(adapter.extras)) == ("diffusers", "flux", {})
    assert_diffusers_applies(source, adapter, "flux")
    convert_file(source, "kohya", tmp_path / "there.safetensors")
    convert_file(tmp_path / "there.safetensors", "diffusers", tmp_path / "back.safetensors")
    same_file(source, tmp_path / "back.safetensors")


@pytest.mark.parametrize("fused", [False, True])
def test_diffusers_applies_dora(fused: bool, tmp_path: Path) -> None:
    """Row-wise magnitudes are cut with their rows (trap 21)."""
    parts = ("_qkv", "_linear1") if fused else ("img_mlp_", "_mod_lin", "final_layer_linear")
    source, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    kohya_file(source, "flux", only=only(*parts), ranks=(2, 4), alphas=(1.0, 3.0), dora=True)
    convert_file(source, "diffusers", out)
    adapter = open_adapter(source)
    pipe = pipeline("flux", zero=False)
    before = parameters(pipe)
    assert load(pipe, out) == []
    expected = {}
    for module in adapter.modules:
        assert module.magnitude is not None
        weight = torch.cat([before[t.component, t.path] for t in module.targets]).double()
        moved = weight + module.delta().double()
        change = module.magnitude.load().double() * moved / moved.norm(dim=1, keepdim=True) - weight
        for target, rows in zip(module.targets, change.split(module.heights()), strict=True):
            expected[target.component, target.path] = rows
    assert_same(changes(before, parameters(pipe)), expected, tolerance=2e-6)


# -- traps that touch this model -----------------------------------------------------------------------------------


def test_trap_1_text_model_is_written(tmp_path: Path) -> None:
    kohya_file(tmp_path / "kohya.safetensors", "flux", share=0.5)
    convert_file(tmp_path / "kohya.safetensors", "diffusers", tmp_path / "out.safetensors")
    encoder = [key for key in keys_of(tmp_path / "out.safetensors") if key.startswith("text_encoder.")]
    assert encoder and all(key.startswith("text_encoder.text_model.") for key in encoder)


def test_trap_11_parts_of_a_fused_module_share_their_down(tmp_path: Path) -> None:
    source, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    kohya_file(source, "flux", only=only("double_blocks_0_img_attn_qkv"), alphas=(4.0,))
    convert_file(source, "diffusers", out, architecture="flux")
    tensors = load_file(out)
    downs = [tensors[f"transformer.transformer_blocks.0.attn.to_{part}.lora_A.weight"] for part in "qkv"]
    assert len(tensors) == 6 and all(torch.equal(down, downs[0]) for down in downs)


def test_trap_13_the_text_encoders_of_kohya(tmp_path: Path) -> None:
    """CLIP-L is `lora_te1_`, T5 `lora_te3_`. diffusers has no loader for T5: it ignores those keys in silence."""
    source, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    kohya_file(source, "flux", only=only("_qkv", "lora_te1_"))
    tensors = load_file(source)
    stem = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors |= {f"{stem}.lora_down.weight": torch.randn(4, 40), f"{stem}.lora_up.weight": torch.randn(64, 4)}
    tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, source)
    adapter = open_adapter(source)
    assert adapter.components == ("transformer", "text_encoder", "text_encoder_2") and not adapter.extras
    convert_file(source, "diffusers", out)
    t5 = [key for key in keys_of(out) if key.startswith("text_encoder_2.")]
    assert t5 == [f"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_{x}.weight" for x in "AB"]
    pipe = pipeline("flux")
    before = parameters(pipe)
    assert load(pipe, out) == []
    expected = {key: delta for key, delta in dense(adapter).items() if key[0] != "text_encoder_2"}
    assert_same(changes(before, parameters(pipe)), expected)
    assert "text_encoder_2.r" in metadata_of(out)["lora_adapter_metadata"]
