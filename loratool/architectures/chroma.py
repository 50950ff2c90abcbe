"""Chroma: made from FLUX.1 schnell, with one network for all modulations, and T5-XXL alone."""

from __future__ import annotations

from functools import partial

from loratool.architectures._dit import T5, dit_blocks, dit_voices
from loratool.architectures._flux import COMPONENT, FluxTransformer, transformer_namings
from loratool.architectures._t5 import T5_XXL, t5_namings
from loratool.core.architecture import Architecture, Voice
from loratool.core.naming import Naming

TRANSFORMER = FluxTransformer(guidance=False, approximator=5120)


def _transformer() -> dict[str, Naming]:
    return transformer_namings(TRANSFORMER)


def _text_encoder() -> dict[str, Naming]:
    return t5_namings(T5_XXL, "text_encoder")


VOICES = dit_voices("bfl", encoders={"text_encoder": T5})
VOICES.reads["comfyui"][COMPONENT] += (Voice("transformer.", "omi"),)  # OneTrainer

ARCHITECTURE = Architecture(
    id="chroma",
    title="Chroma",
    components={"transformer": _transformer, "text_encoder": _text_encoder},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={
        "transformer": partial(transformer_namings, TRANSFORMER._replace(double=1, single=1)),
        "text_encoder": partial(t5_namings, T5_XXL._replace(layers=1), "text_encoder"),
    },
    facts={
        "ss_network_module": "networks.lora_flux",
        "ss_base_model_version": "chroma",
        "modelspec.architecture": "chroma/lora",
    },
    blocks=dit_blocks(
        {"transformer_blocks.": ("D", 19), "single_transformer_blocks.": ("S", 38)},
        ("proj_out",),
        {"text_encoder": "T5"},
    ),
    kin="flux",
)
