"""The encoder of T5 v1.1 (gated GELU), in the names of transformers, which is all that files use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratool.core.naming import Naming
from loratool.core.target import Target


class T5Encoder(NamedTuple):
    """What tells one T5 encoder from another. `inner` is heads * the width of a head."""

    layers: int
    width: int
    inner: int
    mlp: int
    heads: int
    vocabulary: int = 32128
    buckets: int = 32


T5_XXL = T5Encoder(layers=24, width=4096, inner=4096, mlp=10240, heads=64)


def t5_namings(spec: T5Encoder, component: str) -> dict[str, Naming]:
    """The naming `hf`. The tied copy `encoder.embed_tokens` of `shared` is not a weight of its own."""
    return {"hf": Naming({path: (Target(component, path, shape),) for path, shape in _shapes(spec)})}


def _shapes(spec: T5Encoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "shared", (spec.vocabulary, spec.width)
    for index in range(spec.layers):
        attention, feed_forward = f"encoder.block.{index}.layer.0", f"encoder.block.{index}.layer.1"
        for name in ("q", "k", "v"):
            yield f"{attention}.SelfAttention.{name}", (spec.inner, spec.width)
        yield f"{attention}.SelfAttention.o", (spec.width, spec.inner)
        if index == 0:  # the other layers reuse the position bias of the first
            yield f"{attention}.SelfAttention.relative_attention_bias", (spec.buckets, spec.heads)
        yield f"{attention}.layer_norm", (spec.width,)
        yield f"{feed_forward}.DenseReluDense.wi_0", (spec.mlp, spec.width)
        yield f"{feed_forward}.DenseReluDense.wi_1", (spec.mlp, spec.width)
        yield f"{feed_forward}.DenseReluDense.wo", (spec.width, spec.mlp)
        yield f"{feed_forward}.layer_norm", (spec.width,)
    yield "encoder.final_layer_norm", (spec.width,)
