"""CogVideoX: the transformer of 2B, 5B and 1.5 5B. Adapters train nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._rows import Row, fused, one, two_namings
from loratool.core.architecture import Architecture, Checkpoint, Variant, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming


class CogVideoX(NamedTuple):
    """What tells one of these transformers from another. `patch` is what the embedder of patches takes, `out` what the
    last layer gives. `offset` says that it embeds an offset of the frames, too."""

    layers: int = 42
    width: int = 3072
    patch: tuple[int, ...] = (16, 2, 2)
    out: int = 64
    offset: bool = False
    time: int = 512
    text: int = 4096
    head: int = 64


COG_5B = CogVideoX()
COG_5B_IMAGE = CogVideoX(patch=(32, 2, 2))
COG_1_5 = CogVideoX(patch=(128,), out=128)
COG_1_5_IMAGE = CogVideoX(patch=(256,), out=128, offset=True)
COG_2B = CogVideoX(layers=30, width=1920)


def transformer_namings(spec: CogVideoX) -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`: SwissArmyTransformer's, q, k, v and modulations fused."""
    return two_namings(_rows(spec))


def _rows(spec: CogVideoX) -> Iterator[Row]:
    width, time = spec.width, spec.time
    yield one("mixins.patch_embed.proj", "patch_embed.proj", width, *spec.patch)
    yield one("mixins.patch_embed.text_proj", "patch_embed.text_proj", width, spec.text)
    yield from _embedder("time_embed", "time_embedding", time, width)
    if spec.offset:
        yield from _embedder("ofs_embed", "ofs_embedding", time, time)
    for index in range(spec.layers):
        yield from _block(index, spec)
    yield one("transformer.final_layernorm", "norm_final", width)
    yield one("mixins.final_layer.norm_final", "norm_out.norm", width)
    yield one("mixins.final_layer.adaLN_modulation.1", "norm_out.linear", 2 * width, time)
    yield one("mixins.final_layer.linear", "proj_out", spec.out, width)


def _embedder(name: str, path: str, width: int, size: int) -> Iterator[Row]:
    yield one(f"{name}.0", f"{path}.linear_1", width, size)
    yield one(f"{name}.2", f"{path}.linear_2", width, width)


def _block(index: int, spec: CogVideoX) -> Iterator[Row]:
    name, adaln, path = f"transformer.layers.{index}", "mixins.adaln_layer", f"transformer_blocks.{index}"
    width = spec.width
    yield one(f"{name}.input_layernorm", f"{path}.norm1.norm", width)
    yield fused(f"{name}.attention.query_key_value", (f"{path}.attn1.to_{part}" for part in "qkv"), width, width)
    yield one(f"{name}.attention.dense", f"{path}.attn1.to_out.0", width, width)
    yield one(f"{adaln}.query_layernorm_list.{index}", f"{path}.attn1.norm_q", spec.head)
    yield one(f"{adaln}.key_layernorm_list.{index}", f"{path}.attn1.norm_k", spec.head)
    yield one(f"{name}.post_attention_layernorm", f"{path}.norm2.norm", width)
    yield one(f"{name}.mlp.dense_h_to_4h", f"{path}.ff.net.0.proj", 4 * width, width)
    yield one(f"{name}.mlp.dense_4h_to_h", f"{path}.ff.net.2", width, 4 * width)
    # Shift, scale and gate: of the video before attention and before the MLP, then those of the text.
    modulations = (f"{path}.{norm}.linear:{part}" for part in ("video", "text") for norm in ("norm1", "norm2"))
    yield fused(f"{adaln}.adaLN_modulations.{index}.1", modulations, 3 * width, spec.time)


def _blocks(layers: int) -> Blocks:
    blocks = numbered("B", 0, layers - 1)
    spans = (("transformer_blocks.", "B{}"), ("norm_", "OUT"), ("proj_out", "OUT"), ("", "IN"))
    return Blocks(
        labels=("IN", *blocks, "OUT"),
        spans=tuple(Span("transformer", "diffusers", *span) for span in spans),
        lists=(blocks, ("IN", *blocks, "OUT")),
    )


def _variant(title: str, spec: CogVideoX) -> Variant:
    return Variant(
        title,
        {"transformer": partial(transformer_namings, spec)},
        blocks=_blocks(spec.layers),
        outlines={"transformer": partial(transformer_namings, spec._replace(layers=1))},
    )


ARCHITECTURE = Architecture(
    id="cogvideox",
    title="CogVideoX 5B",
    components={"transformer": partial(transformer_namings, COG_5B)},
    outlines={"transformer": partial(transformer_namings, COG_5B._replace(layers=1))},
    writes={
        "kohya": {"transformer": Voice("lora_unet__", "diffusers")},  # VideoX-Fun, with its second underscore
        "diffusers": {"transformer": Voice("transformer.", "diffusers")},
        "peft": {"transformer": Voice("base_model.model.", "diffusers")},
    },
    reads={
        "kohya": {"transformer": (Voice("lora_unet_", "diffusers"), Voice("lycoris_", "diffusers"))},
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {"transformer": (Voice("diffusion_model.", "diffusers"),)},
        "peft": {"transformer": (Voice("base_model.model.transformer.", "diffusers"),)},
    },
    checkpoints=(
        Checkpoint("native", {"transformer": Voice("model.diffusion_model.", "native")}),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers")}),
    ),
    blocks=_blocks(COG_5B.layers),
    variants=(
        _variant("CogVideoX 5B image-to-video", COG_5B_IMAGE),
        _variant("CogVideoX 1.5 5B", COG_1_5),
        _variant("CogVideoX 1.5 5B image-to-video", COG_1_5_IMAGE),
        _variant("CogVideoX 2B", COG_2B),
    ),
)
