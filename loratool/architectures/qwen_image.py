"""Qwen-Image, with Edit, Edit-2509 and Edit-2511 (the same weights' names and shapes), and Layered."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._dit import Shape, dit_blocks, dit_voices, same_namings
from loratool.core.architecture import Architecture, Variant
from loratool.core.naming import Naming


class QwenImageTransformer(NamedTuple):
    """The sizes of the transformer. `layered`: it is told which images are layers."""

    blocks: int = 60
    width: int = 3072
    head: int = 128
    channels: int = 64
    context: int = 3584
    time: int = 256
    layered: bool = False


def _shapes(spec: QwenImageTransformer) -> Iterator[tuple[str, Shape]]:
    width, mlp = spec.width, 4 * spec.width
    yield "img_in", (width, spec.channels)
    yield "txt_norm", (spec.context,)
    yield "txt_in", (width, spec.context)
    yield "time_text_embed.timestep_embedder.linear_1", (width, spec.time)
    yield "time_text_embed.timestep_embedder.linear_2", (width, width)
    if spec.layered:
        yield "time_text_embed.addition_t_embedding", (2, width)
    for index in range(spec.blocks):
        block = f"transformer_blocks.{index}"
        for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield f"{block}.attn.{part}", (width, width)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{block}.attn.{norm}", (spec.head,)
        for stream in ("img", "txt"):
            yield f"{block}.{stream}_mod.1", (6 * width, width)
            yield f"{block}.{stream}_mlp.net.0.proj", (mlp, width)
            yield f"{block}.{stream}_mlp.net.2", (width, mlp)
    yield "norm_out.linear", (2 * width, width)
    yield "proj_out", (spec.channels, width)


def transformer_namings(spec: QwenImageTransformer) -> dict[str, Naming]:
    """The naming `diffusers`: Qwen-Image was published in it, and all programs use it."""
    return same_namings(dict(_shapes(spec)))


def _transformer() -> dict[str, Naming]:
    return transformer_namings(QwenImageTransformer())


def _layered() -> dict[str, Naming]:
    return transformer_namings(QwenImageTransformer(layered=True))


VOICES = dit_voices("diffusers")

ARCHITECTURE = Architecture(
    id="qwen-image",
    title="Qwen-Image",
    components={"transformer": _transformer},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={"transformer": partial(transformer_namings, QwenImageTransformer(blocks=1))},
    facts={
        "ss_network_module": "networks.lora_qwen_image",
        "ss_base_model_version": "qwen_image",
        "modelspec.architecture": "Qwen-Image/lora",
    },
    blocks=dit_blocks({"transformer_blocks.": ("B", 60)}, ("norm_out.", "proj_out")),
    variants=(
        Variant(
            "Qwen-Image Layered",
            {"transformer": _layered},
            {"ss_base_model_version": "qwen_image_layered", "modelspec.architecture": "Qwen-Image-Layered/lora"},
            outlines={"transformer": partial(transformer_namings, QwenImageTransformer(blocks=1, layered=True))},
        ),
    ),
)
