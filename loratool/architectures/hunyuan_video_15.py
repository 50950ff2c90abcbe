"""HunyuanVideo 1.5: the transformer; adapters train nothing else."""

from __future__ import annotations

from functools import partial

from loratool.architectures._hunyuan import Hunyuan, hunyuan_blocks, hunyuan_namings, mlp_embedder, outline, parallel
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.naming import Naming

SPEC = Hunyuan(
    width=2048,
    context=3584,
    patch=(65, 1, 1, 1),
    out=32,
    embedders=(mlp_embedder("time_in", "time_embed.timestep_embedder"),),
    glyph=1472,
    vision=1152,
    double=54,
    single=0,
)


def transformer_namings(spec: Hunyuan) -> dict[str, Naming]:
    """The namings `diffusers` (canonical), `native`, with nothing fused in blocks, and `comfyui`, which fuses there."""
    namings = hunyuan_namings(spec)
    return {**namings, "native": parallel(namings["native"])}


ARCHITECTURE = Architecture(
    id="hunyuan-video-15",
    title="HunyuanVideo 1.5",
    components={"transformer": partial(transformer_namings, SPEC)},
    outlines={"transformer": partial(transformer_namings, outline(SPEC))},
    writes={
        "kohya": {"transformer": Voice("lora_unet_", "native")},  # musubi-tuner
        "diffusers": {"transformer": Voice("transformer.", "diffusers")},
        "comfyui": {"transformer": Voice("diffusion_model.", "comfyui")},
        "peft": {"transformer": Voice("base_model.model.", "diffusers")},
    },
    reads={
        "kohya": {
            "transformer": (
                Voice("lora_unet_", "comfyui"),  # what musubi-tuner's own script makes for ComfyUI
                Voice("lora_unet_", "diffusers"),
                Voice("lycoris_", "diffusers"),
            )
        },
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (
                Voice("diffusion_model.", "native"),
                Voice("transformer.", "native"),
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
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers")}),
    ),
    facts={
        "ss_base_model_version": "hunyuan_video_1_5",
        "modelspec.architecture": "hunyuan-video-1.5/lora",
        "ss_network_module": "networks.lora_hv_1_5",
    },
    blocks=hunyuan_blocks(SPEC, {}),
    kin="flux",
)
