"""Stable Diffusion 2.0 and 2.1: UNet and OpenCLIP ViT-H."""

from __future__ import annotations

from functools import partial

from loratool.architectures._clip import ClipText, open_clip_namings
from loratool.architectures._unet import ATTENTION_BLOCKS, EVERY_BLOCK, UNet, outline, unet_blocks, unet_namings
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.naming import Naming

UNET = UNet(widths=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), mid_depth=1, context=1024, linear_projection=True)

CLIP_H = ClipText(layers=23, width=1024, mlp=4096)
"""OpenCLIP's ViT-H/14 up to the last layer but one, whose output is what the UNet was trained with. Checkpoints in
OpenCLIP's names hold the 24th layer and a projection, too, which nothing uses."""


def _unet() -> dict[str, Naming]:
    return unet_namings(UNET)


def _text_encoder() -> dict[str, Naming]:
    return open_clip_namings(CLIP_H, "text_encoder")


ARCHITECTURE = Architecture(
    id="sd21",
    title="Stable Diffusion 2.x",
    components={"unet": _unet, "text_encoder": _text_encoder},
    outlines={
        "unet": partial(unet_namings, outline(UNET)),
        "text_encoder": partial(open_clip_namings, CLIP_H._replace(layers=1), "text_encoder"),
    },
    writes={
        "kohya": {"unet": Voice("lora_unet_", "diffusers"), "text_encoder": Voice("lora_te_", "hf")},
        "diffusers": {"unet": Voice("unet.", "diffusers"), "text_encoder": Voice("text_encoder.", "hf")},
        "comfyui": {
            "unet": Voice("diffusion_model.", "ldm"),
            "text_encoder": Voice("text_encoders.clip_h.transformer.", "hf"),
        },
        # PEFT needs the exact path: today's CLIPTextModel has no `text_model.`.
        "peft": {
            "unet": Voice("base_model.model.", "diffusers"),
            "text_encoder": Voice("base_model.model.", "hf-short"),
        },
    },
    reads={
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
                Voice("text_encoders.clip_h.transformer.", "hf-short"),
                Voice("clip_h.transformer.", "hf"),
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
                "text_encoder": Voice("cond_stage_model.model.", "openclip"),
            },
        ),
        Checkpoint("ldm-unet", {"unet": Voice("", "ldm")}),
        Checkpoint("diffusers", {"unet": Voice("", "diffusers"), "text_encoder": Voice("", "hf")}),
        # What transformers >= 5.6 saves.
        Checkpoint("diffusers-short", {"unet": Voice("", "diffusers"), "text_encoder": Voice("", "hf-short")}),
    ),
    facts={"ss_v2": "True"},  # 2.0 and 2.1, with and without v-prediction, have names of their own
    blocks=unet_blocks(UNET, (ATTENTION_BLOCKS, EVERY_BLOCK), ("text_encoder",)),
    kin="sd15",
)
