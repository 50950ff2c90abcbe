"""Cosmos 1 (Predict1), 7B and 14B: the transformer. Adapters train nothing else."""

from __future__ import annotations

from functools import partial

from loratool.architectures._cosmos import SPANS, CosmosTransformer, transformer_namings_1
from loratool.core.architecture import Architecture, Checkpoint, Variant, Voice
from loratool.core.blocks import Blocks, numbered

COSMOS_14B = CosmosTransformer(layers=36, width=5120, channels=18)
COSMOS_7B = CosmosTransformer(layers=28, width=4096, channels=18)
TEXT_14B = CosmosTransformer(layers=36, width=5120, channels=17)
TEXT_7B = CosmosTransformer(layers=28, width=4096, channels=17)


def _blocks(layers: int) -> Blocks:
    blocks = numbered("B", 0, layers - 1)
    return Blocks(labels=("IN", *blocks, "OUT"), spans=SPANS, lists=(blocks, ("IN", *blocks, "OUT")))


def _variant(title: str, spec: CosmosTransformer) -> Variant:
    return Variant(
        title,
        {"transformer": partial(transformer_namings_1, spec)},
        blocks=_blocks(spec.layers),
        outlines={"transformer": partial(transformer_namings_1, spec._replace(layers=1))},
    )


ARCHITECTURE = Architecture(
    id="cosmos1",
    title="Cosmos 1 14B",
    components={"transformer": partial(transformer_namings_1, COSMOS_14B)},
    outlines={"transformer": partial(transformer_namings_1, COSMOS_14B._replace(layers=1))},
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
        "peft": {"transformer": (Voice("base_model.model.transformer.", "diffusers"),)},
    },
    checkpoints=(
        Checkpoint("native", {"transformer": Voice("net.", "native")}),
        Checkpoint("comfyui", {"transformer": Voice("model.diffusion_model.", "native")}),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers")}),
    ),
    blocks=_blocks(COSMOS_14B.layers),
    variants=(
        _variant("Cosmos 1 14B text-to-world", TEXT_14B),
        _variant("Cosmos 1 7B", COSMOS_7B),
        _variant("Cosmos 1 7B text-to-world", TEXT_7B),
    ),
)
