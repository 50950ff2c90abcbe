"""Krea 2: the transformer with the fusion of text layers in it. Adapters train nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._rows import Row, one, two_namings
from loratool.core.architecture import Architecture, Checkpoint, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming


class Krea2(NamedTuple):
    """The sizes of a Krea 2 transformer. `keys` is the width of keys and values, of which several queries share one;
    `text_layers` is how many layers of the text encoder are fused."""

    layers: int = 28
    width: int = 6144
    keys: int = 1536
    mlp: int = 16384
    channels: int = 64
    time: int = 256
    head: int = 128
    text: int = 2560
    text_mlp: int = 6912
    text_layers: int = 12
    text_blocks: int = 2


_SCALES = ("qnorm", "knorm", "prenorm", "postnorm", "txtmlp.0", "last.norm")


def transformer_namings(spec: Krea2) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`, one to one; the original stores norms as `scale`."""
    namings = two_namings(_rows(spec))
    keys = {name: f"{name}.scale" for name in namings["native"] if name.endswith(_SCALES)}
    return {**namings, "native": Naming(namings["native"], keys)}


def _rows(spec: Krea2) -> Iterator[Row]:
    width, text = spec.width, spec.text
    yield one("first", "img_in", width, spec.channels)
    yield one("tmlp.0", "time_embed.linear_1", width, spec.time)
    yield one("tmlp.2", "time_embed.linear_2", width, width)
    yield one("tproj.1", "time_mod_proj", 6 * width, width)
    for blocks in ("layerwise_blocks", "refiner_blocks"):
        for index in range(spec.text_blocks):
            name, path = f"txtfusion.{blocks}.{index}", f"text_fusion.{blocks}.{index}"
            yield from _block(name, path, text, text, spec.text_mlp, spec.head)
    yield one("txtfusion.projector", "text_fusion.projector", 1, spec.text_layers)
    yield one("txtmlp.0", "txt_in.norm", text)
    yield one("txtmlp.1", "txt_in.linear_1", width, text)
    yield one("txtmlp.3", "txt_in.linear_2", width, width)
    for index in range(spec.layers):
        yield from _block(f"blocks.{index}", f"transformer_blocks.{index}", width, spec.keys, spec.mlp, spec.head)
    yield one("last.norm", "final_layer.norm", width)
    yield one("last.linear", "final_layer.linear", spec.channels, width)


def _block(name: str, path: str, width: int, keys: int, mlp: int, head: int) -> Iterator[Row]:
    for part, to, rows in (("wq", "to_q", width), ("wk", "to_k", keys), ("wv", "to_v", keys)):
        yield one(f"{name}.attn.{part}", f"{path}.attn.{to}", rows, width)
    yield one(f"{name}.attn.gate", f"{path}.attn.to_gate", width, width)
    yield one(f"{name}.attn.wo", f"{path}.attn.to_out.0", width, width)
    for part in "qk":
        yield one(f"{name}.attn.qknorm.{part}norm", f"{path}.attn.norm_{part}", head)
    yield one(f"{name}.prenorm", f"{path}.norm1", width)
    yield one(f"{name}.postnorm", f"{path}.norm2", width)
    for part in ("gate", "up"):
        yield one(f"{name}.mlp.{part}", f"{path}.ff.{part}", mlp, width)
    yield one(f"{name}.mlp.down", f"{path}.ff.down", width, mlp)


_NUMBERED = numbered("B", 0, 27)
_EVERY = ("TEXT", "IN", *_NUMBERED, "OUT")

BLOCKS = Blocks(
    labels=_EVERY,
    spans=(
        Span("transformer", "native", "txt", "TEXT"),
        Span("transformer", "native", "blocks.", "B{}"),
        Span("transformer", "native", "last.", "OUT"),
        Span("transformer", "native", "", "IN"),
    ),
    lists=(_NUMBERED, _EVERY),
)

ARCHITECTURE = Architecture(
    id="krea2",
    title="Krea 2",
    components={"transformer": partial(transformer_namings, Krea2())},
    outlines={"transformer": partial(transformer_namings, Krea2(layers=1, text_blocks=1))},
    writes={
        "kohya": {"transformer": Voice("lora_unet_", "native")},  # musubi-tuner
        "diffusers": {"transformer": Voice("transformer.", "diffusers")},
        "comfyui": {"transformer": Voice("diffusion_model.", "native")},
        "peft": {"transformer": Voice("base_model.model.", "diffusers")},
    },
    reads={
        "kohya": {"transformer": (Voice("lora_unet_", "diffusers"), Voice("lycoris_", "diffusers"))},
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (
                Voice("transformer.", "native"),
                Voice("model.diffusion_model.", "native"),
            )
        },
        "peft": {
            "transformer": (
                Voice("base_model.model.", "native"),  # ai-toolkit
                Voice("base_model.model.transformer.", "diffusers"),
            )
        },
    },
    checkpoints=(
        Checkpoint("native", {"transformer": Voice("", "native")}),
        Checkpoint("comfyui", {"transformer": Voice("model.diffusion_model.", "native")}),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers")}),
    ),
    facts={
        "ss_base_model_version": "krea2",
        "modelspec.architecture": "Krea-2/lora",
        "ss_network_module": "networks.lora_krea2",
    },
    blocks=BLOCKS,
)
