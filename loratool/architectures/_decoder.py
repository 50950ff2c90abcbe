"""Language models that read prompts (Llama, Qwen3), in the names of transformers, which is all that files use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratool.core.naming import Naming
from loratool.core.target import Target


class Decoder(NamedTuple):
    """What tells one decoder from another. `groups` is the number of key and value heads; `head_norms` says that the
    heads of queries and keys are normalised, as in Qwen3."""

    layers: int
    width: int
    mlp: int
    heads: int
    groups: int
    vocabulary: int
    head: int = 128
    head_norms: bool = False


QWEN3_06B = Decoder(layers=28, width=1024, mlp=3072, heads=16, groups=8, vocabulary=151936, head_norms=True)
LLAVA_LLAMA_3_8B = Decoder(layers=32, width=4096, mlp=14336, heads=32, groups=8, vocabulary=128320)


def decoder_namings(spec: Decoder, component: str) -> dict[str, Naming]:
    """The naming `hf`: the bare model's, without the `model.` in front that one with a head has."""
    return {"hf": Naming({path: (Target(component, path, shape),) for path, shape in _shapes(spec)})}


def _shapes(spec: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embed_tokens", (spec.vocabulary, spec.width)
    for index in range(spec.layers):
        layer = f"layers.{index}"
        for part, heads in (("q", spec.heads), ("k", spec.groups), ("v", spec.groups)):
            yield f"{layer}.self_attn.{part}_proj", (heads * spec.head, spec.width)
        yield f"{layer}.self_attn.o_proj", (spec.width, spec.heads * spec.head)
        for norm in ("q_norm", "k_norm") if spec.head_norms else ():
            yield f"{layer}.self_attn.{norm}", (spec.head,)
        for part in ("gate_proj", "up_proj"):
            yield f"{layer}.mlp.{part}", (spec.mlp, spec.width)
        yield f"{layer}.mlp.down_proj", (spec.width, spec.mlp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}", (spec.width,)
    yield "norm", (spec.width,)
