"""What HunyuanVideo and HunyuanImage have in common: a refiner of the text, double blocks, single blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from loratool.architectures._rows import Row, fused, one, respelled, shift_and_scale, two_namings
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming


class Embedder(NamedTuple):
    """A two-layer embedder: its first and second layer, original and in diffusers, and what goes in."""

    first: str
    second: str
    path: str
    size: int


class Hunyuan(NamedTuple):
    """What tells one of these transformers from another. `glyph` is the width of ByT5's embeddings (0: none)."""

    width: int
    context: int
    patch: tuple[int, ...]
    out: int
    embedders: tuple[Embedder, ...]
    glyph: int = 0
    double: int = 20
    single: int = 40
    refiner: int = 2
    head: int = 128
    mlp_ratio: int = 4


def mlp_embedder(name: str, path: str, size: int = 256) -> Embedder:
    """An embedder whose layers are `mlp.0` and `mlp.2`, of a time step, say."""
    return Embedder(f"{name}.mlp.0", f"{name}.mlp.2", path, size)


def hunyuan_namings(spec: Hunyuan) -> dict[str, Naming]:
    """The namings `diffusers` (canonical), `native` (q, k, v and the MLP fused) and `comfyui`.

    `comfyui` fuses alike, and calls everything as in Flux.
    """
    namings = two_namings(_rows(spec))
    return {**namings, "comfyui": respelled(namings["native"], _comfyui_name, _comfyui_key)}


def outline(spec: Hunyuan) -> Hunyuan:
    """One block of each kind."""
    return spec._replace(double=1, single=1, refiner=1)


_COMFYUI = (
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("t_embedder.mlp.0", "t_embedder.in_layer"),
    ("t_embedder.mlp.2", "t_embedder.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
    ("_mod.linear", "_mod.lin"),
    (".modulation.linear", ".modulation.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    (".q_norm", ".norm.query_norm"),
    (".k_norm", ".norm.key_norm"),
)
"""From the original's names to ComfyUI's, as its loader renames them."""


def _comfyui_name(name: str) -> str:
    for old, new in _COMFYUI:
        name = name.replace(old, new)
    return name


def _comfyui_key(name: str) -> str:
    return f"{name}.scale" if name.endswith(("query_norm", "key_norm")) else f"{name}.weight"


def _rows(spec: Hunyuan) -> Iterator[Row]:
    width = spec.width
    yield one("img_in.proj", "x_embedder.proj", width, *spec.patch)
    if spec.glyph:
        yield from _glyphs(spec)
    yield from _text(spec)
    for embedder in spec.embedders:
        yield from _embedder(embedder, width)
    for index in range(spec.double):
        yield from _double_block(f"double_blocks.{index}", f"transformer_blocks.{index}", spec)
    for index in range(spec.single):
        yield from _single_block(f"single_blocks.{index}", f"single_transformer_blocks.{index}", spec)
    yield shift_and_scale("final_layer.adaLN_modulation.1", "norm_out.linear", width, width)
    yield one("final_layer.linear", "proj_out", spec.out, width)


def _embedder(embedder: Embedder, width: int) -> Iterator[Row]:
    yield one(embedder.first, f"{embedder.path}.linear_1", width, embedder.size)
    yield one(embedder.second, f"{embedder.path}.linear_2", width, width)


def _glyphs(spec: Hunyuan) -> Iterator[Row]:
    inner = 2048
    yield one("byt5_in.layernorm", "context_embedder_2.norm", spec.glyph)
    yield one("byt5_in.fc1", "context_embedder_2.linear_1", inner, spec.glyph)
    yield one("byt5_in.fc2", "context_embedder_2.linear_2", inner, inner)
    yield one("byt5_in.fc3", "context_embedder_2.linear_3", spec.width, inner)


def _text(spec: Hunyuan) -> Iterator[Row]:
    width, mlp, path = spec.width, spec.width * spec.mlp_ratio, "context_embedder"
    yield one("txt_in.input_embedder", f"{path}.proj_in", width, spec.context)
    yield from _embedder(mlp_embedder("txt_in.t_embedder", f"{path}.time_text_embed.timestep_embedder"), width)
    text = f"{path}.time_text_embed.text_embedder"
    yield from _embedder(
        Embedder("txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2", text, spec.context), width
    )
    for index in range(spec.refiner):
        name = f"txt_in.individual_token_refiner.blocks.{index}"
        block = f"{path}.token_refiner.refiner_blocks.{index}"
        yield one(f"{name}.norm1", f"{block}.norm1", width)
        yield fused(f"{name}.self_attn_qkv", (f"{block}.attn.to_{part}" for part in "qkv"), width, width)
        yield one(f"{name}.self_attn_proj", f"{block}.attn.to_out.0", width, width)
        yield one(f"{name}.norm2", f"{block}.norm2", width)
        yield one(f"{name}.mlp.fc1", f"{block}.ff.net.0.proj", mlp, width)
        yield one(f"{name}.mlp.fc2", f"{block}.ff.net.2", width, mlp)
        yield one(f"{name}.adaLN_modulation.1", f"{block}.norm_out.linear", 2 * width, width)


_STREAMS = (
    # The original's stream, then diffusers': modulation, (q, k, v), output, norms of q and k, feed-forward.
    ("img", "norm1", "to_{}", "to_out.0", "norm_{}", "ff"),
    ("txt", "norm1_context", "add_{}_proj", "to_add_out", "norm_added_{}", "ff_context"),
)


def _double_block(name: str, path: str, spec: Hunyuan) -> Iterator[Row]:
    width, mlp = spec.width, spec.width * spec.mlp_ratio
    for stream, modulation, qkv, out, norm, feed_forward in _STREAMS:
        start = f"{name}.{stream}"
        yield one(f"{start}_mod.linear", f"{path}.{modulation}.linear", 6 * width, width)
        yield fused(f"{start}_attn_qkv", (f"{path}.attn.{qkv.format(part)}" for part in "qkv"), width, width)
        for part in "qk":
            yield one(f"{start}_attn_{part}_norm", f"{path}.attn.{norm.format(part)}", spec.head)
        yield one(f"{start}_attn_proj", f"{path}.attn.{out}", width, width)
        yield one(f"{start}_mlp.fc1", f"{path}.{feed_forward}.net.0.proj", mlp, width)
        yield one(f"{start}_mlp.fc2", f"{path}.{feed_forward}.net.2", width, mlp)


def _single_block(name: str, path: str, spec: Hunyuan) -> Iterator[Row]:
    width, mlp = spec.width, spec.width * spec.mlp_ratio
    qkv = tuple((f"{path}.attn.to_{part}", (width, width)) for part in "qkv")
    yield one(f"{name}.modulation.linear", f"{path}.norm.linear", 3 * width, width)
    yield f"{name}.linear1", (*qkv, (f"{path}.proj_mlp", (mlp, width)))
    for part in "qk":
        yield one(f"{name}.{part}_norm", f"{path}.attn.norm_{part}", spec.head)
    yield one(f"{name}.linear2", f"{path}.proj_out", width, width + mlp)


NUMBERED_BLOCKS = (*numbered("D", 0, 19), *numbered("S", 0, 39))


def hunyuan_blocks(text_encoders: Mapping[str, str]) -> Blocks:
    """The blocks of such a model, numbered as Flux' are; `text_encoders` are the labels of its encoders."""
    every = (*text_encoders.values(), "IN", *NUMBERED_BLOCKS, "OUT")
    transformer = (("double_blocks.", "D{}"), ("single_blocks.", "S{}"), ("final_layer.", "OUT"), ("", "IN"))
    return Blocks(
        labels=every,
        spans=(
            *(Span(component, "hf", "", label) for component, label in text_encoders.items()),
            *(Span("transformer", "native", *span) for span in transformer),
        ),
        lists=(NUMBERED_BLOCKS, every),
    )
