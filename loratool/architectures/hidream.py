"""HiDream-I1 (Full, Dev, Fast) and E1: the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._dit import Shape, dit_blocks, dit_voices, same_namings
from loratool.core.architecture import Architecture
from loratool.core.naming import Naming


class HiDreamTransformer(NamedTuple):
    """The sizes of the transformer. `mlp` is the width of an expert, `shared` that of the expert for all tokens."""

    double: int = 16
    single: int = 32
    width: int = 2560
    mlp: int = 6912
    shared: int = 3584
    experts: int = 4
    channels: int = 16
    context: int = 4096
    pooled: int = 2048
    time: int = 256


def _shapes(spec: HiDreamTransformer) -> Iterator[tuple[str, Shape]]:
    width = spec.width
    for embedder, size in (("t_embedder.timestep_embedder", spec.time), ("p_embedder.pooled_embedder", spec.pooled)):
        yield f"{embedder}.linear_1", (width, size)
        yield f"{embedder}.linear_2", (width, width)
    yield "x_embedder.proj", (width, 4 * spec.channels)
    for index in range(spec.double + spec.single + 1):  # a layer of Llama for each block, and T5
        yield f"caption_projection.{index}.linear", (width, spec.context)
    for index in range(spec.double):
        block = f"double_stream_blocks.{index}.block"
        yield f"{block}.adaLN_modulation.1", (12 * width, width)
        yield from _attention(f"{block}.attn1", "", width)
        yield from _attention(f"{block}.attn1", "_t", width)
        yield from _experts(f"{block}.ff_i", spec)
        yield from _gated(f"{block}.ff_t", spec.mlp, width)
    for index in range(spec.single):
        block = f"single_stream_blocks.{index}.block"
        yield f"{block}.adaLN_modulation.1", (6 * width, width)
        yield from _attention(f"{block}.attn1", "", width)
        yield from _experts(f"{block}.ff_i", spec)
    yield "final_layer.adaLN_modulation.1", (2 * width, width)
    yield "final_layer.linear", (4 * spec.channels, width)


def _attention(name: str, stream: str, width: int) -> Iterator[tuple[str, Shape]]:
    for part in ("to_q", "to_k", "to_v", "to_out"):
        yield f"{name}.{part}{stream}", (width, width)
    for norm in ("q_rms_norm", "k_rms_norm"):
        yield f"{name}.{norm}{stream}", (width,)


def _experts(name: str, spec: HiDreamTransformer) -> Iterator[tuple[str, Shape]]:
    yield from _gated(f"{name}.shared_experts", spec.shared, spec.width)
    for index in range(spec.experts):
        yield from _gated(f"{name}.experts.{index}", spec.mlp, spec.width)
    yield f"{name}.gate", (spec.experts, spec.width)


def _gated(name: str, mlp: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.w1", (mlp, width)
    yield f"{name}.w2", (width, mlp)
    yield f"{name}.w3", (mlp, width)


def transformer_namings(spec: HiDreamTransformer) -> dict[str, Naming]:
    """The naming `diffusers`, which the original checkpoint has, too."""
    return same_namings(dict(_shapes(spec)))


def _transformer() -> dict[str, Naming]:
    return transformer_namings(HiDreamTransformer())


VOICES = dit_voices("diffusers")

ARCHITECTURE = Architecture(
    id="hidream",
    title="HiDream-I1",
    components={"transformer": _transformer},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={"transformer": partial(transformer_namings, HiDreamTransformer(double=1, single=1))},
    blocks=dit_blocks({"double_stream_blocks.": ("D", 16), "single_stream_blocks.": ("S", 32)}, ("final_layer.",)),
)
