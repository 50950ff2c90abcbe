"""Small checkpoints and adapters for baking, under real names, spelled here and not by the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from loratool.core.adapter import Adapter
from loratool.core.tensor import LazyTensor
from loratool.files.safetensors import read_header, write_safetensors
from loratool.ops.open import open_adapter

Tensors = Mapping[str, Tensor]

# SD 1.5: kohya's stem and the key in a checkpoint of one file.
Q, K, V, OUT = (
    f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{x}" for x in ("q", "k", "v", "out_0")
)
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
_BLOCK = "model.diffusion_model.input_blocks.1"
KEYS: Mapping[str, str] = {
    **{
        f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{kohya}": (
            f"{_BLOCK}.1.transformer_blocks.0.attn1.to_{ldm}.weight"
        )
        for kohya, ldm in (("q", "q"), ("k", "k"), ("v", "v"), ("out_0", "out.0"))
    },
    CONV: f"{_BLOCK}.0.in_layers.2.weight",
    TEXT: "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
}
DIFFUSERS: Mapping[str, tuple[str, str]] = {
    Q: ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"),
    K: ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"),
    V: ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v.weight"),
    OUT: ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"),
    CONV: ("unet", "down_blocks.0.resnets.0.conv1.weight"),
    TEXT: ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj.weight"),
}
"""The sub-folder and key in a diffusers folder."""


def noise(*shape: int, seed: int = 0, size: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values, the same for a seed."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def save(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes tensors as they are; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lazy = {key: LazyTensor.from_torch(tensor.contiguous()) for key, tensor in tensors.items()}
    write_safetensors(path, lazy, metadata)
    return path


def load(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, in the header's order."""
    return {key: tensor.load().clone() for key, tensor in read_header(path).tensors.items()}


def factors(shape: Sequence[int], rank: int = 4, seed: int = 1, size: float = 0.1) -> tuple[Tensor, Tensor]:
    """`up` and `down` for a weight of that shape, float32."""
    up = noise(shape[0], rank, *(1,) * (len(shape) - 2), seed=seed, size=size)
    return up, noise(rank, *shape[1:], seed=seed + 1000, size=size)


def dense(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    """The update that two factors make, float64."""
    made = up.double().flatten(1) @ down.double().flatten(1) * scale
    return made.reshape(up.shape[0], *down.shape[1:])


def kohya(
    stems: Mapping[str, Sequence[int]], seed: int = 1, alpha: float = 2.0, size: float = 0.1
) -> dict[str, Tensor]:
    """A kohya file's tensors with rank 4: stem -> shape of the weight."""
    tensors: dict[str, Tensor] = {}
    for number, (stem, shape) in enumerate(stems.items()):
        up, down = factors(shape, seed=seed + 10 * number, size=size)
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def updates(tensors: Tensors, alpha: float = 2.0) -> dict[str, Tensor]:
    """The updates of a kohya file, float64, by stem."""
    stems = [key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight")]
    return {
        stem: dense(up := tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"], alpha / up.shape[1])
        for stem in stems
    }


def peft(folder: Path, tensors: Tensors, **config: object) -> Path:
    """A PEFT folder of these tensors (`base_model.model.` is put in front of their names)."""
    save(folder / "adapter_model.safetensors", {f"base_model.model.{key}": tensor for key, tensor in tensors.items()})
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder


def opened(path: Path, tensors: Tensors, architecture: str | None = None) -> Adapter:
    """The adapter in these tensors, by way of a file."""
    return open_adapter(save(path, tensors), architecture=architecture)
