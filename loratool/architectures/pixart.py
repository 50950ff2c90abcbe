"""PixArt-Alpha and PixArt-Sigma: the transformer and T5-XXL."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._dit import T5, Row, dit_blocks, dit_namings, dit_voices, fused, row
from loratool.architectures._t5 import T5_XXL, t5_namings
from loratool.core.architecture import Architecture, Variant
from loratool.core.naming import Naming


class PixArtTransformer(NamedTuple):
    """The sizes of the transformer. `sized`: it is told the size of the picture, as Alpha of 1024 pixels is."""

    blocks: int = 28
    width: int = 1152
    channels: int = 4
    context: int = 4096
    time: int = 256
    sized: bool = False


def _rows(spec: PixArtTransformer) -> Iterator[Row]:
    width, embed = spec.width, "adaln_single.emb"
    yield row("x_embedder.proj", "pos_embed.proj", width, spec.channels, 2, 2)
    yield from _mlp("t_embedder.mlp.0", "t_embedder.mlp.2", f"{embed}.timestep_embedder", width, spec.time)
    if spec.sized:
        third = width // 3
        yield from _mlp(
            "csize_embedder.mlp.0", "csize_embedder.mlp.2", f"{embed}.resolution_embedder", third, spec.time
        )
        yield from _mlp("ar_embedder.mlp.0", "ar_embedder.mlp.2", f"{embed}.aspect_ratio_embedder", third, spec.time)
    yield row("t_block.1", "adaln_single.linear", 6 * width, width)
    yield from _mlp("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "caption_projection", width, spec.context)
    for index in range(spec.blocks):
        yield from _block(f"blocks.{index}", f"transformer_blocks.{index}", width)
    yield row("final_layer.linear", "proj_out", 8 * spec.channels, width)  # noise and variance


def _mlp(first: str, second: str, path: str, width: int, size: int) -> Iterator[Row]:
    yield row(first, f"{path}.linear_1", width, size)
    yield row(second, f"{path}.linear_2", width, width)


def _block(name: str, path: str, width: int) -> Iterator[Row]:
    yield fused(f"{name}.attn.qkv", (f"{path}.attn1.to_{part}" for part in "qkv"), width, width)
    yield row(f"{name}.attn.proj", f"{path}.attn1.to_out.0", width, width)
    yield row(f"{name}.cross_attn.q_linear", f"{path}.attn2.to_q", width, width)
    yield fused(f"{name}.cross_attn.kv_linear", (f"{path}.attn2.to_{part}" for part in "kv"), width, width)
    yield row(f"{name}.cross_attn.proj", f"{path}.attn2.to_out.0", width, width)
    yield row(f"{name}.mlp.fc1", f"{path}.ff.net.0.proj", 4 * width, width)
    yield row(f"{name}.mlp.fc2", f"{path}.ff.net.2", width, 4 * width)


def transformer_namings(spec: PixArtTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native` (q, k, v fused, and k, v of the text)."""
    return dit_namings(_rows(spec))


def _transformer() -> dict[str, Naming]:
    return transformer_namings(PixArtTransformer())


def _sized() -> dict[str, Naming]:
    return transformer_namings(PixArtTransformer(sized=True))


def _text_encoder() -> dict[str, Naming]:
    return t5_namings(T5_XXL, "text_encoder")


VOICES = dit_voices("native", encoders={"text_encoder": T5})

ARCHITECTURE = Architecture(
    id="pixart",
    title="PixArt (Sigma, Alpha)",
    components={"transformer": _transformer, "text_encoder": _text_encoder},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={
        "transformer": partial(transformer_namings, PixArtTransformer(blocks=1)),
        "text_encoder": partial(t5_namings, T5_XXL._replace(layers=1), "text_encoder"),
    },
    blocks=dit_blocks({"transformer_blocks.": ("B", 28)}, ("proj_out",), {"text_encoder": "T5"}),
    variants=(
        Variant(
            "PixArt-Alpha 1024",
            {"transformer": _sized},
            outlines={"transformer": partial(transformer_namings, PixArtTransformer(blocks=1, sized=True))},
        ),
    ),
)
