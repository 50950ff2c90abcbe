"""Stable Diffusion 3 and 3.5: the transformer, CLIP-L, OpenCLIP bigG and T5-XXL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._clip import CLIP_G, CLIP_L, clip_namings, open_clip_namings
from loratool.architectures._dit import CLIP_G as CLIP_G_VOICES
from loratool.architectures._dit import (
    CLIP_L_PROJECTED,
    T5,
    Row,
    dit_blocks,
    dit_namings,
    dit_voices,
    fused,
    row,
    swapped,
)
from loratool.architectures._t5 import T5_XXL, t5_namings
from loratool.core.architecture import Architecture, Namings, Variant
from loratool.core.blocks import Blocks
from loratool.core.naming import Naming

HEAD = 64


class SD3Transformer(NamedTuple):
    """The sizes of a transformer. The first `dual` blocks have a second attention."""

    blocks: int
    width: int
    dual: int = 0
    qk_norm: bool = True
    channels: int = 16
    context: int = 4096
    pooled: int = 2048
    time: int = 256


MEDIUM = SD3Transformer(blocks=24, width=1536, qk_norm=False)
MEDIUM_35 = SD3Transformer(blocks=24, width=1536, dual=13)
LARGE_35 = SD3Transformer(blocks=38, width=2432)


def _rows(spec: SD3Transformer) -> Iterator[Row]:
    width, time_text = spec.width, "time_text_embed"
    yield row("x_embedder.proj", "pos_embed.proj", width, spec.channels, 2, 2)
    for native, embedder, size in (("t", "timestep", spec.time), ("y", "text", spec.pooled)):
        yield row(f"{native}_embedder.mlp.0", f"{time_text}.{embedder}_embedder.linear_1", width, size)
        yield row(f"{native}_embedder.mlp.2", f"{time_text}.{embedder}_embedder.linear_2", width, width)
    yield row("context_embedder", "context_embedder", width, spec.context)
    for index in range(spec.blocks):
        block, path = f"joint_blocks.{index}", f"transformer_blocks.{index}"
        yield from _image_stream(f"{block}.x_block", path, spec, index < spec.dual)
        yield from _text_stream(f"{block}.context_block", path, spec, index == spec.blocks - 1)
    yield row("final_layer.linear", "proj_out", 4 * spec.channels, width)
    yield swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width, width)


def _image_stream(name: str, path: str, spec: SD3Transformer, dual: bool) -> Iterator[Row]:
    width = spec.width
    yield row(f"{name}.adaLN_modulation.1", f"{path}.norm1.linear", (9 if dual else 6) * width, width)
    for attention in ("attn", "attn2") if dual else ("attn",):
        inner = f"{path}.{attention}"
        yield fused(f"{name}.{attention}.qkv", (f"{inner}.to_{part}" for part in "qkv"), width, width)
        yield row(f"{name}.{attention}.proj", f"{inner}.to_out.0", width, width)
        if spec.qk_norm:
            yield row(f"{name}.{attention}.ln_q", f"{inner}.norm_q", HEAD)
            yield row(f"{name}.{attention}.ln_k", f"{inner}.norm_k", HEAD)
    yield from _mlp(f"{name}.mlp", f"{path}.ff", width)


def _text_stream(name: str, path: str, spec: SD3Transformer, last: bool) -> Iterator[Row]:
    """The last block makes keys and values of the text only: no output, no MLP, and a modulation of two parts."""
    width, norm = spec.width, f"{path}.norm1_context.linear"
    if last:
        yield swapped(f"{name}.adaLN_modulation.1", norm, width, width)
    else:
        yield row(f"{name}.adaLN_modulation.1", norm, 6 * width, width)
    yield fused(f"{name}.attn.qkv", (f"{path}.attn.add_{part}_proj" for part in "qkv"), width, width)
    if spec.qk_norm:
        yield row(f"{name}.attn.ln_q", f"{path}.attn.norm_added_q", HEAD)
        yield row(f"{name}.attn.ln_k", f"{path}.attn.norm_added_k", HEAD)
    if not last:
        yield row(f"{name}.attn.proj", f"{path}.attn.to_add_out", width, width)
        yield from _mlp(f"{name}.mlp", f"{path}.ff_context", width)


def _mlp(name: str, path: str, width: int) -> Iterator[Row]:
    yield row(f"{name}.fc1", f"{path}.net.0.proj", 4 * width, width)
    yield row(f"{name}.fc2", f"{path}.net.2", width, 4 * width)


def transformer_namings(spec: SD3Transformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native` (q, k, v fused)."""
    return dit_namings(_rows(spec))


def _transformer(spec: SD3Transformer) -> Callable[[], Namings]:
    return partial(transformer_namings, spec)


def _text_encoder() -> dict[str, Naming]:
    return clip_namings(CLIP_L._replace(projection=768), "text_encoder")


def _text_encoder_2() -> dict[str, Naming]:
    return open_clip_namings(CLIP_G, "text_encoder_2")


def _text_encoder_3() -> dict[str, Naming]:
    return t5_namings(T5_XXL, "text_encoder_3")


def _blocks(spec: SD3Transformer) -> Blocks:
    encoders = {"text_encoder": "CLIPL", "text_encoder_2": "CLIPG", "text_encoder_3": "T5"}
    return dit_blocks({"transformer_blocks.": ("J", spec.blocks)}, ("norm_out.", "proj_out"), encoders)


VOICES = dit_voices(
    "native",
    encoders={"text_encoder": CLIP_L_PROJECTED, "text_encoder_2": CLIP_G_VOICES, "text_encoder_3": T5},
)

ARCHITECTURE = Architecture(
    id="sd3",
    title="Stable Diffusion 3.5 Large",
    components={
        "transformer": _transformer(LARGE_35),
        "text_encoder": _text_encoder,
        "text_encoder_2": _text_encoder_2,
        "text_encoder_3": _text_encoder_3,
    },
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={
        "transformer": _transformer(LARGE_35._replace(blocks=2)),
        "text_encoder": partial(clip_namings, CLIP_L._replace(layers=1, projection=768), "text_encoder"),
        "text_encoder_2": partial(open_clip_namings, CLIP_G._replace(layers=1), "text_encoder_2"),
        "text_encoder_3": partial(t5_namings, T5_XXL._replace(layers=1), "text_encoder_3"),
    },
    facts={"ss_network_module": "networks.lora_sd3", "modelspec.architecture": "stable-diffusion-3-5-large/lora"},
    blocks=_blocks(LARGE_35),
    variants=(
        Variant(
            "Stable Diffusion 3 Medium",
            {"transformer": _transformer(MEDIUM)},
            {"modelspec.architecture": "stable-diffusion-3-medium/lora"},
            _blocks(MEDIUM),
            {"transformer": _transformer(MEDIUM._replace(blocks=2))},
        ),
        Variant(
            "Stable Diffusion 3.5 Medium",
            {"transformer": _transformer(MEDIUM_35)},
            {"modelspec.architecture": "stable-diffusion-3-5-medium/lora"},
            _blocks(MEDIUM_35),
            {"transformer": _transformer(MEDIUM_35._replace(blocks=3, dual=1))},
        ),
    ),
)
