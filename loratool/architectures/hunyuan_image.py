"""HunyuanImage 2.1: the transformer; adapters train nothing else."""

from __future__ import annotations

from functools import partial

from loratool.architectures._hunyuan import Hunyuan, hunyuan_blocks, hunyuan_namings, mlp_embedder, outline
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.naming import Naming
from loratool.core.target import Target

SPEC = Hunyuan(
    width=3584,
    context=3584,
    patch=(64, 1, 1),
    out=64,
    embedders=(
        mlp_embedder("time_in", "time_guidance_embed.timestep_embedder"),
        # Only the distilled model has these two.
        mlp_embedder("time_r_in", "time_guidance_embed.timestep_embedder_r"),
        mlp_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
    ),
    glyph=1472,
)


def transformer_namings(spec: Hunyuan) -> dict[str, Naming]:
    """The namings of `hunyuan_namings`, and `parallel`."""
    namings = hunyuan_namings(spec)
    return {**namings, "parallel": _parallel(namings["native"])}


def _parallel(native: Naming) -> Naming:
    """The names of the published checkpoints, made for tensor parallelism: nothing is fused but in the refiner."""
    table: dict[str, tuple[Target, ...]] = {}
    for name, targets in native.items():
        block = name.startswith(("double_blocks.", "single_blocks."))
        if block and len(targets) > 1:
            start = name.removesuffix("qkv") if name.endswith("qkv") else f"{name}_"
            table |= {f"{start}{part}": (target,) for part, target in zip(("q", "k", "v", "mlp"), targets)}
        else:
            table[f"{name}.fc" if name.endswith(".linear2") else name] = targets
    return Naming(table)


ARCHITECTURE = Architecture(
    id="hunyuan-image",
    title="HunyuanImage 2.1",
    components={"transformer": partial(transformer_namings, SPEC)},
    outlines={"transformer": partial(transformer_namings, outline(SPEC))},
    writes={
        "kohya": {"transformer": Voice("lora_unet_", "native")},  # sd-scripts
        "diffusers": {"transformer": Voice("transformer.", "diffusers")},
        "comfyui": {"transformer": Voice("diffusion_model.", "comfyui")},
        "peft": {"transformer": Voice("base_model.model.", "diffusers")},
    },
    reads={
        "kohya": {
            "transformer": (
                Voice("lora_unet_", "comfyui"),  # what sd-scripts' own script makes for ComfyUI
                Voice("lora_unet_", "diffusers"),
                Voice("lycoris_", "diffusers"),
            )
        },
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (
                Voice("diffusion_model.", "native"),
                Voice("diffusion_model.", "parallel"),
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
        Checkpoint("parallel", {"transformer": Voice("", "parallel")}),
        Checkpoint("native", {"transformer": Voice("", "native")}),
        Checkpoint("comfyui", {"transformer": Voice("model.model.", "comfyui")}),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers")}),
    ),
    facts={
        "ss_base_model_version": "hunyuan-image-2.1",
        "modelspec.architecture": "hunyuan-image-2.1/lora",
        "ss_network_module": "networks.lora_hunyuan_image",
    },
    blocks=hunyuan_blocks({}),
    kin="flux",
)
