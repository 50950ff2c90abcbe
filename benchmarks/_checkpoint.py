"""Writes a whole checkpoint of real names and full-width shapes, fp16, random weights: run as a process of its own.

    python benchmarks/_checkpoint.py sd15|sdxl PATH

Every weight and bias of the UNet and the text encoders, by loratool's own tables, and the VAE by its ldm names. Values
are normal, with the standard deviation 0.03 of trained weights.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from loratool.core.registry import architectures

POOL = 1 << 22


def shapes_of(architecture: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes in the order of the parts."""
    model = architectures()[architecture]
    for component, voice in model.checkpoints[0].voices.items():
        naming = model.naming(component, voice.naming)
        for name, targets in naming.items():
            home = naming.home(targets[0])
            shape = (sum(target.rows for target in targets), *targets[0].shape[1:])
            yield voice.prefix + home.tensor_key, shape[::-1] if home.transposed else shape
            if has_bias(component, name):
                yield voice.prefix + home.tensor_key.removesuffix("weight") + "bias", shape[:1]
    yield from vae()


def has_bias(component: str, name: str) -> bool:
    """Whether the layer of that name has a bias."""
    if component == "unet":
        return not name.endswith(("to_q", "to_k", "to_v"))
    return "embedding" not in name and "projection" not in name


def vae() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The autoencoder that both models share: 83.7 million values."""
    stem = "first_stage_model."
    yield from _conv(f"{stem}encoder.conv_in", 128, 3)
    width = 128
    for level, out in enumerate((128, 256, 512, 512)):
        for block in range(2):
            yield from _resnet(f"{stem}encoder.down.{level}.block.{block}", width, out)
            width = out
        if level < 3:
            yield from _conv(f"{stem}encoder.down.{level}.downsample.conv", width, width)
    yield from _middle(f"{stem}encoder.mid")
    yield from _norm(f"{stem}encoder.norm_out", 512)
    yield from _conv(f"{stem}encoder.conv_out", 8, 512)
    yield from _conv(f"{stem}decoder.conv_in", 512, 4)
    yield from _middle(f"{stem}decoder.mid")
    width = 512
    for level, out in zip((3, 2, 1, 0), (512, 512, 256, 128), strict=True):
        for block in range(3):
            yield from _resnet(f"{stem}decoder.up.{level}.block.{block}", width, out)
            width = out
        if level:
            yield from _conv(f"{stem}decoder.up.{level}.upsample.conv", width, width)
    yield from _norm(f"{stem}decoder.norm_out", 128)
    yield from _conv(f"{stem}decoder.conv_out", 3, 128)
    yield from _conv(f"{stem}quant_conv", 8, 8, 1)
    yield from _conv(f"{stem}post_quant_conv", 4, 4, 1)


def _conv(name: str, out: int, size: int, kernel: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, size, kernel, kernel)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _resnet(name: str, size: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", size)
    yield from _conv(f"{name}.conv1", out, size)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if size != out:
        yield from _conv(f"{name}.nin_shortcut", out, size, 1)


def _middle(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _resnet(f"{name}.block_1", 512, 512)
    yield from _norm(f"{name}.attn_1.norm", 512)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{part}", 512, 512, 1)
    yield from _resnet(f"{name}.block_2", 512, 512)


def main() -> None:
    """Writes the file, tensors in the order of the parts."""
    architecture, path = sys.argv[1], Path(sys.argv[2])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, shape in shapes_of(architecture):
        stop = position + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pool = (torch.randn(2 * POOL, generator=torch.Generator().manual_seed(0)) * 0.03).half().numpy()
    chance = random.Random(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = position // 2
        while left:
            count, start = min(left, POOL), chance.randrange(POOL)
            file.write(pool[start : start + count].data)
            left -= count


if __name__ == "__main__":
    main()
