"""What the scripts do that are mostly used (sd-scripts' merge into a checkpoint), as a process of its own.

    python benchmarks/_popular.py sd15|sdxl BASE LORA OUTPUT

Makes the models, loads the checkpoint into them, adds every update to the weight of its module in float32, and saves
the models' weights in fp16 as one file. The models are those of diffusers and transformers. As there, those of SDXL are
made empty and take the file's tensors, those of SD 1.5 are filled first; and all of it is done on the CPU, with or
without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from _models import CLIP_G, CLIP_L, UNETS, VAE
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Weights = dict[str, torch.Tensor]

STRENGTH = 0.8
SECOND = "conditioner.embedders.1.model."


def loaded(model: str, base: str) -> dict[str, torch.nn.Module]:
    """The prefix of a LoRA's keys -> the model with the weights of a checkpoint."""
    weights, empty = load_file(base), model == "sdxl"

    def made(make: Callable[[], torch.nn.Module], state: Callable[[torch.nn.Module], Weights]) -> torch.nn.Module:
        with init_empty_weights() if empty else nullcontext():
            one = make()
        one.load_state_dict(_as_named(one, state(one)), assign=empty)
        return one

    def text(_: torch.nn.Module) -> Weights:
        return convert_ldm_clip_checkpoint(dict(weights))

    def second(one: torch.nn.Module) -> Weights:
        return convert_open_clip_checkpoint(one, dict(weights), SECOND)

    config = UNETS[model]
    models = {
        "lora_unet": made(
            lambda: UNet2DConditionModel(**config), lambda _: convert_ldm_unet_checkpoint(dict(weights), config)
        ),
        "vae": made(lambda: AutoencoderKL(**VAE), lambda _: convert_ldm_vae_checkpoint(dict(weights), VAE)),
        "lora_te1" if empty else "lora_te": made(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)), text),
    }
    if empty:
        models["lora_te2"] = made(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)), second)
    return models


def _as_named(model: torch.nn.Module, weights: Weights) -> Weights:
    """The weights under the model's keys: some versions of transformers leave `text_model.` out."""
    short = {_short(key): weight for key, weight in weights.items()}
    return {key: short[_short(key)] for key in model.state_dict()}


def _short(key: str) -> str:
    return key.removeprefix("text_model.")


def adaptable(model: str, base: str, models: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """The name that a LoRA has for a module -> the module. In the UNet of SDXL these are the checkpoint's names."""
    with safe_open(base, "pt") as file:
        names = list(file.keys())
    origins = convert_ldm_unet_checkpoint(dict(zip(names, names, strict=True)), UNETS[model])

    def name_of(prefix: str, path: str) -> str:
        if prefix.startswith("lora_te"):
            return f"text_model.{_short(path)}"
        if model == "sdxl" and f"{path}.weight" in origins:
            return origins[f"{path}.weight"].removeprefix("model.diffusion_model.").removesuffix(".weight")
        return path

    return {
        f"{prefix}_{name_of(prefix, path)}".replace(".", "_"): module
        for prefix, one in models.items()
        for path, module in one.named_modules()
    }


def main(model: str, base: str, lora: str, output: str) -> None:
    """Adds a LoRA, and saves."""
    models, factors = loaded(model, base), load_file(lora)
    for prefix, one in models.items():
        if prefix != "vae":
            one.float()
    modules = adaptable(model, base, models)
    for stem in [key.removesuffix(".lora_down.weight") for key in factors if key.endswith(".lora_down.weight")]:
        up, down = (factors[f"{stem}.lora_{side}.weight"].float() for side in ("up", "down"))
        scale = STRENGTH * factors[f"{stem}.alpha"].item() / down.shape[0]
        weight = modules[stem].weight
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * scale
        modules[stem].weight = torch.nn.Parameter(weight + delta)
    state = {
        f"{prefix}.{key}": value.detach().clone().half().contiguous()
        for prefix, one in models.items()
        for key, value in one.state_dict().items()
    }
    save_file(state, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
