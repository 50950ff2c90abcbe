"""Wan 2.1 and 2.2: text to video and image to video, 1.3B to 14B. Adapters train the transformer only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from loratool.architectures._rows import Row, one, two_namings
from loratool.core.architecture import Architecture, Checkpoint, Namings, Variant, Voice
from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming


class WanTransformer(NamedTuple):
    """What tells one of these transformers from another. `image` is the width of CLIP's image embeddings (0: none).

    Wan 2.1 reads an image through its cross-attention as well, 2.2 only beside the latent channels. The model for
    first and last frame differs from the one for images by a position embedding, which is no module's weight. `vace` is
    the number of blocks that VACE reads its reference with (0: it is no VACE).
    """

    layers: int = 40
    width: int = 5120
    mlp: int = 13824
    channels: int = 16
    out: int = 16
    image: int = 0
    context: int = 4096
    time: int = 256
    vace: int = 0
    vace_channels: int = 96


IMAGE_14B = WanTransformer(channels=36, image=1280)
TEXT_14B = WanTransformer()
IMAGE_A14B = WanTransformer(channels=36)
TEXT_1_3B = WanTransformer(layers=30, width=1536, mlp=8960)
VACE_14B = WanTransformer(vace=8)
VACE_1_3B = TEXT_1_3B._replace(vace=15)
TEXT_IMAGE_5B = WanTransformer(layers=30, width=3072, mlp=14336, channels=48, out=48)


def transformer_namings(spec: WanTransformer, component: str = "transformer") -> dict[str, Naming]:
    """The namings `diffusers` (canonical) and `native`, one to one."""
    return two_namings(_rows(spec), component)


def _rows(spec: WanTransformer) -> Iterator[Row]:
    width = spec.width
    yield one("patch_embedding", "patch_embedding", width, spec.channels, 1, 2, 2)
    for name, path, size in (("text", "text_embedder", spec.context), ("time", "time_embedder", spec.time)):
        yield one(f"{name}_embedding.0", f"condition_embedder.{path}.linear_1", width, size)
        yield one(f"{name}_embedding.2", f"condition_embedder.{path}.linear_2", width, width)
    yield one("time_projection.1", "condition_embedder.time_proj", 6 * width, width)
    if spec.image:
        path = "condition_embedder.image_embedder"
        yield one("img_emb.proj.0", f"{path}.norm1", spec.image)
        yield one("img_emb.proj.1", f"{path}.ff.net.0.proj", spec.image, spec.image)
        yield one("img_emb.proj.3", f"{path}.ff.net.2", width, spec.image)
        yield one("img_emb.proj.4", f"{path}.norm2", width)
    for index in range(spec.layers):
        yield from _block(f"blocks.{index}", spec)
    if spec.vace:
        yield from _vace(spec)
    yield one("head.head", "proj_out", 4 * spec.out, width)


def _vace(spec: WanTransformer) -> Iterator[Row]:
    width = spec.width
    yield one("vace_patch_embedding", "vace_patch_embedding", width, spec.vace_channels, 1, 2, 2)
    for index in range(spec.vace):
        block = f"vace_blocks.{index}"
        if index == 0:
            yield one(f"{block}.before_proj", f"{block}.proj_in", width, width)
        yield from _block(block, spec)
        yield one(f"{block}.after_proj", f"{block}.proj_out", width, width)


def _block(block: str, spec: WanTransformer) -> Iterator[Row]:
    width = spec.width
    for name, path in ((f"{block}.self_attn", f"{block}.attn1"), (f"{block}.cross_attn", f"{block}.attn2")):
        for part in "qkv":
            yield one(f"{name}.{part}", f"{path}.to_{part}", width, width)
        yield one(f"{name}.o", f"{path}.to_out.0", width, width)
        for part in "qk":
            yield one(f"{name}.norm_{part}", f"{path}.norm_{part}", width)
    if spec.image:
        for part in "kv":
            yield one(f"{block}.cross_attn.{part}_img", f"{block}.attn2.add_{part}_proj", width, width)
        yield one(f"{block}.cross_attn.norm_k_img", f"{block}.attn2.norm_added_k", width)
    # Numbered in the order of the original's source, in diffusers by where they are applied.
    yield one(f"{block}.norm3", f"{block}.norm2", width)
    yield one(f"{block}.ffn.0", f"{block}.ffn.net.0.proj", spec.mlp, width)
    yield one(f"{block}.ffn.2", f"{block}.ffn.net.2", width, spec.mlp)


def _blocks(spec: WanTransformer) -> Blocks:
    blocks = (*numbered("B", 0, spec.layers - 1), *(numbered("V", 0, spec.vace - 1) if spec.vace else ()))
    spans = (("blocks.", "B{}"), ("vace_blocks.", "V{}"), ("head.", "OUT"), ("", "IN"))
    return Blocks(
        labels=("IN", *blocks, "OUT"),
        spans=tuple(Span(name, "native", *span) for name in ("transformer", "transformer_2") for span in spans),
        lists=(blocks, ("IN", *blocks, "OUT")),
    )


def _variant(title: str, spec: WanTransformer) -> Variant:
    return Variant(
        title, _experts(spec), blocks=_blocks(spec), outlines=_experts(spec._replace(layers=1, vace=min(1, spec.vace)))
    )


def _experts(spec: WanTransformer) -> dict[str, Callable[[], Namings]]:
    return {
        "transformer": partial(transformer_namings, spec),
        "transformer_2": partial(transformer_namings, spec, "transformer_2"),
    }


ARCHITECTURE = Architecture(
    id="wan",
    title="Wan 2.1/2.2 14B",
    components={
        "transformer": partial(transformer_namings, IMAGE_14B),
        # The expert for low noise, where one file of diffusers holds both of Wan 2.2 A14B.
        "transformer_2": partial(transformer_namings, IMAGE_A14B, "transformer_2"),
    },
    writes={
        "kohya": {"transformer": Voice("lora_unet_", "native")},  # musubi-tuner
        "diffusers": {
            "transformer": Voice("transformer.", "diffusers"),
            "transformer_2": Voice("transformer_2.", "diffusers"),
        },
        "comfyui": {"transformer": Voice("diffusion_model.", "native")},
        "peft": {"transformer": Voice("base_model.model.", "diffusers")},
    },
    reads={
        "kohya": {
            "transformer": (
                Voice("lora_unet__", "native"),  # VideoX-Fun
                Voice("lora_unet_", "diffusers"),
                Voice("lycoris_", "diffusers"),  # LyCORIS's own wrapper: SimpleTuner
            )
        },
        "diffusers": {"transformer": (Voice("", "diffusers"),)},
        "comfyui": {
            "transformer": (
                Voice("", "native"),  # DiffSynth-Studio
                Voice("model.diffusion_model.", "native"),
                Voice("transformer.", "native"),
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
        Checkpoint("native", {"transformer": Voice("", "native")}),
        Checkpoint("comfyui", {"transformer": Voice("model.diffusion_model.", "native")}),
        Checkpoint("diffusers", {"transformer": Voice("", "diffusers"), "transformer_2": Voice("", "diffusers")}),
    ),
    outlines={
        "transformer": partial(transformer_namings, IMAGE_14B._replace(layers=1)),
        "transformer_2": partial(transformer_namings, IMAGE_A14B._replace(layers=1), "transformer_2"),
    },
    facts={
        "ss_base_model_version": "wan",
        "modelspec.architecture": "wan2.1/lora",
        "ss_network_module": "networks.lora_wan",
    },
    blocks=_blocks(IMAGE_14B),
    variants=(
        _variant("Wan 2.1/2.2 14B text-to-video", TEXT_14B),
        _variant("Wan 2.2 14B image-to-video", IMAGE_A14B),
        _variant("Wan 2.2 5B", TEXT_IMAGE_5B),
        _variant("Wan 2.1 1.3B", TEXT_1_3B),
        _variant("Wan 2.1 VACE 14B", VACE_14B),
        _variant("Wan 2.1 VACE 1.3B", VACE_1_3B),
    ),
)
