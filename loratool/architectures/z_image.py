"""Z-Image (base, Turbo): the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._dit import Row, dit_blocks, dit_namings, dit_voices, fused, row
from loratool.core.architecture import Architecture
from loratool.core.naming import Naming


class ZImageTransformer(NamedTuple):
    """The sizes of the transformer."""

    layers: int = 30
    refiners: int = 2
    width: int = 3840
    head: int = 128
    mlp: int = 10240
    channels: int = 16
    context: int = 2560
    time: int = 256
    time_mlp: int = 1024


def _rows(spec: ZImageTransformer) -> Iterator[Row]:
    width = spec.width
    yield row("x_embedder", "all_x_embedder.2-1", width, 4 * spec.channels)
    yield row("t_embedder.mlp.0", "t_embedder.mlp.0", spec.time_mlp, spec.time)
    yield row("t_embedder.mlp.2", "t_embedder.mlp.2", spec.time, spec.time_mlp)
    yield row("cap_embedder.0", "cap_embedder.0", spec.context)
    yield row("cap_embedder.1", "cap_embedder.1", width, spec.context)
    for index in range(spec.refiners):
        yield from _block(f"context_refiner.{index}", spec, modulated=False)
    for index in range(spec.refiners):
        yield from _block(f"noise_refiner.{index}", spec)
    for index in range(spec.layers):
        yield from _block(f"layers.{index}", spec)
    final = "all_final_layer.2-1"
    yield row("final_layer.adaLN_modulation.1", f"{final}.adaLN_modulation.1", width, spec.time)
    yield row("final_layer.linear", f"{final}.linear", 4 * spec.channels, width)


def _block(name: str, spec: ZImageTransformer, modulated: bool = True) -> Iterator[Row]:
    width, attention = spec.width, f"{name}.attention"
    yield fused(f"{attention}.qkv", (f"{attention}.to_{part}" for part in "qkv"), width, width)
    yield row(f"{attention}.q_norm", f"{attention}.norm_q", spec.head)
    yield row(f"{attention}.k_norm", f"{attention}.norm_k", spec.head)
    yield row(f"{attention}.out", f"{attention}.to_out.0", width, width)
    for number, shape in ((1, (spec.mlp, width)), (2, (width, spec.mlp)), (3, (spec.mlp, width))):
        yield row(f"{name}.feed_forward.w{number}", f"{name}.feed_forward.w{number}", *shape)
    if modulated:
        yield row(f"{name}.adaLN_modulation.0", f"{name}.adaLN_modulation.0", 4 * width, spec.time)
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield row(f"{name}.{norm}", f"{name}.{norm}", width)


def transformer_namings(spec: ZImageTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical, and the authors') and `native` (ComfyUI's: q, k, v fused)."""
    return dit_namings(_rows(spec))


def _transformer() -> dict[str, Naming]:
    return transformer_namings(ZImageTransformer())


VOICES = dit_voices("native", kohya="diffusers")

ARCHITECTURE = Architecture(
    id="z-image",
    title="Z-Image",
    components={"transformer": _transformer},
    writes=VOICES.writes,
    reads=VOICES.reads,
    checkpoints=VOICES.checkpoints,
    outlines={"transformer": partial(transformer_namings, ZImageTransformer(layers=1, refiners=1))},
    facts={
        "ss_network_module": "networks.lora_zimage",
        "ss_base_model_version": "z_image",
        "modelspec.architecture": "Z-Image/lora",
    },
    blocks=dit_blocks(
        {"context_refiner.": ("C", 2), "noise_refiner.": ("N", 2), "layers.": ("L", 30)},
        ("all_final_layer.",),
    ),
)
