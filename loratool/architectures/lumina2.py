"""Lumina-Image 2.0: the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._dit import Row, dit_blocks, dit_namings, dit_voices, row
from loratool.core.architecture import Architecture
from loratool.core.naming import Naming


class Lumina2Transformer(NamedTuple):
    """The sizes of the transformer. Keys and values are `kv` wide: several query heads share one of theirs."""

    layers: int = 26
    refiners: int = 2
    width: int = 2304
    kv: int = 768
    head: int = 96
    mlp: int = 9216
    channels: int = 16
    context: int = 2304
    time: int = 256
    modulation: int = 1024


def _rows(spec: Lumina2Transformer) -> Iterator[Row]:
    width, embed = spec.width, "time_caption_embed"
    yield row("x_embedder", "x_embedder", width, 4 * spec.channels)
    yield row("t_embedder.mlp.0", f"{embed}.timestep_embedder.linear_1", spec.modulation, spec.time)
    yield row("t_embedder.mlp.2", f"{embed}.timestep_embedder.linear_2", spec.modulation, spec.modulation)
    yield row("cap_embedder.0", f"{embed}.caption_embedder.0", spec.context)
    yield row("cap_embedder.1", f"{embed}.caption_embedder.1", width, spec.context)
    for index in range(spec.refiners):
        yield from _block(f"context_refiner.{index}", spec, modulated=False)
    for index in range(spec.refiners):
        yield from _block(f"noise_refiner.{index}", spec)
    for index in range(spec.layers):
        yield from _block(f"layers.{index}", spec)
    yield row("final_layer.adaLN_modulation.1", "norm_out.linear_1", width, spec.modulation)
    yield row("final_layer.linear", "norm_out.linear_2", 4 * spec.channels, width)


def _block(name: str, spec: Lumina2Transformer, modulated: bool = True) -> Iterator[Row]:
    width, native, path = spec.width, f"{name}.attention", f"{name}.attn"
    sizes = {"to_q": width, "to_k": spec.kv, "to_v": spec.kv}
    yield Row(f"{native}.qkv", tuple((f"{path}.{part}", (rows, width)) for part, rows in sizes.items()))
    yield row(f"{native}.q_norm", f"{path}.norm_q", spec.head)
    yield row(f"{native}.k_norm", f"{path}.norm_k", spec.head)
    yield row(f"{native}.out", f"{path}.to_out.0", width, width)
    for number, shape in ((1, (spec.mlp, width)), (2, (width, spec.mlp)), (3, (spec.mlp, width))):
        yield row(f"{name}.feed_forward.w{number}", f"{name}.feed_forward.linear_{number}", *shape)
    if modulated:
        yield row(f"{name}.adaLN_modulation.1", f"{name}.norm1.linear", 4 * width, spec.modulation)
    yield row(f"{name}.attention_norm1", f"{name}.norm1.norm" if modulated else f"{name}.norm1", width)
    yield row(f"{name}.attention_norm2", f"{name}.norm2", width)
    yield row(f"{name}.ffn_norm1", f"{name}.ffn_norm1", width)
    yield row(f"{name}.ffn_norm2", f"{name}.ffn_norm2", width)


def transformer_namings(spec: Lumina2Transformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native` (q, k, v fused)."""
    return dit_namings(_rows(spec))


def _transformer() -> dict[str, Naming]:
    return transformer_namings(Lumina2Transformer())


VOICES = dit_voices("native")

ARCHITECTURE = Architecture(
    id="lumina2",
    title="Lumina-Image 2.0",
    components={"transformer": _transformer},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={"transformer": partial(transformer_namings, Lumina2Transformer(layers=1, refiners=1))},
    facts={
        "ss_network_module": "networks.lora_lumina",
        "ss_base_model_version": "lumina2",
        "modelspec.architecture": "lumina-2/lora",
    },
    blocks=dit_blocks(
        {"context_refiner.": ("C", 2), "noise_refiner.": ("N", 2), "layers.": ("L", 26)},
        ("norm_out.",),
    ),
)
