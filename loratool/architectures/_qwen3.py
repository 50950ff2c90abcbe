"""Qwen3's text model, in the names of transformers, which is all that files use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratool.core.naming import Naming
from loratool.core.target import Target


class Qwen3(NamedTuple):
    """What tells one Qwen3 from another. `groups` is the number of key and value heads."""

    layers: int
    width: int
    mlp: int
    heads: int
    groups: int
    head: int = 128
    vocabulary: int = 151936


def qwen3_namings(spec: Qwen3, component: str) -> dict[str, Naming]:
    """The naming `hf`: Qwen3Model's, without the `model.` in front that a model with a head has."""
    return {"hf": Naming({path: (Target(component, path, shape),) for path, shape in _shapes(spec)})}


def _shapes(spec: Qwen3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embed_tokens", (spec.vocabulary, spec.width)
    for index in range(spec.layers):
        layer = f"layers.{index}"
        for part, heads in (("q", spec.heads), ("k", spec.groups), ("v", spec.groups)):
            yield f"{layer}.self_attn.{part}_proj", (heads * spec.head, spec.width)
        yield f"{layer}.self_attn.o_proj", (spec.width, spec.heads * spec.head)
        for norm in ("q_norm", "k_norm"):
            yield f"{layer}.self_attn.{norm}", (spec.head,)
        for part in ("gate_proj", "up_proj"):
            yield f"{layer}.mlp.{part}", (spec.mlp, spec.width)
        yield f"{layer}.mlp.down_proj", (spec.width, spec.mlp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}", (spec.width,)
    yield "norm", (spec.width,)
