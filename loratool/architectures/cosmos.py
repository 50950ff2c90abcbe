"""Cosmos-Predict2 and 2.5, 2B and 14B: the transformer. Adapters train nothing else."""

from __future__ import annotations

from functools import partial

from loratool.architectures._cosmos import SPANS, CosmosTransformer, transformer_namings
from loratool.core.architecture import Architecture, Checkpoint, Variant, Voice
from loratool.core.blocks import Blocks, numbered

# An image or the beginning of a video comes with a mask: one channel more than text alone, and one for the padding.
COSMOS_14B = CosmosTransformer(layers=36, width=5120, channels=18, reason=100352)
TEXT_14B = CosmosTransformer(layers=36, width=5120, channels=17)
COSMOS_2B = CosmosTransformer(layers=28, width=2048, channels=18, reason=100352)
TEXT_2B = CosmosTransformer(layers=28, width=2048, channels=17)


def _blocks(layers: int) -> Blocks:
    blocks = numbered("B", 0, layers - 1)
    return Blocks(labels=("IN", *blocks, "OUT"), spans=SPANS, lists=(blocks, ("IN", *blocks, "OUT")))


def _variant(title: str, spec: CosmosTransformer) -> Variant:
    return Variant(
        title,
        {"transformer": partial(transformer_namings, spec)},
        blocks=_blocks(spec.layers),
        outlines={"transformer": partial(transformer_namings, spec._replace(layers=1))},
    )


ARCHITECTURE = Architecture(
    id="cosmos",
    title="Cosmos-Predict2/2.5 14B",
    components={"transformer": partial(transformer_namings, COSMOS_14B)},
    outlines={"transformer": partial(transformer_namings, COSMOS_14B._replace(layers=1))},
    writes={
        "diffusers": {"transformer": Voice("transformer.", "diffusers")},
        "comfyui": {"transformer": Voice("diffusion_model.", "native")},  # diffusion-pipe
        "peft": {"transformer": Voice("base_model.model.", "diffusers")},
    },
    reads={
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (Voice("net.", "native"), Voice("model.diffusion_model.", "native")),
        },
        "peft": {
            "transformer": (
                Voice("base_model.model.", "native"),
                Voice("base_model.model.transformer.", "diffusers"),
            )
        },
    },
    checkpoints=(
        Checkpoint("native", {"transformer": Voice("net.", "native")}),
        Checkpoint("bare", {"transformer": Voice("", "native")}),
        Checkpoint("comfyui", {"transformer": Voice("model.diffusion_model.", "native")}),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers")}),
    ),
    blocks=_blocks(COSMOS_14B.layers),
    variants=(
        _variant("Cosmos-Predict2 14B text-to-image", TEXT_14B),
        _variant("Cosmos-Predict2/2.5 2B", COSMOS_2B),
        _variant("Cosmos-Predict2 2B text-to-image", TEXT_2B),
    ),
    # Anima is the younger one, but nearly all adapters for what both have are for it.
    kin="anima",
)
