"""diffusers' converters of other models: what the rules of the program `diffusers` say of spellings and alphas.

Only the conversion is run (`lora_state_dict`), on one module; a file passes if every key is then one that a model could
load: `lora_A` or `lora_B` behind the component's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
from safetensors.torch import save_file

from loratool.core.program import IGNORES, REFUSES, Fact, Keys, Program
from loratool.core.registry import programs

MODULES: dict[str, tuple[str, str, str, str]] = {
    # architecture: (pipeline, layout, stem, path)
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
}


def reads(program: Program, fact: Fact) -> bool:
    """Whether a program is said to read a module, whatever it leaves out or changes of it."""
    barring = (rule for rule in program.rules if rule.does in (REFUSES, IGNORES) and not rule.unread)
    return any(when.holds(fact) for when in program.reads) and not any(rule.when.holds(fact) for rule in barring)


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
@pytest.mark.parametrize("architecture", MODULES)
def test_spellings_and_alphas(architecture: str, letters: bool, alpha: float | None, tmp_path: Path) -> None:
    name, layout, stem, path = MODULES[architecture]
    down, up = ("lora_A", "lora_B") if letters else ("lora_down", "lora_up")
    tensors = {f"{stem}.{down}.weight": torch.randn(4, 64), f"{stem}.{up}.weight": torch.randn(64, 4)}
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    fact = Fact(
        layout=layout,
        layouts=(layout,),
        architecture=architecture,
        component="transformer",
        namings=("native",),
        written=(layout,),
        family="lora",
        roles={"down": (4, 64), "up": (64, 4)},
        has=frozenset({"no alpha" if alpha is None else "alpha stored"}),
        keys=tuple(tensors),
        paths=(path,),
        others=(path,),
        first=f"{stem}.{down}.weight",
        file=Keys(tuple(tensors)),
    )
    said = reads(programs()["diffusers"], fact)
    assert said is passes(getattr(diffusers, name), tensors, tmp_path / "x.safetensors")
