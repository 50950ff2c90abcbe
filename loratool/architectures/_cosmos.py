"""The transformer of Cosmos Predict, 1, 2 and 2.5, and of Anima, which was made from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratool.architectures._rows import Row, one, respelled, two_namings
from loratool.core.blocks import Span
from loratool.core.naming import Naming


class CosmosTransformer(NamedTuple):
    """What tells one of these transformers from another. `channels` counts the mask of the padding, `reason` is the
    width of what Cosmos Reason says about the text before it is projected (0: T5 is used)."""

    layers: int
    width: int
    channels: int
    reason: int = 0
    context: int = 1024
    modulation: int = 256
    head: int = 128
    patch: int = 4
    out: int = 16


def transformer_namings(spec: CosmosTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`, one to one."""
    return two_namings(_rows(spec))


def transformer_namings_1(spec: CosmosTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native` as of Cosmos 1, whose original numbers what 2 has names for."""
    namings = two_namings(_rows(spec))
    return {**namings, "native": respelled(namings["native"], _name_1)}


_NAMES_1 = (
    ("t_embedding_norm", "affline_norm"),
    ("self_attn", "blocks.0.block.attn"),
    ("cross_attn", "blocks.1.block.attn"),
    ("mlp.", "blocks.2.block."),
    ("adaln_modulation_blocks.0.block.attn", "blocks.0.adaLN_modulation"),
    ("adaln_modulation_blocks.1.block.attn", "blocks.1.adaLN_modulation"),
    ("adaln_modulation_blocks.2.block", "blocks.2.adaLN_modulation"),
    ("adaln_modulation", "adaLN_modulation"),
    ("q_proj", "to_q.0"),
    ("k_proj", "to_k.0"),
    ("v_proj", "to_v.0"),
    ("output_proj", "to_out.0"),
    ("q_norm", "to_q.1"),
    ("k_norm", "to_k.1"),
)
"""From the names of Cosmos 2 to those of Cosmos 1, in this order."""


def _name_1(name: str) -> str:
    for new, old in _NAMES_1:
        name = name.replace(new, old)
    return f"blocks.block{name.removeprefix('blocks.')}" if name.startswith("blocks.") else name


def _rows(spec: CosmosTransformer) -> Iterator[Row]:
    width, modulation = spec.width, spec.modulation
    yield one("x_embedder.proj.1", "patch_embed.proj", width, spec.channels * spec.patch)
    yield one("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1", width, width)
    yield one("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2", 3 * width, width)
    yield one("t_embedding_norm", "time_embed.norm", width)
    if spec.reason:
        yield one("crossattn_proj.0", "crossattn_proj.0", spec.context, spec.reason)
    for index in range(spec.layers):
        yield from _block(f"blocks.{index}", f"transformer_blocks.{index}", spec)
    yield one("final_layer.adaln_modulation.1", "norm_out.linear_1", modulation, width)
    yield one("final_layer.adaln_modulation.2", "norm_out.linear_2", 2 * width, modulation)
    yield one("final_layer.linear", "proj_out", spec.out * spec.patch, width)


def _block(name: str, path: str, spec: CosmosTransformer) -> Iterator[Row]:
    width = spec.width
    for part, norm in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")):
        start = f"{name}.adaln_modulation_{part}"
        yield one(f"{start}.1", f"{path}.{norm}.linear_1", spec.modulation, width)
        yield one(f"{start}.2", f"{path}.{norm}.linear_2", 3 * width, spec.modulation)
    for start, attention, size in (("self_attn", "attn1", width), ("cross_attn", "attn2", spec.context)):
        for part, columns in (("q", width), ("k", size), ("v", size)):
            yield one(f"{name}.{start}.{part}_proj", f"{path}.{attention}.to_{part}", width, columns)
        yield one(f"{name}.{start}.output_proj", f"{path}.{attention}.to_out.0", width, width)
        for part in "qk":
            yield one(f"{name}.{start}.{part}_norm", f"{path}.{attention}.norm_{part}", spec.head)
    yield one(f"{name}.mlp.layer1", f"{path}.ff.net.0.proj", 4 * width, width)
    yield one(f"{name}.mlp.layer2", f"{path}.ff.net.2", width, 4 * width)


SPANS = (
    Span("transformer", "diffusers", "transformer_blocks.", "B{}"),
    Span("transformer", "diffusers", "norm_out.", "OUT"),
    Span("transformer", "diffusers", "proj_out", "OUT"),
    Span("transformer", "diffusers", "", "IN"),
)
"""The blocks of the transformer."""
