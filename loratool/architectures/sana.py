"""Sana, Sana 1.5 and Sana Sprint: the transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._dit import Row, dit_blocks, dit_namings, dit_voices, fused, row
from loratool.core.architecture import Architecture, Namings, Variant
from loratool.core.blocks import Blocks
from loratool.core.naming import Naming


class SanaTransformer(NamedTuple):
    """The sizes of a transformer. Sana 1.5 and Sprint norm queries and keys; `guidance` is Sprint's embedder."""

    blocks: int
    width: int
    qk_norm: bool = False
    guidance: bool = False
    channels: int = 32
    context: int = 2304
    time: int = 256


SMALL = SanaTransformer(blocks=28, width=1152)
MIDDLE = SanaTransformer(blocks=20, width=2240)
LARGE_15 = SanaTransformer(blocks=60, width=2240, qk_norm=True)
MIDDLE_15 = MIDDLE._replace(qk_norm=True)
SPRINT = MIDDLE_15._replace(guidance=True)
SMALL_SPRINT = SMALL._replace(qk_norm=True, guidance=True)


def _rows(spec: SanaTransformer) -> Iterator[Row]:
    width = spec.width
    yield row("x_embedder.proj", "patch_embed.proj", width, spec.channels, 1, 1)
    time = "time_embed.timestep_embedder" if spec.guidance else "time_embed.emb.timestep_embedder"
    yield from _mlp("t_embedder.mlp.0", "t_embedder.mlp.2", time, width, spec.time)
    if spec.guidance:
        yield from _mlp("cfg_embedder.mlp.0", "cfg_embedder.mlp.2", "time_embed.guidance_embedder", width, spec.time)
    yield row("t_block.1", "time_embed.linear", 6 * width, width)
    yield from _mlp("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "caption_projection", width, spec.context)
    yield row("attention_y_norm", "caption_norm", width)
    for index in range(spec.blocks):
        yield from _block(f"blocks.{index}", f"transformer_blocks.{index}", spec)
    yield row("final_layer.linear", "proj_out", spec.channels, width)


def _mlp(first: str, second: str, path: str, width: int, size: int) -> Iterator[Row]:
    yield row(first, f"{path}.linear_1", width, size)
    yield row(second, f"{path}.linear_2", width, width)


def _block(name: str, path: str, spec: SanaTransformer) -> Iterator[Row]:
    width, inner = spec.width, 5 * spec.width
    yield fused(f"{name}.attn.qkv", (f"{path}.attn1.to_{part}" for part in "qkv"), width, width)
    yield row(f"{name}.attn.proj", f"{path}.attn1.to_out.0", width, width)
    yield row(f"{name}.cross_attn.q_linear", f"{path}.attn2.to_q", width, width)
    yield fused(f"{name}.cross_attn.kv_linear", (f"{path}.attn2.to_{part}" for part in "kv"), width, width)
    yield row(f"{name}.cross_attn.proj", f"{path}.attn2.to_out.0", width, width)
    for native, attention in (("attn", "attn1"), ("cross_attn", "attn2")) if spec.qk_norm else ():
        yield row(f"{name}.{native}.q_norm", f"{path}.{attention}.norm_q", width)
        yield row(f"{name}.{native}.k_norm", f"{path}.{attention}.norm_k", width)
    # A gated feed-forward of convolutions, 2.5 times as wide, values and gates in one weight.
    yield row(f"{name}.mlp.inverted_conv.conv", f"{path}.ff.conv_inverted", inner, width, 1, 1)
    yield row(f"{name}.mlp.depth_conv.conv", f"{path}.ff.conv_depth", inner, 1, 3, 3)
    yield row(f"{name}.mlp.point_conv.conv", f"{path}.ff.conv_point", width, inner // 2, 1, 1)


def transformer_namings(spec: SanaTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native` (q, k, v fused, and k, v of the text)."""
    return dit_namings(_rows(spec))


def _transformer(spec: SanaTransformer) -> Callable[[], Namings]:
    return partial(transformer_namings, spec)


def _blocks(spec: SanaTransformer) -> Blocks:
    return dit_blocks({"transformer_blocks.": ("B", spec.blocks)}, ("proj_out",))


def _variant(title: str, spec: SanaTransformer) -> Variant:
    return Variant(
        title,
        {"transformer": _transformer(spec)},
        blocks=_blocks(spec),
        outlines={"transformer": _transformer(spec._replace(blocks=1))},
    )


VOICES = dit_voices("native")

ARCHITECTURE = Architecture(
    id="sana",
    title="Sana 1.6B",
    components={"transformer": _transformer(MIDDLE)},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={"transformer": _transformer(MIDDLE._replace(blocks=1))},
    blocks=_blocks(MIDDLE),
    variants=(
        _variant("Sana 1.5 4.8B", LARGE_15),
        _variant("Sana 0.6B", SMALL),
        _variant("Sana 1.5 1.6B", MIDDLE_15),
        _variant("Sana Sprint 1.6B", SPRINT),
        _variant("Sana Sprint 0.6B", SMALL_SPRINT),
    ),
)
