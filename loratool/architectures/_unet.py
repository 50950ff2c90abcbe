"""The UNet of Stable Diffusion 1, 2, XL and the XL refiner: one walk through it names every weight twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratool.core.blocks import Blocks, Span, numbered
from loratool.core.naming import Naming
from loratool.core.target import Target

Row = tuple[str, str, tuple[int, ...]]
"""(diffusers name, ldm name, shape)."""


class UNet(NamedTuple):
    """What tells one of these UNets from another.

    `widths` are the channels of each level from the outside in, `depths` the transformer blocks of
    each level (0: no attention there), `mid_depth` those of the middle block. `context` is the width
    of the text embeddings; `added` that of the pooled and size embeddings (0: there are none). `every` is False where
    only the first layer of a level has its attention, as in an outline.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    mid_depth: int
    context: int
    linear_projection: bool
    added: int = 0
    channels: int = 4
    layers: int = 2
    every: bool = True

    @property
    def time(self) -> int:
        """Width of the time embedding."""
        return 4 * self.widths[0]


# The lists of sd-webui-lora-block-weight and of sd-scripts' svd_merge_lora.py, which have the same orders.
EVERY_BLOCK = ("BASE", *numbered("IN", 0, 11), "M00", *numbered("OUT", 0, 11))
"""26 values: every block of Stable Diffusion 1."""

ATTENTION_BLOCKS = ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *numbered("OUT", 3, 11))
"""17 values: the blocks of Stable Diffusion 1 that have attention."""

PRESETS = {
    "INS": ("BASE", "IN01", "IN02", "IN04"),
    "IND": ("BASE", "IN05", "IN07", "IN08"),
    "INALL": ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08"),
    "MIDD": ("BASE", "IN05", "IN07", "IN08", "M00", *numbered("OUT", 3, 6)),
    "OUTD": ("BASE", *numbered("OUT", 3, 6)),
    "OUTS": ("BASE", *numbered("OUT", 7, 11)),
    "OUTALL": ("BASE", *numbered("OUT", 3, 11)),
}
"""The extension's presets, which it keeps as lists of 17 values: what such a list does not name is turned off."""


def unet_blocks(spec: UNet, lists: tuple[tuple[str, ...], ...], text_encoders: tuple[str, ...]) -> Blocks:
    """The blocks of a pipeline with one of these UNets: `BASE` is its text encoders, the rest the ldm naming's.

    The embeddings count as the first block and the output layers as the last one, as where checkpoints are merged by
    blocks (merge-block-weighted).
    """
    last = len(spec.widths) * (spec.layers + 1) - 1
    unet = (
        ("input_blocks.", "IN{}"),
        ("middle_block.", "M00"),
        ("output_blocks.", "OUT{}"),
        ("time_embed.", "IN00"),
        ("label_emb.", "IN00"),
        ("out.", f"OUT{last:02d}"),
    )
    return Blocks(
        labels=("BASE", *numbered("IN", 0, last), "M00", *numbered("OUT", 0, last)),
        spans=(
            *(Span(component, "hf", "", "BASE") for component in text_encoders),
            *(Span("unet", "ldm", prefix, label) for prefix, label in unet),
        ),
        lists=lists,
        presets=PRESETS,
    )


def outline(spec: UNet) -> UNet:
    """One transformer block of each kind and shape."""
    return spec._replace(depths=tuple(min(1, depth) for depth in spec.depths), mid_depth=1, every=False)


def unet_namings(spec: UNet, component: str = "unet") -> dict[str, Naming]:
    """The `diffusers` (canonical) and `ldm` namings of one UNet."""
    diffusers: dict[str, tuple[Target, ...]] = {}
    ldm: dict[str, tuple[Target, ...]] = {}
    for name, ldm_name, shape in _rows(spec):
        diffusers[name] = ldm[ldm_name] = (Target(component, name, shape),)
    return {"diffusers": Naming(diffusers), "ldm": Naming(ldm)}


def _rows(spec: UNet) -> Iterator[Row]:
    yield "conv_in", "input_blocks.0.0", (spec.widths[0], spec.channels, 3, 3)
    yield from _embedding("time_embedding", "time_embed", spec.widths[0], spec.time)
    if spec.added:
        yield from _embedding("add_embedding", "label_emb.0", spec.added, spec.time)
    skips: list[int] = []
    yield from _down(spec, skips)
    yield from _middle(spec)
    yield from _up(spec, skips)
    yield "conv_norm_out", "out.0", (spec.widths[0],)
    yield "conv_out", "out.2", (spec.channels, spec.widths[0], 3, 3)


def _embedding(name: str, ldm: str, size: int, time: int) -> Iterator[Row]:
    yield f"{name}.linear_1", f"{ldm}.0", (time, size)
    yield f"{name}.linear_2", f"{ldm}.2", (time, time)


def _down(spec: UNet, skips: list[int]) -> Iterator[Row]:
    """The way down. Appends to `skips` the width of every output that the way up will concatenate."""
    width = spec.widths[0]
    skips.append(width)
    index = 0  # ldm numbers layers and downsamplers through all levels; 0 was conv_in
    for level, out in enumerate(spec.widths):
        block = f"down_blocks.{level}"
        for layer in range(spec.layers):
            index += 1
            yield from _resnet(f"{block}.resnets.{layer}", f"input_blocks.{index}.0", width, out, spec.time)
            if (depth := spec.depths[level]) and (spec.every or not layer):
                attention = f"{block}.attentions.{layer}"
                yield from _attention(attention, f"input_blocks.{index}.1", out, depth, spec)
            width = out
            skips.append(width)
        if level < len(spec.widths) - 1:
            index += 1
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{index}.0.op", (width, width, 3, 3)
            skips.append(width)


def _middle(spec: UNet) -> Iterator[Row]:
    width = spec.widths[-1]
    yield from _resnet("mid_block.resnets.0", "middle_block.0", width, width, spec.time)
    yield from _attention("mid_block.attentions.0", "middle_block.1", width, spec.mid_depth, spec)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", width, width, spec.time)


def _up(spec: UNet, skips: list[int]) -> Iterator[Row]:
    """The way up, which takes from the end of `skips`."""
    width = spec.widths[-1]
    index = -1
    for level, (out, depth) in enumerate(zip(reversed(spec.widths), reversed(spec.depths), strict=True)):
        block = f"up_blocks.{level}"
        for layer in range(spec.layers + 1):
            index += 1
            size = width + skips.pop()
            yield from _resnet(f"{block}.resnets.{layer}", f"output_blocks.{index}.0", size, out, spec.time)
            if depth and (spec.every or not layer):
                attention = f"{block}.attentions.{layer}"
                yield from _attention(attention, f"output_blocks.{index}.1", out, depth, spec)
            width = out
        if level < len(spec.widths) - 1:
            # ldm appends the upsampler to the level's last layer, behind its attention if it has one.
            place = 2 if depth else 1
            yield f"{block}.upsamplers.0.conv", f"output_blocks.{index}.{place}.conv", (width, width, 3, 3)


def _resnet(name: str, ldm: str, size: int, out: int, time: int) -> Iterator[Row]:
    yield f"{name}.norm1", f"{ldm}.in_layers.0", (size,)
    yield f"{name}.conv1", f"{ldm}.in_layers.2", (out, size, 3, 3)
    yield f"{name}.time_emb_proj", f"{ldm}.emb_layers.1", (out, time)
    yield f"{name}.norm2", f"{ldm}.out_layers.0", (out,)
    yield f"{name}.conv2", f"{ldm}.out_layers.3", (out, out, 3, 3)
    if size != out:
        yield f"{name}.conv_shortcut", f"{ldm}.skip_connection", (out, size, 1, 1)


def _attention(name: str, ldm: str, width: int, depth: int, spec: UNet) -> Iterator[Row]:
    projection = (width, width) if spec.linear_projection else (width, width, 1, 1)
    yield f"{name}.norm", f"{ldm}.norm", (width,)
    yield f"{name}.proj_in", f"{ldm}.proj_in", projection
    for index in range(depth):
        block = f"transformer_blocks.{index}"
        for inner, shape in _transformer_block(width, spec.context):
            yield f"{name}.{block}.{inner}", f"{ldm}.{block}.{inner}", shape
    yield f"{name}.proj_out", f"{ldm}.proj_out", projection


def _transformer_block(width: int, context: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Inside a transformer block both namings agree."""
    for attention, size in (("attn1", width), ("attn2", context)):
        yield f"{attention}.to_q", (width, width)
        yield f"{attention}.to_k", (width, size)
        yield f"{attention}.to_v", (width, size)
        yield f"{attention}.to_out.0", (width, width)
    yield "ff.net.0.proj", (8 * width, width)  # GEGLU: 4 * width values and as many gates
    yield "ff.net.2", (width, 4 * width)
    for norm in ("norm1", "norm2", "norm3"):
        yield norm, (width,)
