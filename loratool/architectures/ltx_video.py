"""LTX-Video 0.9: the transformer of 2B and of 13B. Adapters train nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._ltx import attention, caption, feed_forward, modulation
from loratool.architectures._rows import Row, one, two_namings
from loratool.core.architecture import Architecture, Checkpoint, Variant, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming


class LtxTransformer(NamedTuple):
    """What tells one of these transformers from another."""

    layers: int
    width: int
    channels: int = 128
    text: int = 4096


LTX_13B = LtxTransformer(layers=48, width=4096)
LTX_2B = LtxTransformer(layers=28, width=2048)


def transformer_namings(spec: LtxTransformer) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`, one to one and alike but for norms and the way in."""
    return two_namings(_rows(spec))


def _rows(spec: LtxTransformer) -> Iterator[Row]:
    width = spec.width
    yield one("patchify_proj", "proj_in", width, spec.channels)
    yield from modulation("adaln_single", "time_embed", width, 6)
    yield from caption("caption_projection", width, spec.text)
    for index in range(spec.layers):
        block = f"transformer_blocks.{index}"
        yield from attention(f"{block}.attn1", width, width, width)
        yield from attention(f"{block}.attn2", width, width, width)
        yield from feed_forward(f"{block}.ff", width)
    yield one("proj_out", "proj_out", spec.channels, width)


def _blocks(layers: int) -> Blocks:
    blocks = numbered("B", 0, layers - 1)
    spans = (("transformer_blocks.", "B{}"), ("proj_out", "OUT"), ("", "IN"))
    return Blocks(
        labels=("IN", *blocks, "OUT"),
        spans=tuple(Span("transformer", "native", *span) for span in spans),
        lists=(blocks, ("IN", *blocks, "OUT")),
    )


ARCHITECTURE = Architecture(
    id="ltx-video",
    title="LTX-Video 13B",
    components={"transformer": partial(transformer_namings, LTX_13B)},
    outlines={"transformer": partial(transformer_namings, LTX_13B._replace(layers=1))},
    writes={
        "kohya": {"transformer": Voice("lora_unet_", "native")},
        "diffusers": {"transformer": Voice("transformer.", "diffusers")},
        "comfyui": {"transformer": Voice("diffusion_model.", "native")},
        "peft": {"transformer": Voice("base_model.model.", "diffusers")},
    },
    reads={
        "kohya": {"transformer": (Voice("lora_unet_", "diffusers"), Voice("lycoris_", "diffusers"))},
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (
                Voice("diffusion_model.", "diffusers"),
                Voice("model.diffusion_model.", "native"),
            )
        },
        "peft": {
            "transformer": (
                Voice("base_model.model.", "native"),
                Voice("base_model.model.transformer.", "diffusers"),
            )
        },
    },
    checkpoints=(
        Checkpoint("native", {"transformer": Voice("model.diffusion_model.", "native")}),
        Checkpoint("bare", {"transformer": Voice("", "native")}),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers")}),
    ),
    blocks=_blocks(LTX_13B.layers),
    variants=(
        Variant(
            "LTX-Video 2B",
            components={"transformer": partial(transformer_namings, LTX_2B)},
            blocks=_blocks(LTX_2B.layers),
            outlines={"transformer": partial(transformer_namings, LTX_2B._replace(layers=1))},
        ),
    ),
)
