"""The VAE of Stable Diffusion 1, XL and Flux: one walk through it names every weight in three ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratool.core.naming import Naming
from loratool.core.target import Target

Row = tuple[str, str, tuple[int, ...]]
"""(diffusers name, ldm name, shape)."""


class Vae(NamedTuple):
    """What tells one of these VAEs from another.

    `widths` are the channels of each level from the outside in, `latent` those of the latents; `quant` says whether
    there are 1x1 convolutions before and after the latents.
    """

    latent: int
    quant: bool
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    channels: int = 3


VAE_4 = Vae(latent=4, quant=True)
"""Stable Diffusion 1 and XL."""

VAE_16 = Vae(latent=16, quant=False)
"""FLUX.1."""

_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""What diffusers once called the parts of attention; the files of the first models still do."""

_ATTENTION = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))


def vae_namings(spec: Vae, component: str = "vae") -> dict[str, Naming]:
    """The namings `diffusers` (canonical), `diffusers-old` and `ldm`, whose attention is made of 1x1 convolutions."""
    diffusers: dict[str, tuple[Target, ...]] = {}
    old: dict[str, tuple[Target, ...]] = {}
    ldm: dict[str, tuple[Target, ...]] = {}
    pointwise = set()
    for name, ldm_name, shape in _rows(spec):
        diffusers[name] = old[_old(name)] = ldm[ldm_name] = (Target(component, name, shape),)
        if len(shape) == 2:
            pointwise.add(ldm_name)
    return {
        "diffusers": Naming(diffusers),
        "diffusers-old": Naming(old),
        "ldm": Naming(ldm, pointwise=frozenset(pointwise)),
    }


def _old(name: str) -> str:
    head, attention, part = name.partition(".attentions.0.")
    return f"{head}{attention}{_OLD.get(part, part)}"


def _rows(spec: Vae) -> Iterator[Row]:
    inner = spec.widths[-1]
    yield "encoder.conv_in", "encoder.conv_in", (spec.widths[0], spec.channels, 3, 3)
    yield from _down(spec)
    yield from _middle("encoder", inner)
    yield "encoder.conv_norm_out", "encoder.norm_out", (inner,)
    yield "encoder.conv_out", "encoder.conv_out", (2 * spec.latent, inner, 3, 3)  # mean and variance
    if spec.quant:
        yield "quant_conv", "quant_conv", (2 * spec.latent, 2 * spec.latent, 1, 1)
        yield "post_quant_conv", "post_quant_conv", (spec.latent, spec.latent, 1, 1)
    yield "decoder.conv_in", "decoder.conv_in", (inner, spec.latent, 3, 3)
    yield from _middle("decoder", inner)
    yield from _up(spec)
    yield "decoder.conv_norm_out", "decoder.norm_out", (spec.widths[0],)
    yield "decoder.conv_out", "decoder.conv_out", (spec.channels, spec.widths[0], 3, 3)


def _down(spec: Vae) -> Iterator[Row]:
    size = spec.widths[0]
    for level, width in enumerate(spec.widths):
        name, ldm = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        for layer in range(spec.layers):
            yield from _resnet(f"{name}.resnets.{layer}", f"{ldm}.block.{layer}", size, width)
            size = width
        if level < len(spec.widths) - 1:
            yield f"{name}.downsamplers.0.conv", f"{ldm}.downsample.conv", (width, width, 3, 3)


def _up(spec: Vae) -> Iterator[Row]:
    """ldm numbers the levels from the outside in here, too."""
    size = spec.widths[-1]
    last = len(spec.widths) - 1
    for level, width in enumerate(reversed(spec.widths)):
        name, ldm = f"decoder.up_blocks.{level}", f"decoder.up.{last - level}"
        for layer in range(spec.layers + 1):
            yield from _resnet(f"{name}.resnets.{layer}", f"{ldm}.block.{layer}", size, width)
            size = width
        if level < last:
            yield f"{name}.upsamplers.0.conv", f"{ldm}.upsample.conv", (width, width, 3, 3)


def _middle(coder: str, width: int) -> Iterator[Row]:
    name, ldm = f"{coder}.mid_block", f"{coder}.mid"
    yield from _resnet(f"{name}.resnets.0", f"{ldm}.block_1", width, width)
    yield f"{name}.attentions.0.group_norm", f"{ldm}.attn_1.norm", (width,)
    for part, ldm_part in _ATTENTION:
        yield f"{name}.attentions.0.{part}", f"{ldm}.attn_1.{ldm_part}", (width, width)
    yield from _resnet(f"{name}.resnets.1", f"{ldm}.block_2", width, width)


def _resnet(name: str, ldm: str, size: int, width: int) -> Iterator[Row]:
    yield f"{name}.norm1", f"{ldm}.norm1", (size,)
    yield f"{name}.conv1", f"{ldm}.conv1", (width, size, 3, 3)
    yield f"{name}.norm2", f"{ldm}.norm2", (width,)
    yield f"{name}.conv2", f"{ldm}.conv2", (width, width, 3, 3)
    if size != width:
        yield f"{name}.conv_shortcut", f"{ldm}.nin_shortcut", (width, size, 1, 1)
