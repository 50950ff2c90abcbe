"""HunyuanVideo (and FramePack, whose blocks are the same): the transformer; adapters train nothing else."""

from __future__ import annotations

from functools import partial

from loratool.architectures._hunyuan import BLOCKS, Embedder, Hunyuan, hunyuan_namings, mlp_embedder, outline
from loratool.core.architecture import Architecture, Checkpoint, Voice

SPEC = Hunyuan(
    width=3072,
    context=4096,
    patch=(16, 1, 2, 2),
    out=64,
    embedders=(
        mlp_embedder("time_in", "time_text_embed.timestep_embedder"),
        Embedder("vector_in.in_layer", "vector_in.out_layer", "time_text_embed.text_embedder", 768),
        mlp_embedder("guidance_in", "time_text_embed.guidance_embedder"),
    ),
)


ARCHITECTURE = Architecture(
    id="hunyuan-video",
    title="HunyuanVideo",
    components={"transformer": partial(hunyuan_namings, SPEC)},
    outlines={"transformer": partial(hunyuan_namings, outline(SPEC))},
    writes={
        "kohya": {"transformer": Voice("lora_unet_", "native")},  # musubi-tuner
        "diffusers": {"transformer": Voice("transformer.", "diffusers")},
        # Both ComfyUI and diffusers take the original's names for the blocks, ComfyUI its own ones everywhere.
        "comfyui": {"transformer": Voice("diffusion_model.", "comfyui")},
        "peft": {"transformer": Voice("base_model.model.", "diffusers")},
    },
    reads={
        "kohya": {
            "transformer": (
                Voice("lora_unet_", "comfyui"),
                Voice("lora_unet_", "diffusers"),  # musubi-tuner for FramePack
                Voice("lora_transformer_", "diffusers"),  # OneTrainer
                Voice("lycoris_", "diffusers"),
            )
        },
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (
                Voice("diffusion_model.", "native"),
                Voice("transformer.", "native"),  # diffusion-pipe
                Voice("model.diffusion_model.", "comfyui"),
            )
        },
        "peft": {
            "transformer": (
                Voice("base_model.model.", "native"),
                Voice("base_model.model.transformer.", "diffusers"),
            )
        },
    },
    checkpoints=(
        Checkpoint("native", {"transformer": Voice("", "native")}),
        Checkpoint("comfyui", {"transformer": Voice("model.model.", "comfyui")}),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers")}),
    ),
    facts={"ss_base_model_version": "hunyuan_video", "modelspec.architecture": "hunyuan-video/lora"},
    blocks=BLOCKS,
)
