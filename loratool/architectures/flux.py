"""FLUX.1 (dev, schnell, Fill, Kontext, ...): the transformer, CLIP-L and T5-XXL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from loratool.architectures._clip import clip_l_namings, clip_l_outline
from loratool.architectures._flux import COMPONENT, FluxTransformer, transformer_namings
from loratool.architectures._t5 import T5_XXL, t5_namings
from loratool.architectures._vae import VAE_16, vae_namings
from loratool.core.architecture import Architecture, Checkpoint, Namings, Variant, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming


def _transformer(spec: FluxTransformer) -> Callable[[], Namings]:
    return partial(transformer_namings, spec)


def _of_more_inputs(title: str, inputs: int) -> Variant:
    spec = FluxTransformer(inputs=inputs)
    outlines = {"transformer": _transformer(spec._replace(double=1, single=1))}
    return Variant(title, {"transformer": _transformer(spec)}, outlines=outlines)


def _text_encoder_2() -> dict[str, Naming]:
    return t5_namings(T5_XXL, "text_encoder_2")


def _vae() -> dict[str, Naming]:
    return vae_namings(VAE_16)


_NUMBERED_BLOCKS = (*numbered("D", 0, 18), *numbered("S", 0, 37))
_EVERY_BLOCK = ("CLIP", "T5", "IN", *_NUMBERED_BLOCKS, "OUT")

BLOCKS = Blocks(
    labels=_EVERY_BLOCK,
    spans=(
        Span("text_encoder", "hf", "", "CLIP"),
        Span("text_encoder_2", "hf", "", "T5"),
        Span(COMPONENT, "bfl", "double_blocks.", "D{}"),
        Span(COMPONENT, "bfl", "single_blocks.", "S{}"),
        Span(COMPONENT, "bfl", "final_layer.", "OUT"),
        Span(COMPONENT, "bfl", "", "IN"),  # img_in, txt_in, time_in, vector_in, guidance_in
    ),
    # 61 values is the list of sd-webui-lora-block-weight.
    lists=(_NUMBERED_BLOCKS, _EVERY_BLOCK),
)

ARCHITECTURE = Architecture(
    id="flux",
    title="FLUX.1",
    components={
        "transformer": _transformer(FluxTransformer()),
        "text_encoder": clip_l_namings,
        "text_encoder_2": _text_encoder_2,
    },
    writes={
        "kohya": {
            "transformer": Voice("lora_unet_", "bfl"),
            "text_encoder": Voice("lora_te1_", "hf"),
            "text_encoder_2": Voice("lora_te3_", "hf"),
        },
        "diffusers": {
            "transformer": Voice("transformer.", "diffusers"),
            "text_encoder": Voice("text_encoder.", "hf"),
            "text_encoder_2": Voice("text_encoder_2.", "hf"),
        },
        "comfyui": {
            "transformer": Voice("diffusion_model.", "bfl"),
            "text_encoder": Voice("text_encoders.clip_l.transformer.", "hf"),
            "text_encoder_2": Voice("text_encoders.t5xxl.transformer.", "hf"),
        },
        # PEFT needs the exact path: today's CLIPTextModel has no `text_model.`, the one with projection has.
        "peft": {
            "transformer": Voice("base_model.model.", "diffusers"),
            "text_encoder": Voice("base_model.model.", "hf-short"),
            "text_encoder_2": Voice("base_model.model.", "hf"),
        },
        "xlabs": {"transformer": Voice("", "xlabs")},
    },
    reads={
        "xlabs": {"transformer": (Voice("diffusion_model.", "xlabs"),)},  # as ComfyUI's wrapper of x-flux saves it
        "kohya": {
            "transformer": (
                Voice("lora_unet_", "diffusers"),
                Voice("lora_transformer_", "diffusers"),  # OneTrainer
                Voice("lycoris_", "diffusers"),  # LyCORIS's own wrapper: SimpleTuner, old ai-toolkit
                Voice("lora_transformer_", "bfl"),
                Voice("lycoris_", "bfl"),
            ),
            "text_encoder": (Voice("lora_te1_", "hf-short"),),
            "text_encoder_2": (Voice("lora_te2_", "hf"),),  # OneTrainer
        },
        "diffusers": {
            "transformer": (Voice("", "diffusers"),),
            "text_encoder": (Voice("text_encoder.", "hf-short"),),
        },
        "comfyui": {
            "transformer": (
                Voice("", "bfl"),  # BFL's own control LoRAs
                Voice("diffusion_model.", "diffusers"),
                Voice("model.diffusion_model.", "diffusers"),
                Voice("model.diffusion_model.", "bfl"),
                Voice("transformer.", "omi"),  # OneTrainer
            ),
            "text_encoder": (
                Voice("text_encoders.clip_l.transformer.", "hf-short"),
                Voice("clip_l.transformer.", "hf"),
            ),
            "text_encoder_2": (Voice("t5xxl.transformer.", "hf"),),
        },
        "peft": {
            "transformer": (
                Voice("base_model.model.", "bfl"),  # fal's Kontext trainer
                Voice("base_model.model.transformer.", "diffusers"),
            ),
            "text_encoder": (
                Voice("base_model.model.", "hf"),
                Voice("base_model.model.text_encoder.", "hf"),
                Voice("base_model.model.text_encoder.", "hf-short"),
            ),
            "text_encoder_2": (Voice("base_model.model.text_encoder_2.", "hf"),),
        },
    },
    checkpoints=(
        Checkpoint("bfl", {"transformer": Voice("", "bfl")}),
        Checkpoint(
            "comfyui",
            {
                "transformer": Voice("model.diffusion_model.", "bfl"),
                "text_encoder": Voice("text_encoders.clip_l.transformer.", "hf"),
                "text_encoder_2": Voice("text_encoders.t5xxl.transformer.", "hf"),
            },
            {"vae": Voice("vae.", "ldm")},
        ),
        Checkpoint(
            "diffusers",
            {"transformer": Voice("", "diffusers"), "text_encoder": Voice("", "hf"), "text_encoder_2": Voice("", "hf")},
            {"vae": Voice("", "diffusers")},
        ),
        # What transformers >= 5.6 saves.
        Checkpoint(
            "diffusers-short",
            {
                "transformer": Voice("", "diffusers"),
                "text_encoder": Voice("", "hf-short"),
                "text_encoder_2": Voice("", "hf"),
            },
            {"vae": Voice("", "diffusers")},
        ),
    ),
    facts={
        "ss_network_module": "networks.lora_flux",
        "ss_base_model_version": "flux1",
        "modelspec.architecture": "flux-1-dev/lora",
    },
    outlines={
        "transformer": _transformer(FluxTransformer(double=1, single=1)),
        "text_encoder": clip_l_outline,
        "text_encoder_2": partial(t5_namings, T5_XXL._replace(layers=1), "text_encoder_2"),
    },
    beside={"vae": _vae},
    blocks=BLOCKS,
    variants=(
        Variant(
            "FLUX.1 schnell",
            {"transformer": _transformer(FluxTransformer(guidance=False))},
            {"modelspec.architecture": "flux-1-schnell/lora"},
            outlines={"transformer": _transformer(FluxTransformer(guidance=False, double=1, single=1))},
        ),
        _of_more_inputs("FLUX.1 Fill", 384),
        _of_more_inputs("FLUX.1 Canny / Depth", 128),
    ),
)
