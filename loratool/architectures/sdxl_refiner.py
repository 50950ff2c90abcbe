"""Stable Diffusion XL refiner: UNet and OpenCLIP bigG."""

from __future__ import annotations

from functools import partial

from loratool.architectures._clip import CLIP_G, open_clip_namings
from loratool.architectures._unet import EVERY_BLOCK, UNet, outline, unet_blocks, unet_namings
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.naming import Naming

UNET = UNet(
    widths=(384, 768, 1536, 1536), depths=(0, 4, 4, 0), mid_depth=4, context=1280, linear_projection=True, added=2560
)


def _unet() -> dict[str, Naming]:
    return unet_namings(UNET)


def _text_encoder_2() -> dict[str, Naming]:
    return open_clip_namings(CLIP_G, "text_encoder_2")


ARCHITECTURE = Architecture(
    id="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    components={"unet": _unet, "text_encoder_2": _text_encoder_2},
    outlines={
        "unet": partial(unet_namings, outline(UNET)),
        "text_encoder_2": partial(open_clip_namings, CLIP_G._replace(layers=1), "text_encoder_2"),
    },
    writes={
        # The encoder is `lora_te_` to ComfyUI, the one program that loads such files.
        "kohya": {"unet": Voice("lora_unet_", "ldm"), "text_encoder_2": Voice("lora_te_", "hf")},
        "diffusers": {"unet": Voice("unet.", "diffusers"), "text_encoder_2": Voice("text_encoder_2.", "hf")},
        "comfyui": {
            "unet": Voice("diffusion_model.", "ldm"),
            "text_encoder_2": Voice("text_encoders.clip_g.transformer.", "hf"),
        },
        "peft": {
            "unet": Voice("base_model.model.", "diffusers"),
            "text_encoder_2": Voice("base_model.model.", "hf"),
        },
    },
    reads={
        "kohya": {
            "unet": (Voice("lora_unet_", "diffusers"), Voice("lycoris_", "diffusers")),
            "text_encoder_2": (Voice("lora_te_", "hf-short"), Voice("lora_te2_", "hf"), Voice("lora_te2_", "hf-short")),
        },
        "diffusers": {
            "unet": (Voice("", "diffusers"),),
            "text_encoder_2": (Voice("text_encoder_2.", "hf-short"),),
        },
        "comfyui": {
            "unet": (Voice("model.diffusion_model.", "ldm"), Voice("", "ldm")),
            "text_encoder_2": (
                Voice("text_encoders.clip_g.transformer.", "hf-short"),
                Voice("clip_g.transformer.", "hf"),
            ),
        },
        "peft": {
            "unet": (Voice("base_model.model.unet.", "diffusers"),),
            "text_encoder_2": (
                Voice("base_model.model.", "hf-short"),
                Voice("base_model.model.text_encoder_2.", "hf"),
                Voice("base_model.model.text_encoder_2.", "hf-short"),
            ),
        },
    },
    checkpoints=(
        Checkpoint(
            "sgm",
            {
                "unet": Voice("model.diffusion_model.", "ldm"),
                "text_encoder_2": Voice("conditioner.embedders.0.model.", "openclip"),
            },
        ),
        Checkpoint("sgm-unet", {"unet": Voice("", "ldm")}),
        Checkpoint("diffusers", {"unet": Voice("", "diffusers"), "text_encoder_2": Voice("", "hf")}),
    ),
    facts={"ss_v2": "False", "modelspec.architecture": "stable-diffusion-xl-v1-refiner/lora"},
    blocks=unet_blocks(UNET, (EVERY_BLOCK,), ("text_encoder_2",)),
    kin="sdxl",
)
