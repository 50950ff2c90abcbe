"""HunyuanVideo (and FramePack, whose blocks are the same): the transformer, Llama 3 and CLIP-L."""

from __future__ import annotations

from functools import partial

from loratool.architectures._clip import CLIP_L, clip_namings
from loratool.architectures._decoder import LLAVA_LLAMA_3_8B, decoder_namings
from loratool.architectures._hunyuan import Embedder, Hunyuan, hunyuan_blocks, hunyuan_namings, mlp_embedder, outline
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
    components={
        "transformer": partial(hunyuan_namings, SPEC),
        "text_encoder": partial(decoder_namings, LLAVA_LLAMA_3_8B, "text_encoder"),
        "text_encoder_2": partial(clip_namings, CLIP_L, "text_encoder_2"),
    },
    outlines={
        "transformer": partial(hunyuan_namings, outline(SPEC)),
        "text_encoder": partial(decoder_namings, LLAVA_LLAMA_3_8B._replace(layers=1), "text_encoder"),
        "text_encoder_2": partial(clip_namings, CLIP_L._replace(layers=1), "text_encoder_2"),
    },
    writes={
        "kohya": {
            "transformer": Voice("lora_unet_", "native"),  # musubi-tuner
            # OneTrainer
            "text_encoder": Voice("lora_te1_", "hf"),
            "text_encoder_2": Voice("lora_te2_", "hf"),
        },
        "diffusers": {
            "transformer": Voice("transformer.", "diffusers"),
            "text_encoder": Voice("text_encoder.", "hf"),
            "text_encoder_2": Voice("text_encoder_2.", "hf"),
        },
        # Both ComfyUI and diffusers take the original's names for the blocks, ComfyUI its own ones everywhere.
        "comfyui": {
            "transformer": Voice("diffusion_model.", "comfyui"),
            "text_encoder": Voice("text_encoders.llama.transformer.model.", "hf"),
            "text_encoder_2": Voice("text_encoders.clip_l.transformer.", "hf"),
        },
        "peft": {
            "transformer": Voice("base_model.model.", "diffusers"),
            "text_encoder": Voice("base_model.model.", "hf"),
            "text_encoder_2": Voice("base_model.model.", "hf-short"),
        },
    },
    reads={
        "kohya": {
            "transformer": (
                Voice("lora_unet_", "comfyui"),
                Voice("lora_unet__", "diffusers"),  # VideoX-Fun
                Voice("lora_unet_", "diffusers"),  # musubi-tuner for FramePack
                Voice("lora_transformer_", "diffusers"),  # OneTrainer
                Voice("lycoris_", "diffusers"),
            )
        },
        "diffusers": {
            "transformer": (Voice("", "diffusers"),),
            "text_encoder_2": (Voice("text_encoder_2.", "hf-short"),),
        },
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
        Checkpoint(
            "diffusers",
            {"transformer": Voice("", "diffusers"), "text_encoder": Voice("", "hf"), "text_encoder_2": Voice("", "hf")},
        ),
    ),
    facts={"ss_base_model_version": "hunyuan_video", "modelspec.architecture": "hunyuan-video/lora"},
    blocks=hunyuan_blocks({"text_encoder": "LLAMA", "text_encoder_2": "CLIP"}),
    kin="flux",
)
