"""Stable Diffusion XL (base): UNet, CLIP-L and OpenCLIP bigG."""

from __future__ import annotations

from functools import partial

from loratool.architectures._clip import CLIP_G, clip_l_namings, clip_l_outline, open_clip_namings
from loratool.architectures._unet import ATTENTION_BLOCKS, EVERY_BLOCK, UNet, outline, unet_blocks, unet_namings
from loratool.architectures._vae import VAE_4, vae_namings
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.blocks import numbered
from loratool.core.naming import Naming

UNET = UNet(widths=(320, 640, 1280), depths=(0, 2, 10), mid_depth=10, context=2048, linear_projection=True, added=2816)


LISTS = (
    ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *numbered("OUT", 0, 5)),  # the blocks with attention
    ("BASE", *numbered("IN", 0, 8), "M00", *numbered("OUT", 0, 8)),  # all blocks
    # The lists of Stable Diffusion 1, which the extension takes for XL, too, label by label.
    ATTENTION_BLOCKS,
    EVERY_BLOCK,
)


def _unet() -> dict[str, Naming]:
    return unet_namings(UNET)


def _text_encoder_2() -> dict[str, Naming]:
    return open_clip_namings(CLIP_G, "text_encoder_2")


def _vae() -> dict[str, Naming]:
    return vae_namings(VAE_4)


ARCHITECTURE = Architecture(
    id="sdxl",
    title="Stable Diffusion XL",
    components={"unet": _unet, "text_encoder": clip_l_namings, "text_encoder_2": _text_encoder_2},
    outlines={
        "unet": partial(unet_namings, outline(UNET)),
        "text_encoder": clip_l_outline,
        "text_encoder_2": partial(open_clip_namings, CLIP_G._replace(layers=1), "text_encoder_2"),
    },
    writes={
        "kohya": {
            "unet": Voice("lora_unet_", "ldm"),
            "text_encoder": Voice("lora_te1_", "hf"),
            "text_encoder_2": Voice("lora_te2_", "hf"),
        },
        "diffusers": {
            "unet": Voice("unet.", "diffusers"),
            "text_encoder": Voice("text_encoder.", "hf"),
            "text_encoder_2": Voice("text_encoder_2.", "hf"),
        },
        "comfyui": {
            "unet": Voice("diffusion_model.", "ldm"),
            "text_encoder": Voice("text_encoders.clip_l.transformer.", "hf"),
            "text_encoder_2": Voice("text_encoders.clip_g.transformer.", "hf"),
        },
        # PEFT needs the exact path: today's CLIPTextModel has no `text_model.`, the one with projection has.
        "peft": {
            "unet": Voice("base_model.model.", "diffusers"),
            "text_encoder": Voice("base_model.model.", "hf-short"),
            "text_encoder_2": Voice("base_model.model.", "hf"),
        },
    },
    reads={
        "kohya": {
            # diffusers' own exporter to kohya keeps its block names; `lycoris_` is LyCORIS's own wrapper.
            "unet": (Voice("lora_unet_", "diffusers"), Voice("lycoris_", "diffusers")),
            "text_encoder": (Voice("lora_te1_", "hf-short"),),
            "text_encoder_2": (Voice("lora_te2_", "hf-short"),),
        },
        "diffusers": {
            "unet": (Voice("", "diffusers"),),  # UNet2DConditionModel.save_attn_procs names no component
            "text_encoder": (Voice("text_encoder.", "hf-short"),),
            "text_encoder_2": (Voice("text_encoder_2.", "hf-short"),),
        },
        "comfyui": {
            "unet": (Voice("model.diffusion_model.", "ldm"), Voice("", "ldm")),
            "text_encoder": (
                Voice("text_encoders.clip_l.transformer.", "hf-short"),
                Voice("clip_l.transformer.", "hf"),
            ),
            "text_encoder_2": (
                Voice("text_encoders.clip_g.transformer.", "hf-short"),
                Voice("clip_g.transformer.", "hf"),
            ),
        },
        "peft": {
            "unet": (Voice("base_model.model.unet.", "diffusers"),),
            "text_encoder": (
                Voice("base_model.model.", "hf"),
                Voice("base_model.model.text_encoder.", "hf"),
                Voice("base_model.model.text_encoder.", "hf-short"),
            ),
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
                "text_encoder": Voice("conditioner.embedders.0.transformer.", "hf"),
                "text_encoder_2": Voice("conditioner.embedders.1.model.", "openclip"),
            },
            {"vae": Voice("first_stage_model.", "ldm")},
        ),
        Checkpoint("sgm-unet", {"unet": Voice("", "ldm")}),
        Checkpoint(
            "diffusers",
            {"unet": Voice("", "diffusers"), "text_encoder": Voice("", "hf"), "text_encoder_2": Voice("", "hf")},
            {"vae": Voice("", "diffusers")},
        ),
        # What transformers >= 5.6 saves: only CLIPTextModel lost its prefix, the model with projection kept it.
        Checkpoint(
            "diffusers-short",
            {"unet": Voice("", "diffusers"), "text_encoder": Voice("", "hf-short"), "text_encoder_2": Voice("", "hf")},
            {"vae": Voice("", "diffusers")},
        ),
    ),
    facts={
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    },
    beside={"vae": _vae},
    blocks=unet_blocks(UNET, LISTS, ("text_encoder", "text_encoder_2")),
)
