"""Stable Diffusion 1.x: UNet and CLIP-L."""

from __future__ import annotations

from functools import partial

from loratool.architectures._clip import clip_l_namings, clip_l_outline
from loratool.architectures._unet import ATTENTION_BLOCKS, EVERY_BLOCK, UNet, outline, unet_blocks, unet_namings
from loratool.architectures._vae import VAE_4, vae_namings
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.naming import Naming

UNET = UNet(widths=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), mid_depth=1, context=768, linear_projection=False)


def _unet() -> dict[str, Naming]:
    return unet_namings(UNET)


def _vae() -> dict[str, Naming]:
    return vae_namings(VAE_4)


ARCHITECTURE = Architecture(
    id="sd15",
    title="Stable Diffusion 1.x",
    components={"unet": _unet, "text_encoder": clip_l_namings},
    outlines={
        "unet": partial(unet_namings, outline(UNET)),
        "text_encoder": clip_l_outline,
    },
    writes={
        "kohya": {"unet": Voice("lora_unet_", "diffusers"), "text_encoder": Voice("lora_te_", "hf")},
        "diffusers": {"unet": Voice("unet.", "diffusers"), "text_encoder": Voice("text_encoder.", "hf")},
        "comfyui": {
            "unet": Voice("diffusion_model.", "ldm"),
            "text_encoder": Voice("text_encoders.clip_l.transformer.", "hf"),
        },
        # PEFT needs the exact path: today's CLIPTextModel has no `text_model.`, the one with projection has.
        "peft": {
            "unet": Voice("base_model.model.", "diffusers"),
            "text_encoder": Voice("base_model.model.", "hf-short"),
        },
    },
    reads={
        # Numbered in the order of traversal: the prefix is the component's, the names are put in order by the layout.
        "cloneofsimo": {"unet": (Voice("unet:", "diffusers"),), "text_encoder": (Voice("text_encoder:", "hf"),)},
        "kohya": {
            # `lycoris_` is what LyCORIS's own wrapper writes, used by SimpleTuner and old ai-toolkit.
            "unet": (Voice("lora_unet_", "ldm"), Voice("lycoris_", "diffusers")),
            "text_encoder": (
                Voice("lora_te1_", "hf"),
                Voice("lora_te_", "hf-short"),
                Voice("lora_te1_", "hf-short"),
            ),
        },
        "diffusers": {
            "unet": (Voice("", "diffusers"),),  # UNet2DConditionModel.save_attn_procs names no component
            "text_encoder": (Voice("text_encoder.", "hf-short"),),
        },
        "comfyui": {
            "unet": (Voice("model.diffusion_model.", "ldm"), Voice("", "ldm")),
            "text_encoder": (
                Voice("text_encoders.clip_l.transformer.", "hf-short"),
                Voice("clip_l.transformer.", "hf"),
            ),
        },
        "peft": {
            "unet": (Voice("base_model.model.unet.", "diffusers"),),
            "text_encoder": (
                Voice("base_model.model.", "hf"),
                Voice("base_model.model.text_encoder.", "hf"),
                Voice("base_model.model.text_encoder.", "hf-short"),
            ),
        },
    },
    checkpoints=(
        Checkpoint(
            "ldm",
            {
                "unet": Voice("model.diffusion_model.", "ldm"),
                "text_encoder": Voice("cond_stage_model.transformer.", "hf"),
            },
            {"vae": Voice("first_stage_model.", "ldm")},
        ),
        Checkpoint("ldm-unet", {"unet": Voice("", "ldm")}),
        Checkpoint(
            "diffusers",
            {"unet": Voice("", "diffusers"), "text_encoder": Voice("", "hf")},
            {"vae": Voice("", "diffusers")},
        ),
        # What transformers >= 5.6 saves.
        Checkpoint(
            "diffusers-short",
            {"unet": Voice("", "diffusers"), "text_encoder": Voice("", "hf-short")},
            {"vae": Voice("", "diffusers")},
        ),
    ),
    facts={
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    },
    beside={"vae": _vae},
    blocks=unet_blocks(UNET, (ATTENTION_BLOCKS, EVERY_BLOCK), ("text_encoder",)),
)
