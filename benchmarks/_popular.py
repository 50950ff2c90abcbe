"""What the scripts do that are mostly used (sd-scripts' merge into a checkpoint), as a process of its own.

    python benchmarks/_popular.py BASE LORA OUTPUT [DEVICE]

Of Stable Diffusion 1.5. Makes the models, loads the checkpoint into them, adds every update to the weight of its module
in float32, and saves the models' weights in fp16 as one file. The models are those of diffusers and transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

UNET: Mapping[str, Any] = {
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "layers_per_block": 2,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
VAE: Mapping[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
CLIP: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
STRENGTH = 0.8


def loaded(base: str, device: str) -> dict[str, torch.nn.Module]:
    """The models with the weights of a checkpoint."""
    weights = load_file(base)
    unet, vae, text = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**CLIP))
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), {**UNET, "use_linear_projection": False}))
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(weights), VAE))
    words = convert_ldm_clip_checkpoint(dict(weights))
    short = {key.removeprefix("text_model."): value for key, value in words.items()}
    own = {key: short.get(key.removeprefix("text_model.")) for key in text.state_dict()}
    text.load_state_dict({key: value for key, value in own.items() if value is not None}, strict=False)
    return {"lora_unet": unet.to(device), "vae": vae.to(device), "lora_te": text.to(device)}


def _long(prefix: str, name: str) -> str:
    """The name of a module with the part that some versions of transformers leave out."""
    return name if prefix != "lora_te" or name.startswith("text_model.") else f"text_model.{name}"


def main(base: str, lora: str, output: str, device: str = "cpu") -> None:
    """Adds a LoRA, and saves."""
    models = loaded(base, device)
    factors = load_file(lora)
    modules = {
        f"{prefix}_{_long(prefix, name)}".replace(".", "_"): module
        for prefix, model in models.items()
        for name, module in model.named_modules()
    }
    stems = [key.removesuffix(".lora_down.weight") for key in factors if key.endswith(".lora_down.weight")]
    for stem in stems:
        up, down = (factors[f"{stem}.lora_{side}.weight"].to(device).float() for side in ("up", "down"))
        scale = STRENGTH * factors[f"{stem}.alpha"].item() / down.shape[0]
        weight = modules[stem].weight
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * scale
        modules[stem].weight = torch.nn.Parameter(weight.float() + delta)
    state = {
        f"{prefix}.{key}": value.detach().clone().to("cpu").half().contiguous()
        for prefix, model in models.items()
        for key, value in model.state_dict().items()
    }
    save_file(state, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
