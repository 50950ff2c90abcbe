"""diffusers' converters of other models: what the rules of the program `diffusers` say of spellings and alphas.

Only the conversion is run (`lora_state_dict`), on one module; a file passes if every key is then one that a model could
load: `lora_A` or `lora_B` behind the component's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from safetensors.torch import save_file

from loratool.core.adapter import Bundle
from loratool.core.registry import architectures, layouts, programs
from loratool.core.tensor import LazyTensor
from loratool.ops.conformance import CHANGED, NOT, READ, conform

MODULES: dict[str, tuple[str, str, str, str]] = {
    # architecture, and which of its spellings: (pipeline, layout, stem, path)
    "ltx-video": (
        "LTXPipeline",
        "comfyui",
        "diffusion_model.transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn1.to_q",
    ),
    "ltx2": (
        "LTX2Pipeline",
        "comfyui",
        "diffusion_model.transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn1.to_q",
    ),
    "hidream": (
        "HiDreamImagePipeline",
        "comfyui",
        "diffusion_model.double_stream_blocks.0.block.attn1.to_q",
        "double_stream_blocks.0.block.attn1.to_q",
    ),
    "krea2": ("Krea2Pipeline", "comfyui", "diffusion_model.blocks.0.attn.wq", "transformer_blocks.0.attn.to_q"),
    "qwen-image": (
        "QwenImagePipeline",
        "comfyui",
        "diffusion_model.transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_q",
    ),
    "wan": ("WanPipeline", "comfyui", "diffusion_model.blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
    "z-image": ("ZImagePipeline", "comfyui", "diffusion_model.layers.0.attention.to_q", "layers.0.attention.to_q"),
    "sd3": (
        "StableDiffusion3Pipeline",
        "diffusers",
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_q",
    ),
    "sana": (
        "SanaPipeline",
        "diffusers",
        "transformer.transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn1.to_q",
    ),
    "chroma": (
        "ChromaPipeline",
        "diffusers",
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_q",
    ),
    "qwen-image, bare": ("QwenImagePipeline", "diffusers", *2 * ("transformer_blocks.0.attn.to_q",)),
    "z-image, bare": ("ZImagePipeline", "diffusers", *2 * ("layers.0.attention.to_q",)),
    "flux2": (
        "Flux2Pipeline",
        "ai-toolkit",
        "diffusion_model.double_blocks.0.img_attn.proj",
        "transformer_blocks.0.attn.to_out.0",
    ),
    "wan, flattened": ("WanPipeline", "musubi", "lora_unet_blocks_0_self_attn_q", "blocks.0.attn1.to_q"),
    "wan, doubled": ("WanPipeline", "musubi", "lora_unet__blocks_0_self_attn_q", "blocks.0.attn1.to_q"),
    "wan, split": ("WanPipeline", "musubi", "lora_unet_blocks_0_attn1_to_q", "blocks.0.attn1.to_q"),
    "wan, wrapped": ("WanPipeline", "lycoris", "lycoris_blocks_0_attn1_to_q", "blocks.0.attn1.to_q"),
    "qwen-image, flattened": (
        "QwenImagePipeline",
        "musubi",
        "lora_unet_transformer_blocks_0_attn_to_q",
        "transformer_blocks.0.attn.to_q",
    ),
    "z-image, flattened": ("ZImagePipeline", "musubi", "lora_unet_layers_0_attention_to_q", "layers.0.attention.to_q"),
    "flux2, flattened": (
        "Flux2Pipeline",
        "musubi",
        "lora_unet_double_blocks_0_img_attn_proj",
        "transformer_blocks.0.attn.to_out.0",
    ),
    "krea2, flattened": ("Krea2Pipeline", "musubi", "lora_unet_blocks_0_attn_wq", "transformer_blocks.0.attn.to_q"),
    "hunyuan-video, flattened": (
        "HunyuanVideoPipeline",
        "musubi",
        "lora_unet_double_blocks_0_img_attn_proj",
        "transformer_blocks.0.attn.to_out.0",
    ),
}


def passes(pipeline: Any, tensors: dict[str, torch.Tensor], path: Path) -> bool:
    save_file(tensors, path)
    try:
        found = pipeline.lora_state_dict(str(path))
    except Exception:  # whatever the converter raises
        return False
    state = dict(found[0] if isinstance(found, tuple) else found)
    if pipeline is diffusers.ChromaPipeline:  # FLUX.1's loader does not mind what is left over
        state.pop(next((key for key in state if key.endswith(".alpha")), ""), None)
    ends = (".lora_A.weight", ".lora_B.weight")
    return bool(state) and all(key.startswith("transformer.") and key.endswith(ends) for key in state)


@pytest.mark.parametrize("alpha", [None, 2.0], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("letters", [True, False], ids=["lora_A", "lora_down"])
@pytest.mark.parametrize("spelling", MODULES)
def test_spellings_and_alphas(spelling: str, letters: bool, alpha: float | None, tmp_path: Path) -> None:
    name, layout, stem, path = MODULES[spelling]
    down, up = ("lora_A", "lora_B") if letters else ("lora_down", "lora_up")
    tensors = {f"{stem}.{down}.weight": torch.randn(4, 64), f"{stem}.{up}.weight": torch.randn(64, 4)}
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    stored = {key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()}
    architecture = architectures()[spelling.partition(",")[0]]
    adapter = layouts()[layout].read(Bundle(stored), architecture)
    assert [target.path for module in adapter.modules for target in module.targets] == [path]
    said = conform(adapter, programs()["diffusers"]).counts
    loads = passes(getattr(diffusers, name), tensors, tmp_path / "x.safetensors")
    assert bool(said[READ] + said[CHANGED]) is loads


LAYERS = (*(f"{kind}_attn_{part}" for kind in ("self", "cross") for part in "qkvo"), "ffn_0", "ffn_2")
IMAGE = ("cross_attn_k_img", "cross_attn_v_img")


def flattened(*blocks: tuple[int, tuple[str, ...]], alpha: bool = True, more: tuple[str, ...] = ()) -> list[str]:
    """The keys of a file of musubi-tuner for Wan: layers of blocks, and more modules."""
    stems = [f"lora_unet_blocks_{number}_{layer}" for number, layers in blocks for layer in layers]
    ends = (".lora_down.weight", ".lora_up.weight", *((".alpha",) if alpha else ()))
    return [f"{stem}{end}" for stem in (*stems, *(f"lora_unet_{name}" for name in more)) for end in ends]


WAN = {
    "whole blocks": (flattened((0, LAYERS), (1, LAYERS)), True),
    "with the image's": (flattened((0, (*LAYERS, *IMAGE)), (1, (*LAYERS, *IMAGE))), True),
    "with half of the image's": (flattened((0, (*LAYERS, IMAGE[0]))), False),
    "the image's in one block": (flattened((0, (*LAYERS, *IMAGE)), (1, LAYERS)), False),
    "attention only": (flattened((0, LAYERS[:8]), (1, LAYERS[:8])), False),
    "a block with less": (flattened((0, LAYERS), (1, LAYERS[:9])), False),
    "a block left out": (flattened((0, LAYERS), (2, LAYERS)), False),
    "the first left out": (flattened((1, LAYERS), (2, LAYERS)), False),
    "no alpha": (flattened((0, LAYERS), alpha=False), False),
    "modules outside the blocks": (flattened((0, LAYERS), more=("head_head",)), False),
    "DoRA": ([*flattened((0, LAYERS)), "lora_unet_blocks_0_ffn_0.dora_scale"], False),
}


@pytest.mark.parametrize("name", WAN)
def test_wan_of_musubi(name: str, tmp_path: Path) -> None:
    keys, expected = WAN[name]
    ends = {"down.weight": torch.randn(4, 64), "up.weight": torch.randn(64, 4), ".alpha": torch.tensor(2.0)}
    made = {key: next((t for end, t in ends.items() if key.endswith(end)), torch.ones(64, 1)).clone() for key in keys}
    adapter = layouts()["musubi"].read(
        Bundle({key: LazyTensor.from_torch(tensor) for key, tensor in made.items()}), architectures()["wan"]
    )
    assert not adapter.extras
    assert passes(diffusers.WanPipeline, made, tmp_path / "x.safetensors") is expected
    assert (conform(adapter, programs()["diffusers"]).verdict != NOT) is expected


def control_lora() -> dict[str, torch.Tensor]:
    """All keys of one of BFL's: every linear layer with a bias, every norm of the attention, no prefix."""
    tensors: dict[str, torch.Tensor] = {}
    for name, targets in architectures()["flux"].naming("transformer", "bfl").items():
        shape = (sum(target.rows for target in targets), *targets[0].shape[1:])
        if len(shape) == 1:
            tensors[f"{name}.scale"] = torch.zeros(1).expand(shape)
        else:
            tensors[f"{name}.lora_A.weight"] = torch.zeros(1).expand(2, shape[1])
            tensors[f"{name}.lora_B.weight"] = torch.zeros(1).expand(shape[0], 2)
            tensors[f"{name}.lora_B.bias"] = torch.zeros(1).expand(shape[0])
    return tensors


def without(tensors: dict[str, torch.Tensor], expression: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not re.search(expression, key)}


WITHOUT = (
    *("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1", "time_in.in_layer"),
    *("vector_in.out_layer", "guidance_in.in_layer", "guidance_in", "query_norm", "key_norm"),
    *("double_blocks.18", "single_blocks.37", "double_blocks.7", "single_blocks.0", "single_blocks"),
    *(f"double_blocks.3.{one}" for one in ("img_mod.lin", "txt_attn.qkv", "img_attn.proj", "txt_mlp.0", "img_mlp.2")),
    *("double_blocks.0.txt_attn.norm.query_norm", "double_blocks.18.img_attn.norm.key_norm"),
    *(f"single_blocks.9.{one}" for one in ("linear1", "linear2", "modulation.lin", "norm.query_norm", "norm.key_norm")),
)


@pytest.mark.parametrize("left_out", [None, *WITHOUT])
def test_control_loras(left_out: str | None) -> None:
    """BFL's: nothing may be missing, but the guidance."""
    tensors = control_lora()
    if left_out is not None:
        tensors = without(tensors, rf"(^|\.){re.escape(left_out)}\.")
        assert tensors.keys() < control_lora().keys()
    adapter = layouts()["native"].read(
        Bundle({key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()}), architectures()["flux"]
    )
    assert not adapter.extras
    try:
        found = diffusers.FluxControlPipeline.lora_state_dict(dict(tensors))
        loads = all(key.startswith("transformer.") for key in found)
    except KeyError:
        loads = False
    said = conform(adapter, programs()["diffusers"])
    assert (said.verdict != NOT) is loads is (left_out in (None, "guidance_in"))


def test_a_control_lora_with_its_last_modulation_garbled() -> None:
    """Its rows are swapped as they should be, and with them the halves of lora_A, as they should not be."""
    tensors, stem = control_lora(), "final_layer.adaLN_modulation.1"
    tensors |= {f"{stem}.lora_A.weight": torch.randn(2, 3072), f"{stem}.lora_B.weight": torch.randn(6144, 2)}
    adapter = layouts()["native"].read(
        Bundle({key: LazyTensor.from_torch(tensor) for key, tensor in tensors.items()}), architectures()["flux"]
    )
    changed = [fate for fate in conform(adapter, programs()["diffusers"]).fates if fate.outcome == CHANGED]
    assert [fate.targets for fate in changed] == [("norm_out.linear:shift", "norm_out.linear:scale")]
    found = diffusers.FluxControlPipeline.lora_state_dict(tensors)
    down, up = (found[f"transformer.norm_out.linear.lora_{letter}.weight"] for letter in "AB")
    module = next(one for one in adapter.modules if one.targets[0].path.startswith("norm_out"))
    right = torch.cat(module.delta().chunk(2)[::-1])  # diffusers stacks scale, shift
    assert not torch.allclose(up @ down, right, atol=1e-2)
    torch.testing.assert_close(up @ torch.cat(down.chunk(2)[::-1]), right)
